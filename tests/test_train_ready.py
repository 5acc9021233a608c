import platform
import sys
from pathlib import Path

import pytest
import torch

from fastlocal.train import ready
from fastlocal.train.cli import main
from fastlocal.train.config import Config

SMALL = ["--synthetic-images", "100", "--batch-size", "16", "--workers", "1", "--method", "sync", "--epochs", "1"]


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="reads the flags of an x86 processor on Linux"
)
def test_a_processor_without_512_bit_vectors_emulates_bf16():
    flags = Path("/proc/cpuinfo").read_text().split()
    assert ready.emulates_bf16("cpu") == (not {"avx512bw", "avx512vl", "avx512dq"} <= set(flags))


def test_only_bf16_where_it_is_emulated_is_slow(monkeypatch):
    asked = []
    monkeypatch.setattr(ready, "emulates_bf16", lambda kind: asked.append(kind) or kind == "cpu")
    slow = ready.what_is_slow([Config(device="cpu"), Config(device="cpu", precision="bf16")])
    assert slow is not None
    assert "--precision bf16 is emulated" in slow
    assert ready.what_is_slow([Config(device="cuda:1", precision="bf16")]) is None
    assert ready.what_is_slow([Config(device="cpu")]) is None
    assert asked == ["cpu", "cuda"]


@pytest.mark.parametrize("emulated", [True, False])
def test_a_run_says_once_that_bf16_is_emulated(tmp_path, monkeypatch, capsys, emulated):
    monkeypatch.setattr(ready, "emulates_bf16", lambda kind: emulated)
    out = tmp_path / "run"
    assert main(["train", *SMALL, "--precision", "bf16", "--device", "cpu", "--out", str(out)]) == 0
    assert capsys.readouterr().out.count("bf16 is emulated") == emulated


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_since_ampere_has_bf16():
    assert ready.emulates_bf16("cuda") == (torch.cuda.get_device_capability() < (8, 0))
