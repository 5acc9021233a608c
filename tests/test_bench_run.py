"""The benchmark's plan, its rows, and the command."""

import json
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastlocal.bench import cases, machine
from fastlocal.bench.__main__ import main as module_main
from fastlocal.bench.measure import Turn, _timing
from fastlocal.bench.run import BenchPlan, ahead, host_bound, run
from fastlocal.bench.shapes import SHAPES, num_parameters
from fastlocal.train.cli import main


def run_module(arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["bench", *arguments])
        return module_main()


def test_models_have_the_parameters_of_the_originals():
    counts = {"lenet": (10, 815_332), "resnet18": (62, 11_220_132), "resnet50": (161, 25_557_032)}
    for name, expected in counts.items():
        shapes = SHAPES[name]()
        assert (len(shapes), num_parameters(shapes)) == expected


def test_medians_percentiles_and_ratios_are_those_computed_by_hand():
    turns = [Turn(2.0, False), Turn(4.0, False), Turn(6.0, True), Turn(8.0, False)]
    timing = _timing(turns, [Turn(seconds, False) for seconds in (1.0, 1.0, 3.0, 2.0)], 9.0)
    assert (timing.p50, timing.first, timing.host_bound, timing.turns) == (5.0, 9.0, 0.25, 4)
    assert timing.ratio == 3.0  # of 2, 4, 2 and 4
    assert timing.p20 < 4.0 < 6.0 < timing.p80


def test_a_plan_covers_all_operations_and_leaves_out_the_mean_of_one_row():
    planned = list(BenchPlan().cases())
    assert {operation for operation, _, _ in planned} == set(cases.OPERATIONS)
    assert ("outer-step", "lenet", 1) in planned
    assert ("average", "lenet", 1) not in planned
    assert {k for operation, _, k in planned if operation == "average"} == {2, 4, 8, 16}
    assert ("average", "bert-base", 4) in planned
    assert ("average", "bert-base", 8) not in planned
    with pytest.raises(ValueError, match="size must be one of .* got 'gpt'"):
        BenchPlan(size="gpt")


def test_bench_writes_a_traceable_row_for_each_contender(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    assert main(["bench", "--operation", "outer-step", "--size", "lenet", "--quick", "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {(row["workers"], row["contender"]) for row in rows} == {
        (k, name) for k in (2, 8) for name in ("fastlocal", "plain PyTorch", "copy")
    }
    for row in rows:
        assert row["seconds_p20"] <= row["seconds_p50"] <= row["seconds_p80"]
        rate = row["bytes_a_parameter"] * row["parameters"] / row["seconds_p50"]
        copy = next(r for r in rows if r["workers"] == row["workers"] and r["contender"] == "copy")
        copy_rate = 8 * copy["parameters"] / copy["seconds_p50"]
        assert row["share_of_copy"] == pytest.approx(rate / copy_rate)
        assert row["versions"]["torch"]
        assert row["device"]
        assert row["threads"] == torch.get_num_threads()
        assert datetime.fromisoformat(row["date"]).tzinfo is not None
    ours = next(row for row in rows if row["contender"] == "fastlocal" and row["workers"] == 8)
    assert ours["bytes_a_parameter"] == 80
    assert "outer-step, lenet, 8 workers" in " ".join(capsys.readouterr().out.split())


def test_an_unknown_size_is_a_usage_error(capsys):
    assert main(["bench", "--size", "gpt"]) == 2
    assert "--size must be one of" in capsys.readouterr().err


@pytest.mark.parametrize("command", [lambda a: main(["bench", *a]), run_module])
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--out", "{file}/a/rows.jsonl"], "error: --out {file}/a/rows.jsonl cannot be written: Not a directory"),
        (["--out", "{folder}"], "error: --out {folder} cannot be written: Is a directory"),
        pytest.param(
            ["--device", "cuda"],
            "error: --device must be 'cpu' here: there is no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
)
def test_what_cannot_be_done_is_one_line_and_exit_code_2_before_anything_is_measured(
    command, arguments, said, tmp_path, capsys
):
    file = tmp_path / "file"
    file.touch()
    assert command([each.format(file=file, folder=tmp_path) for each in arguments]) == 2
    assert capsys.readouterr().err.splitlines() == [said.format(file=file, folder=tmp_path)]


@pytest.mark.parametrize("command", [lambda a: main(["bench", *a]), run_module])
def test_a_disk_that_fills_up_is_one_line_and_exit_code_1(command, capsys):
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    assert command(["--operation", "lars", "--size", "lenet", "--out", "/dev/full"]) == 1
    assert capsys.readouterr().err.splitlines() == ["error: /dev/full cannot be written: No space left on device"]


@pytest.mark.parametrize(("operation", "workers"), [("average", 2), ("outer-step", 1), ("lars", 1)])
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells what a process holds")
def test_a_case_takes_no_more_memory_than_it_is_said_to_need(operation, workers):
    script = f"""
import torch
torch.set_num_threads(1)
from fastlocal.bench import cases
from fastlocal.bench.measure import _copies

def in_bytes(what):
    lines = dict(line.split(":", 1) for line in open("/proc/self/status").read().splitlines())
    return 1024 * int(lines[what].removesuffix("kB"))

def run(size):
    case = cases.build({operation!r}, size, {workers}, "cpu", 2)
    copies = _copies(case, "cpu")
    for call in [*copies, *(call for contender in case.contenders for call in contender.calls)]:
        call()

run("tiny")
before = in_bytes("VmRSS")
run("resnet18")
print(in_bytes("VmHWM") - before, cases.bytes_needed({operation!r}, "resnet18", {workers}, 2))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    taken, said = map(int, done.stdout.split())
    assert 0.3 * said < taken <= said


def test_what_does_not_fit_into_the_memory_is_left_out_and_said(monkeypatch):
    monkeypatch.setattr(machine, "free_bytes", lambda device: 10**8)
    said = []
    assert (
        run(BenchPlan(operation="average", size="resnet18", quick=True, device="cpu"), lambda *_: None, said.append)
        == []
    )
    # 2 rows, what an outer step adds, a copy's pair, and 8 temporaries, of 11.2 million numbers.
    assert said[0] == "average, resnet18, 2 workers: left out, it needs 0.6 GB of memory, 0.1 GB are free"


def test_where_a_peer_is_ahead_is_said_with_how_much():
    rows = [
        SimpleNamespace(operation="lars", size="lenet", workers=1, contender=name, ratio=ratio)
        for name, ratio in (("fastlocal", 1.0), ("timm", 1.5), ("torch SGD fused", 0.384), ("copy", 0.1))
    ]
    assert ahead(rows) == ["ahead of fastlocal: torch SGD fused in lars, lenet: 0.38 of its time"]


def test_whose_time_is_the_hosts_too_is_said_with_how_often():
    rows = [
        SimpleNamespace(operation="lamb", size="resnet50", workers=1, contender=name, host_bound=share)
        for name, share in (("fastlocal", 0.0), ("timm", 0.9))
    ]
    assert host_bound(rows) == ["may have waited for the host: timm in lamb, resnet50, in 90% of the turns"]


def test_a_checkout_without_its_history_can_be_told_its_commit(monkeypatch):
    monkeypatch.setenv("FASTLOCAL_COMMIT", "0123abc")
    assert machine.origin("cpu")["commit"] == "0123abc"


def test_benchmarks_need_torch_alone():
    code = """
import sys
for name in ("rich", "cyclopts", "numpy.testing", "matplotlib", "timm", "pytorch_optimizer"):
    sys.modules[name] = None
sys.argv = ["bench", "--operation", "lars", "--size", "lenet"]
import torch; torch.set_num_threads(1)
import fastlocal.bench.installed as installed
installed.importlib.util.find_spec = lambda name: None
from fastlocal.bench.__main__ import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "torch SGD fused" in done.stdout
    assert "not installed: timm, pytorch_optimizer" in done.stdout
