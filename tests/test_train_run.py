"""Whole runs: what they write, exact resume, kill -9, and errors as one line with an exit code."""

import errno
import fcntl
import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from waiting import wait_until

from fastlocal.__main__ import main as whole_command
from fastlocal.train import checkpoint, cli, data
from fastlocal.train import run as run_module
from fastlocal.train.cli import main
from fastlocal.train.config import Config
from fastlocal.train.display import Display
from fastlocal.train.errors import UsageError
from fastlocal.train.lock import hold
from fastlocal.train.loop import Training
from fastlocal.train.processes import Processes

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
SMALL = ["--batch-size", "16", "--workers", "2", "--interval", "4"]
THREE_EPOCHS = [*SMALL, "--synthetic-images", "400", "--epochs", "3"]
ONE_EPOCH = [*SMALL, "--synthetic-images", "400", "--epochs", "1"]
TIMES = ("train_seconds", "sync_seconds")  # what may differ between two equal runs


def small(tmp_path, **values):
    usual = {"synthetic_images": 400, "batch_size": 16, "workers": 2, "epochs": 3, "out": tmp_path}
    if values.get("method") != "sync":
        usual["interval"] = 4
    return Config(**(usual | values))


def outcome(training):
    """All parameters, and the records without what the clock says."""
    rows = torch.cat([parameter.detach().flatten() for parameter in training.workers.parameters()])
    return rows, [{k: v for k, v in vars(record).items() if k not in TIMES} for record in training.records]


class Stopped(Exception):
    pass


class SaveAndStop:
    """Saves a training at one of its steps and ends it there."""

    def __init__(self, step):
        self.step = step
        self.training = None

    def __call__(self, progress):
        if (progress.epoch - 1) * progress.steps + progress.step == self.step:
            self.training.save()
            raise Stopped


@pytest.mark.parametrize(
    "values",
    [
        {"method": "slowmo", "policy": "val-loss", "wire_dtype": "fp8", "overlap_steps": 3},
        {"method": "diloco", "optimizer": "adamw", "lr": 1e-3},
        {
            "method": "local-sgd",
            "policy": "consensus",
            "consensus_target": 0.5,
            "precision": "bf16",
            "batch_size": 4,  # as many steps of fewer images: some processors emulate bf16
            "synthetic_images": 100,
        },
        {
            "method": "local-sgd",
            "policy": "adacomm",
            "warmup_steps": 7,
            "inner_state": "average",
            "wire_dtype": "bf16",
        },
        {"method": "sync", "schedule": "warmup-cosine", "lr_warmup_epochs": 1, "optimizer": "lamb"},
        {"method": "local-sgd", "policy": "qsr", "eval_every": 2, "schedule": "constant", "optimizer": "lars"},
    ],
    ids=lambda values: "-".join(map(str, values.values())),
)
def test_a_run_stopped_anywhere_and_resumed_ends_with_the_same_bits(tmp_path, values):
    config = small(tmp_path, checkpoint_seconds=1e9, **values)
    splits = data.load(config)
    straight = Training(config, splits, tmp_path / "straight.pt", CPU, Processes())
    list(straight.epochs())
    assert straight.optimizer.stats.local_steps == 30
    for stop in (1, 13, 20, 25):
        path = tmp_path / f"{stop}.pt"

        stopper = SaveAndStop(stop)
        first = stopper.training = Training(config, splits, path, CPU, Processes(), stopper)
        with pytest.raises(Stopped):
            list(first.epochs())
        second = Training(config, splits, path, CPU, Processes())
        second.resume()
        list(second.epochs())
        assert torch.equal(outcome(second)[0], outcome(straight)[0])
        assert outcome(second)[1] == outcome(straight)[1]
        assert second.interval_trace == straight.interval_trace
        assert second.test() == straight.test()


def test_workers_have_parts_of_their_own_and_see_each_image_once_an_epoch(tmp_path):
    config = small(tmp_path, synthetic_images=400)
    training = Training(config, data.load(config), tmp_path / "c.pt", CPU, Processes())
    parts = [{bytes(image.numpy()) for image in worker.windows[:, :, 4, 4]} for worker in training.data]
    assert [len(part) for part in parts] == [160, 160]
    assert not parts[0] & parts[1]
    assert training.steps_per_epoch == 10


def test_synchronous_training_sends_what_it_is_compared_with(tmp_path):
    config = small(tmp_path, method="sync", epochs=1)
    training = Training(config, data.load(config), tmp_path / "c.pt", CPU, Processes())
    list(training.epochs())
    stats = training.optimizer.stats
    assert stats.bytes_on_wire == stats.bytes_synchronous == 10 * 815_332 * 4
    rows = training.workers.rows.blocks[0].rows
    assert torch.equal(rows[0], rows[1])


def test_a_worker_that_diverges_alone_is_healed_and_the_run_goes_on(tmp_path):
    config = small(tmp_path, workers=3, synthetic_images=600, epochs=1)

    def poison(progress):
        if progress.step == 2:
            with torch.no_grad():
                training.workers[1][0].weight.fill_(torch.nan)

    training = Training(config, data.load(config), tmp_path / "c.pt", CPU, Processes(), poison)
    (record,) = training.epochs()
    assert record.excluded == 1
    assert 0 < record.train_loss < 10
    assert record.val_loss is not None
    assert 0 < record.val_loss < 10


def test_a_resnet_trains_and_its_averaged_batchnorm_evaluates(tmp_path):
    config = small(tmp_path, model="resnet18", synthetic_images=40, batch_size=8, epochs=1, interval=1, lr=0.001)
    training = Training(config, data.load(config), tmp_path / "c.pt", CPU, Processes())
    (record,) = training.epochs()
    assert record.rounds == 2
    assert record.val_loss is not None
    assert 0 < record.val_loss < 20
    counts = [
        module.num_batches_tracked.item()
        for module in training.workers.mean().modules()
        if hasattr(module, "num_batches_tracked")
    ]
    assert counts == [2] * 20


def test_a_run_writes_what_it_promises(tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", *THREE_EPOCHS, "--policy", "val-loss", "--out", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {
        "config.json",
        "records.jsonl",
        "checkpoint.pt",
        "curves.png",
        "summary.json",
        ".lock",
    }
    summary = json.loads((out / "summary.json").read_text())
    records = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [1, 2, 3]
    assert summary["local_steps"] == 30
    assert summary["train_samples"] == 30 * 2 * 16
    assert summary["bytes_synchronous"] == 30 * 815_332 * 4
    assert summary["bytes_on_wire"] == summary["rounds"] * 815_332 * 4
    assert summary["communication_reduction"] == pytest.approx(1 - summary["rounds"] / 30)
    assert summary["best_val_accuracy"] == max(record["val_accuracy"] for record in records)
    assert summary["interval_trace"][0] == [0, 4]
    assert summary["config"]["policy"] == "val-loss"
    assert summary["versions"]["torch"] == torch.__version__
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "test accuracy" in shown
    assert "synchronous training sends" in shown
    # Resuming a finished run shows it again and trains no more.
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert main(["train", *THREE_EPOCHS, "--policy", "val-loss", "--out", str(out), "--resume"]) == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_killed_run_goes_on_to_the_same_end(tmp_path):
    command = [
        sys.executable,
        "-m",
        "fastlocal",
        "train",
        *SMALL,
        *("--synthetic-images", "400", "--epochs", "8", "--method", "slowmo", "--threads", "1"),
    ]
    command += ["--checkpoint-seconds", "0", "--resume", "--out"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    kills, rng = 0, random.Random(0)
    while kills < 3:
        process = subprocess.Popen(
            [*command, str(tmp_path / "killed")],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        seen = (tmp_path / "killed" / "checkpoint.pt").stat().st_mtime_ns if kills else 0
        while process.poll() is None:  # until it made progress, then a little longer
            path = tmp_path / "killed" / "checkpoint.pt"
            if path.exists() and path.stat().st_mtime_ns != seen:
                break
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.4))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
        kills += 1
    for name in ("killed", "straight"):
        done = subprocess.run(
            [*command, str(tmp_path / name)], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    killed, straight = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("killed", "straight")
    )
    for ours, theirs in zip(killed["workers"], straight["workers"], strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    records = []
    for name in ("killed", "straight"):
        lines = (tmp_path / name / "records.jsonl").read_text().splitlines()
        records.append([{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines])
    assert records[0] == records[1]
    assert len(records[0]) == 8
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("killed", "straight")]
    assert summaries[0]["test_accuracy"] == summaries[1]["test_accuracy"]


def test_ctrl_c_says_how_to_go_on(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "fastlocal", "train", *SMALL, "--epochs", "1000"]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path / "run")],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts background jobs, which the tests may be one of, with SIGINT ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while process.poll() is None and not (tmp_path / "run" / "checkpoint.pt").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert errors.strip() == "stopped; the same command with --resume goes on"


def test_ctrl_c_while_it_is_still_being_imported_is_one_word(monkeypatch, capsys):
    class Interrupted:
        def find_spec(self, name, *_):
            if name == "fastlocal.train.cli":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "fastlocal.train.cli")
    monkeypatch.setattr(sys, "meta_path", [Interrupted(), *sys.meta_path])
    assert whole_command() == 130
    assert capsys.readouterr().err == "stopped\n"


def test_a_second_run_in_a_folder_is_refused_while_the_first_is_there(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run_module, "_PATIENCE_SECONDS", 0.1)
    out = tmp_path / "run"
    arguments = [*SMALL, "--epochs", "1000", "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "fastlocal", "train", *arguments]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as first:
        wait_until((out / "config.json").exists)
        try:
            assert f"{out} is in use by process {first.pid} on " in fails(capsys, [*arguments, "--resume"])
        finally:
            first.kill()


def test_a_run_that_another_process_ends_meanwhile_is_not_run_again(tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    assert main(["train", *ONE_EPOCH, "--out", str(out)]) == 0
    summary = (out / "summary.json").read_bytes()
    (out / "summary.json").unlink()

    def wait_for_its_end(folder, *, patience_seconds):
        (folder / "summary.json").write_bytes(summary)
        return hold(folder, patience_seconds=patience_seconds)

    monkeypatch.setattr(run_module, "hold", wait_for_its_end)
    capsys.readouterr()
    assert main(["train", *ONE_EPOCH, "--out", str(out), "--resume"]) == 0
    shown = capsys.readouterr().out
    assert "has been finished by another process" in shown.replace("\n", " ")
    assert "going on after" not in shown
    assert (out / "summary.json").read_bytes() == summary


@pytest.mark.parametrize(("steps", "lasts"), [(9, False), (10, True)])
def test_a_run_whose_warmup_lasts_to_its_end_says_so(tmp_path, capsys, steps, lasts):
    # Of 320 images two workers take 10 steps of 16.
    assert main(["train", *ONE_EPOCH, "--warmup-steps", str(steps), "--out", str(tmp_path / "run")]) == 0
    said = f"--warmup-steps {steps} is the whole run: each step averages gradients"
    assert (said in capsys.readouterr().out.replace("\n", " ")) == lasts


def test_a_run_in_a_filesystem_without_locks_says_so_and_goes_on(tmp_path, capsys, monkeypatch):
    def refuse(descriptor, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert main(["train", *ONE_EPOCH, "--out", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().out.replace("\n", " ")
    assert "No locks available" in shown
    assert "keep other runs out of it yourself" in shown


def fails(capsys, arguments, code=2):
    """Run the command line; returns its one line of error."""
    assert main(["train", *arguments]) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize("rank", ["1", "none"])
def test_a_lone_run_speaks_whatever_number_a_cluster_gave_its_job(tmp_path, capsys, monkeypatch, rank):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert main(["train", *ONE_EPOCH, "--out", str(tmp_path / "run")]) == 0
    assert "test accuracy" in capsys.readouterr().out
    assert fails(capsys, ["--interval", "0"]).startswith("error: ")


def test_bad_requests_are_one_line_with_exit_code_2_and_write_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "--interval must be at least 1, got 0" in fails(capsys, ["--interval", "0"])
    assert 'unable to convert "x"' in fails(capsys, ["--lr", "x"])
    assert "--bogus" in fails(capsys, ["--bogus", "3"])
    for name in ("meta", "gpu", "mps", "cuda:x"):
        line = fails(capsys, ["--device", name])
        assert line == f"error: --device must be auto, cpu, cuda or cuda:1 ..., got {name}"
    assert "--device cuda:99 cannot be used: PyTorch finds " in fails(capsys, ["--device", "cuda:99"])
    assert "cannot be used: File name too long" in fails(capsys, ["--out", "x" * 300])
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        patch.delenv("RANK", raising=False)
        assert "WORLD_SIZE is 2 but RANK is not set: start with torchrun" in fails(capsys, [])
        patch.setenv("WORLD_SIZE", "two")
        assert "WORLD_SIZE must be a whole number of at least 1, got 'two'" in fails(capsys, [])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "checkpoint.pt").write_text("precious")
    assert "mine holds checkpoint.pt of something else" in fails(capsys, [*ONE_EPOCH, "--out", "mine"])
    assert (tmp_path / "mine" / "checkpoint.pt").read_text() == "precious"
    assert "data/cifar-100-python/train is missing" in fails(capsys, ["--dataset", "cifar100"])
    monkeypatch.setitem(sys.modules, "torchvision", None)  # as where it is not installed
    assert "--download needs torchvision" in fails(capsys, ["--dataset", "cifar100", "--download"])
    (tmp_path / "cifar-100-python").mkdir()
    (tmp_path / "cifar-100-python" / "train").write_bytes(b"broken")
    assert "is damaged or no CIFAR-100 file" in fails(capsys, ["--dataset", "cifar100", "--data-dir", "."])
    (tmp_path / "file").touch()
    assert "--out file/run cannot be made: Not a directory" in fails(capsys, [*ONE_EPOCH, "--out", "file/run"])
    assert "--out /proc/run cannot be made" in fails(capsys, [*ONE_EPOCH, "--out", "/proc/run"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cifar-100-python", "file", "mine"]


def test_a_folder_or_checkpoint_of_another_run_is_refused(tmp_path, capsys):
    out = ["--out", str(tmp_path / "run")]
    assert main(["train", *ONE_EPOCH, *out]) == 0
    capsys.readouterr()
    assert "holds a run already: add --resume" in fails(capsys, [*ONE_EPOCH, *out])
    assert "--lr 0.5 (it was the default)" in fails(capsys, [*ONE_EPOCH, *out, "--lr", "0.5", "--resume"])
    settings = (tmp_path / "run" / "config.json").read_text()
    for content, message in (("[]", "does not hold a JSON object"), ("{", "config.json cannot be read: Expecting")):
        (tmp_path / "run" / "config.json").write_text(content)
        assert message in fails(capsys, [*ONE_EPOCH, *out, "--resume"])
    (tmp_path / "run" / "config.json").write_text(settings)
    (tmp_path / "run" / "summary.json").write_text("{}")
    assert "is no summary of a run" in fails(capsys, [*ONE_EPOCH, *out, "--resume"])
    (tmp_path / "run" / "summary.json").unlink()
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    content = bytearray(checkpoint.read_bytes())
    content[5000] ^= 4
    checkpoint.write_bytes(content)
    assert "is damaged (its SHA-256 does not match)" in fails(capsys, [*ONE_EPOCH, *out, "--resume"])
    other = ["--out", str(tmp_path / "other")]
    assert main(["train", *SMALL, *other, "--epochs", "1", "--synthetic-images", "60", "--model", "resnet18"]) == 0
    capsys.readouterr()
    checkpoint.write_bytes((tmp_path / "other" / "checkpoint.pt").read_bytes())
    line = fails(capsys, [*ONE_EPOCH, *out, "--resume"])
    assert "is of another run: " in line
    assert "--model lenet (it was resnet18)" in line


def test_a_checkpoint_of_other_images_or_without_its_parts_is_refused_and_nothing_is_taken(tmp_path):
    config = small(tmp_path, epochs=1)
    path = tmp_path / "checkpoint.pt"
    training = Training(config, data.load(config), path, CPU, Processes())
    list(training.epochs())
    others = Training(config, data.load(small(tmp_path, synthetic_images=500)), path, CPU, Processes())
    before = outcome(others)[0].clone()
    with pytest.raises(UsageError, match="was made with other images than those in --data-dir"):
        others.resume()
    assert torch.equal(outcome(others)[0], before)
    state = checkpoint.decode(checkpoint.read(path))
    del state["step"]
    checkpoint.save(path, state)
    with pytest.raises(UsageError, match=r"is no checkpoint of this version: KeyError\('step'\)"):
        training.resume()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epoch": 99}, "it stands at epoch 99, step 0"),
        ({"epoch": 0, "step": 99}, "it stands at epoch 0, step 99"),
        ({"epoch": "x"}, "TypeError"),
        ({"workers": []}, "it holds 0 workers"),
        ({"inner": []}, "IndexError"),
        ({"config": None}, "AttributeError"),
        (None, "AttributeError|TypeError"),
    ],
)
def test_a_whole_checkpoint_of_something_else_is_refused_in_one_line(changes, message, tmp_path):
    config = small(tmp_path, epochs=1)
    path = tmp_path / "checkpoint.pt"
    training = Training(config, data.load(config), path, CPU, Processes())
    training.save()
    state = checkpoint.decode(checkpoint.read(path))
    checkpoint.save(path, "something" if changes is None else state | changes)
    with pytest.raises(UsageError, match=f"is no checkpoint of this version: .*({message})"):
        training.resume()


def test_a_checkpoint_that_holds_a_program_is_refused_and_not_run(tmp_path):
    config = small(tmp_path, epochs=1)
    path = tmp_path / "checkpoint.pt"
    training = Training(config, data.load(config), path, CPU, Processes())
    checkpoint.save(path, {"config": functools.partial(print, "run")})
    with pytest.raises(UsageError, match="is no checkpoint of this version: UnpicklingError"):
        training.resume()


def test_the_summary_shows_a_long_folder_whole_and_nothing_below_zero(capsys):
    summary = {
        "test_accuracy": None, "best_val_accuracy": 1.0, "rounds": 1, "local_steps": 1, "bytes_on_wire": 10_004,
        "bytes_synchronous": 10_000, "communication_reduction": -0.0004, "train_seconds": 1.0, "sync_seconds": None,
        "samples_per_second": 1.0, "folder": "/a/" + "long/" * 40,
    }  # fmt: skip
    Display(Console(width=60)).summary(summary)
    shown = capsys.readouterr().out
    assert summary["folder"] in shown
    assert "communication saved         0.0 %" in shown
    assert "training time               1.0 s, messages overlapped" in shown


def test_training_that_diverges_ends_with_exit_code_1_and_says_so(tmp_path, capsys):
    line = fails(capsys, [*ONE_EPOCH, "--lr", "1e6", "--out", str(tmp_path / "run[/a]")], code=1)
    assert "diverged" in line


@pytest.mark.parametrize(
    ("given", "advice"),
    [
        (["--epochs", "1"], "lower --lr (now 1e+06)"),  # a single epoch has no room to warm up
        (["--epochs", "3"], "lower --lr (now 1e+06) or give --schedule warmup-cosine --lr-warmup-epochs 2"),
        (["--epochs", "9"], "lower --lr (now 1e+06) or give --schedule warmup-cosine --lr-warmup-epochs 5"),
        (
            ["--epochs", "3", "--schedule", "warmup-cosine", "--lr-warmup-epochs", "1"],
            "lower --lr (now 1e+06) or raise --lr-warmup-epochs (now 1)",
        ),
        (
            ["--epochs", "3", "--schedule", "warmup-cosine", "--lr-warmup-epochs", "2"],
            "lower --lr (now 1e+06)",
        ),
    ],
)
def test_a_run_that_diverged_is_told_only_what_it_would_accept(tmp_path, capsys, given, advice):
    request = ["--method", "sync", "--batch-size", "16", "--synthetic-images", "400", "--lr", "1e6", *given]
    line = fails(capsys, [*request, "--out", str(tmp_path / "run")], code=1)
    assert line.endswith(f"training has diverged; {advice}")


def test_a_disk_that_fills_up_ends_the_run_with_one_line_and_keeps_the_last_checkpoint(tmp_path):
    code = (
        "import resource, sys; from fastlocal.__main__ import main; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000)); sys.exit(main())"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, "train", *ONE_EPOCH, "--out", str(tmp_path / "run")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "checkpoint.pt cannot be written: File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock", "config.json"}


@pytest.mark.parametrize(
    ("module", "code"), [("fastlocal.__main__", 1), ("fastlocal.train.job", 2)], ids=["command", "job"]
)
def test_memory_that_runs_out_ends_the_run_with_one_line(tmp_path, module, code):
    config = Config(synthetic_images=10_000_000, device="cpu", out=tmp_path / "run")
    given = ["train", "--synthetic-images", "10_000_000", "--device", "cpu", "--out", str(config.out)]
    if module.endswith("job"):
        given = [json.dumps(config.as_dict())]
    asked, kept_open = os.pipe()  # a job ends when whoever started it is gone
    source = (
        f"import resource, sys; from {module} import main; "
        "resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30)); sys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", source, *given],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=asked,
        capture_output=True,
        text=True,
        check=False,
    )
    os.close(asked)
    os.close(kept_open)
    assert done.returncode == code
    assert done.stderr.splitlines()[-1].startswith(
        "error: out of memory: take fewer images, workers, or images a batch ("
    )
    assert "Traceback" not in done.stderr
    assert not config.out.exists()


def test_what_an_epoch_leaves_out_and_an_interval_that_no_round_reaches_are_said(tmp_path, capsys):
    # 320 images train: for two workers of 48 three steps, 288 images; two evaluations are three steps apart.
    given = ["--synthetic-images", "400", "--workers", "2", "--batch-size", "48", "--interval", "4", "--epochs", "1"]
    assert main(["train", *given, "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "--interval 4 is longer than the 3 steps between two evaluations, each of which closes a round" in said
    assert "32 images are left out of each epoch: they fill no batch of every worker" in said


def raising(error):
    def app(*_given, **_more):
        raise error

    return app


def test_a_folder_that_may_not_be_entered_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(cli, "app", raising(PermissionError(errno.EACCES, "Permission denied", "/a/b")))
    assert main(["report", "/a"]) == 1
    assert capsys.readouterr().err == "error: /a/b cannot be used: Permission denied\n"


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), OSError(errno.EBADF, "Bad file descriptor")], ids=str
)
def test_a_defect_is_never_hidden(monkeypatch, error):
    monkeypatch.setattr(cli, "app", raising(error))
    with pytest.raises(type(error), match=str(error)[-10:]):
        main(["train"])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is a full disk of Linux")
@pytest.mark.parametrize("unbuffered", [{}, {"PYTHONUNBUFFERED": "1"}], ids=["buffered", "unbuffered"])
def test_a_full_disk_under_standard_output_is_one_line(unbuffered):
    command = [
        sys.executable,
        "-m",
        "fastlocal",
        "plan",
        "--parameters",
        "1e9",
        "--workers",
        "8",
        "--step-seconds",
        "1",
    ]
    # However much of it is kept back until the exit, which would be code 120.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"} | unbuffered
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*command, "--gbps", "1"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            cwd=ROOT,
            env=environment,
        )
    assert done.returncode == 1
    assert done.stderr == "error: standard output or a file cannot be written: No space left on device\n"


def test_without_the_extra_the_command_says_what_to_install():
    code = "import sys; sys.modules['cyclopts'] = None; from fastlocal.__main__ import main; sys.exit(main())"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install 'fastlocal[train]'" in done.stderr
