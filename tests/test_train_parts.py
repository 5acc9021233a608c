"""Config, schedule, networks and checkpoints."""

import math
import os
import pickle
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastlocal.train import checkpoint, data
from fastlocal.train.config import Config
from fastlocal.train.errors import RunError, UsageError
from fastlocal.train.model import build
from fastlocal.train.schedule import learning_rate


def test_cosine_falls_from_the_peak_towards_zero():
    rates = [learning_rate("cosine", 0.2, step, 8, 0) for step in range(8)]
    assert rates == pytest.approx([0.1 * (1 + math.cos(math.pi * step / 8)) for step in range(8)])
    assert rates[0] == 0.2


def test_warmup_rises_linearly_reaches_the_peak_and_then_falls():
    rates = [learning_rate("warmup-cosine", 0.3, step, 12, 2) for step in range(12)]
    assert rates[:3] == pytest.approx([0.1, 0.2, 0.3])
    assert rates[3:] == pytest.approx([0.15 * (1 + math.cos(math.pi * step / 10)) for step in range(1, 10)])


def test_the_constant_schedule_keeps_the_peak_rate():
    assert {learning_rate("constant", 0.1, step, 5, 2) for step in range(5)} == {0.1}


@pytest.mark.parametrize(("name", "count"), [("lenet", 815_332), ("resnet18", 11_220_132)])
def test_networks_have_the_known_number_of_parameters_and_100_outputs(name, count):
    model = build(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 100)


def test_relu_after_pooling_equals_relu_before_it():
    x = torch.randn(4, 8, 10, 10)
    pool, relu = torch.nn.MaxPool2d(2), torch.nn.ReLU()
    assert torch.equal(relu(pool(x)), pool(relu(x)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"interval": 0}, "--interval must be at least 1, got 0"),
        ({"workers": 0}, "--workers must be at least 1, got 0"),
        ({"slow_lr": 1e300, "method": "slowmo"}, "--slow-lr must be positive and at most 1e30, got 1e"),
        ({"synthetic_images": 10**11}, "--synthetic-images must be at most 10 million, got 100000000000"),
        ({"max_interval": 2**63, "policy": "qsr"}, r"--max-interval must be below 2\^63, got"),
        ({"lr": math.nan}, "--lr must be positive and at most 1e30, got nan"),
        ({"momentum": 1.0}, r"--momentum must be in \[0, 1\), got 1.0"),
        ({"weight_decay": -0.1}, "--weight-decay must be at least 0 and finite, got -0.1"),
        ({"threads": 0}, r"--threads must be in \[1, 1024\], got 0"),
        ({"threads": 99_999}, r"--threads must be in \[1, 1024\], got 99999"),
        (
            {"policy": "val-loss", "min_interval": 8, "max_interval": 4},
            "--max-interval must be at least --min-interval 8, got 4",
        ),
        ({"policy": "val-loss", "interval": 2}, "--interval must lie between --min-interval 4"),
        ({"policy": "qsr", "interval": 100}, "--interval must be at most --max-interval 64, got 100"),
        ({"slow_momentum": 0.3}, "--slow-momentum has no use without --method slowmo or diloco"),
        ({"qsr_alpha": 0.3}, "--qsr-alpha has no use without --policy qsr"),
        ({"seed": 2**41}, r"--seed must be below 2\^40, got"),
        ({"policy": "consensus"}, "--policy consensus needs --consensus-target"),
        (
            {"policy": "consensus", "consensus_target": 1.0, "overlap_steps": 2},
            "decides from the drift of the last sync",
        ),
        ({"overlap_steps": -1}, "--overlap-steps must be at least 0, got -1"),
        ({"method": "sync", "overlap_steps": 2}, "--overlap-steps has no use without --method local-sgd, slowmo or"),
        ({"method": "sync", "policy": "qsr"}, "--method sync averages in every step"),
        ({"method": "sync", "interval": 8}, "--interval has no use without --method local-sgd, slowmo or diloco"),
        ({"method": "sync", "inner_state": "reset"}, "--inner-state has no use without --method local-sgd"),
        ({"optimizer": "lamb", "momentum": 0.5}, "--momentum has no use without --optimizer sgd or lars"),
        ({"lr_warmup_epochs": 3}, "--lr-warmup-epochs has no use without --schedule warmup-cosine"),
        ({"post_local_steps": 4}, "--post-local-steps has no use without --policy post-local"),
        ({"policy": "qsr", "min_interval": 2}, "--min-interval has no use without --policy val-loss, val-loss-orig"),
        ({"download": True}, "--download has no use without --dataset cifar100"),
        ({"dataset": "cifar100", "synthetic_images": 9}, "--synthetic-images has no use without --dataset synthetic"),
        (
            {"schedule": "warmup-cosine", "epochs": 5},
            "--lr-warmup-epochs must be below --epochs 5 for --schedule warmup-cosine, got 5",
        ),
    ],
)
def test_a_flag_out_of_range_is_named_with_value_and_rule(values, message):
    with pytest.raises(UsageError, match=message):
        Config(**values)


def test_what_cannot_be_told_from_a_default_is_accepted_and_what_has_a_use_too():
    assert Config(method="sync", optimizer="lamb", interval=16, momentum=0.9, lr_warmup_epochs=5).lr is None
    assert Config(schedule="warmup-cosine", lr_warmup_epochs=4, epochs=5).epochs == 5
    assert Config(policy="post-local", post_local_steps=4, interval=8).interval == 8


def test_only_what_makes_another_run_counts_as_a_difference():
    saved = Config(lr=0.1, workers=2).as_dict()
    assert Config(lr=0.1, workers=2, resume=True, device="cpu", checkpoint_seconds=3).differences(saved) == []
    assert Config(lr=0.2, workers=2).differences(saved) == ["--lr 0.2 (it was 0.1)"]
    assert Config(workers=2).differences(saved) == ["--lr the default (it was 0.1)"]
    assert Config(lr=0.1).differences(Config().as_dict()) == ["--lr 0.1 (it was the default)"]
    consensus = Config(policy="consensus", consensus_target=0.1)
    assert consensus.differences(Config().as_dict()) == [
        "--policy consensus (it was fixed)",
        "--consensus-target 0.1 (it was the default)",
    ]


@pytest.mark.parametrize(
    "given",
    [
        {"lr": 0.02, "workers": 2, "weight_decay": 0.001},
        {"method": "slowmo", "slow_lr": 1.0, "slow_momentum": 0.5},
        {"policy": "qsr", "interval": 4, "workers": 1, "qsr_alpha": 0.02},
    ],
)
def test_a_default_that_is_spelled_out_is_no_difference(given):
    # By hand: 0.01 a worker; alpha is the rate times the root of the interval, 0.01 * 2.
    optional = ("lr", "weight_decay", "slow_lr", "slow_momentum", "qsr_alpha")
    left_out = Config(**{name: value for name, value in given.items() if name not in optional})
    assert Config(**given).differences(left_out.as_dict()) == left_out.differences(Config(**given).as_dict()) == []
    assert "--lr 0.3 (it was the default)" in Config(**(given | {"lr": 0.3})).differences(left_out.as_dict())


def test_a_checkpoint_comes_back_and_torch_reads_it_too(tmp_path):
    path, state = tmp_path / "c.pt", {"a": torch.arange(5.0), "b": [1, "x", None]}
    checkpoint.save(path, state)
    for loaded in (checkpoint.decode(checkpoint.read(path)), torch.load(path, weights_only=True)):
        assert torch.equal(loaded["a"], state["a"])
        assert loaded["b"] == state["b"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["c.pt"]


@pytest.mark.parametrize("position", [0, 200, 900, -40, -1])
def test_one_flipped_bit_anywhere_is_found(tmp_path, position):
    path = tmp_path / "c.pt"
    checkpoint.save(path, {"a": torch.arange(100.0)})
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"c.pt is damaged .* delete it to begin the run again"):
        checkpoint.read(path)


@pytest.mark.parametrize("content", [b"", b"x", b"y" * 5000])
def test_a_file_that_is_no_checkpoint_is_found(tmp_path, content):
    path = tmp_path / "c.pt"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="is damaged"):
        checkpoint.read(path)


class Runs:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_checkpoint_with_code_in_it_runs_none(tmp_path):
    checkpoint.save(tmp_path / "c.pt", {"a": Runs(tmp_path / "ran")})
    with pytest.raises(pickle.UnpicklingError):
        checkpoint.decode(checkpoint.read(tmp_path / "c.pt"))
    assert not (tmp_path / "ran").exists()


def test_a_folder_in_the_place_of_a_checkpoint_is_one_clear_error(tmp_path):
    with pytest.raises(UsageError, match="cannot be read: Is a directory"):
        checkpoint.read(tmp_path)


def test_a_file_in_a_place_that_is_no_folder_is_one_clear_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"c.pt cannot be written: Not a directory$"):
        checkpoint.save(tmp_path / "file" / "c.pt", {})


def test_a_write_that_fails_halfway_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "c.pt"
    checkpoint.save(path, {"a": torch.zeros(3)})
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # as a disk that fills up while the file is written
    try:
        with pytest.raises(RunError, match=r"c.pt cannot be written: File too large; use another folder"):
            checkpoint.save(path, {"a": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["c.pt"]


def test_a_least_interval_that_a_policy_has_no_use_for_does_not_bound_its_greatest():
    assert Config(policy="qsr", interval=1, max_interval=2).max_interval == 2
    assert Config(policy="adacomm", interval=2, max_interval=3).max_interval == 3


def test_images_too_few_to_validate_are_told_apart_from_too_few_for_a_step():
    with pytest.raises(UsageError, match="at least 5 images are needed, so that one validates, there are 4"):
        data.load(Config(synthetic_images=4, batch_size=1, workers=1))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's settings")
def test_memory_that_a_step_frees_is_kept_for_the_next():
    program = """
import resource, sys
import torch
from fastlocal.train.allocator import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

torch.ones(16 << 20)  # 64 MiB: mapped anew each time, unless the process keeps what it frees
counts = []
for _ in range(5):
    before = faults()
    torch.ones(16 << 20)
    counts.append(faults() - before)
print(sorted(counts)[2])  # a machine short of memory may take some of it away in between
"""
    environment = {name: value for name, value in os.environ.items() if name not in ("LD_PRELOAD", "GLIBC_TUNABLES")}
    environment |= {"PYTHONPATH": str(Path(__file__).parent.parent)}
    counts = {}
    for choice in ("keep", "leave"):
        command = [sys.executable, "-c", program, choice]
        said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        counts[choice] = int(said)
    assert counts["keep"] < 20
    assert counts["leave"] >= 32  # 2 MiB a fault where the kernel gives huge pages, 4 KiB where not
