"""Runs under torchrun: the same training, whole folders, and processes that are killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

ROOT = Path(__file__).parent.parent
RUN = ["train", "--batch-size", "16", "--synthetic-images", "400"]
FOUR = [*RUN, "--workers", "4", "--epochs", "3"]
METHODS = {"slowmo": ["--method", "slowmo", "--interval", "4", "--overlap-steps", "3"], "sync": ["--method", "sync"]}
TIMES = ("train_seconds", "sync_seconds")


def start(processes, arguments, out, restarts=0):
    command = [sys.executable, "-m"]
    if processes > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command += [f"--max-restarts={restarts}", "-m"]
    return subprocess.Popen(
        [*command, "fastlocal", *arguments, "--out", str(out)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    said, errors = process.communicate(timeout=180)
    return process.returncode, said, errors


def run(processes, arguments, out):
    code, said, errors = finish(start(processes, arguments, out))
    assert code == 0, errors
    return said


def kept(out):
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    records = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    return state, [{k: v for k, v in record.items() if k not in TIMES} for record in records]


def assert_same_run(one, other):
    """Equal to float32 rounding."""
    (state, records), (state2, records2) = kept(one), kept(other)
    for worker, worker2 in zip(state["workers"], state2["workers"], strict=True):
        for name, value in worker.items():
            torch.testing.assert_close(value, worker2[name], rtol=1e-4, atol=1e-5)
    for record, record2 in zip(records, records2, strict=True):
        for name in record:
            if record[name] is None:
                assert record2[name] is None, name
            else:
                assert record[name] == pytest.approx(record2[name], rel=1e-3), name


@pytest.fixture(scope="module")
def in_one_process(tmp_path_factory):
    """The folder of a run with a method, four workers in one process; made once."""
    folder = tmp_path_factory.mktemp("one")

    def made(method):
        if not (folder / method).exists():
            run(1, [*FOUR, *METHODS[method]], folder / method)
        return folder / method

    return made


@pytest.mark.parametrize("method", ["slowmo", "sync"])
def test_four_workers_are_the_same_run_in_one_process_and_in_several(tmp_path, method, in_one_process):
    arguments = [*FOUR, *METHODS[method]]
    one = in_one_process(method)
    processes = {"slowmo": 2, "sync": 4}[method]
    said = run(processes, arguments, tmp_path / "n")
    assert said.count("test accuracy") == 1
    assert f"{processes} processes with {4 // processes} workers each" in said
    assert_same_run(one, tmp_path / "n")
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (one, tmp_path / "n")]
    for name in ("bytes_on_wire", "bytes_synchronous", "rounds", "local_steps", "train_samples"):
        assert summaries[0][name] == summaries[1][name]


def stop_in_the_middle(process, out):
    """Kill everything once a checkpoint lies within an epoch."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (out / "checkpoint.pt").exists():
            break
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    workers_of(process, signal.SIGKILL, everybody=True)
    process.kill()
    process.communicate()


def workers_of(process, number, everybody=False):
    """Send a signal to the last of the processes that torchrun started, or to all."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for child in children if everybody else children[-1:]:
        os.kill(int(child), number)


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
def test_a_run_goes_on_with_its_workers_in_another_number_of_processes(tmp_path, in_one_process):
    arguments = [*FOUR, *METHODS["slowmo"], "--checkpoint-seconds", "0"]
    stop_in_the_middle(start(1, arguments, tmp_path / "moved"), tmp_path / "moved")
    assert "going on after epoch" in run(4, [*arguments, "--resume"], tmp_path / "moved")
    assert_same_run(in_one_process("slowmo"), tmp_path / "moved")


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
def test_a_worker_killed_under_torchrun_is_started_again_and_the_run_ends_with_the_bits_of_one_process(tmp_path):
    arguments = [*RUN, "--workers", "2", "--epochs", "12", *METHODS["slowmo"]]
    run(1, arguments, tmp_path / "straight")
    process = start(2, arguments, tmp_path / "killed", restarts=1)
    while not (tmp_path / "killed" / "checkpoint.pt").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    workers_of(process, signal.SIGKILL)
    code, said, errors = finish(process)
    assert code == 0, errors
    assert "going on after epoch" in said, "the run ended before it could be killed"
    (state, records), (state2, records2) = kept(tmp_path / "straight"), kept(tmp_path / "killed")
    assert records == records2
    for worker, worker2 in zip(state["workers"], state2["workers"], strict=True):
        assert all(torch.equal(worker[name], worker2[name]) for name in worker)


DIES = """
import os, signal, sys
import torch
from torch.nn.modules.module import register_module_forward_hook
from fastlocal.train.cli import main

calls = 0

def die(module, inputs, output):
    global calls
    calls += isinstance(module, torch.nn.parallel.DistributedDataParallel)
    if calls == 6 and os.environ["RANK"] == "1":  # after the forward pass of a step, before its backward pass
        os.kill(os.getpid(), signal.SIGKILL)

register_module_forward_hook(die)
sys.exit(main(sys.argv[1:]))
"""


def test_a_process_lost_in_the_backward_pass_of_synchronous_training_is_one_line(tmp_path):
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": "4",
    }
    arguments = [*RUN, "--workers", "4", "--epochs", "3", *METHODS["sync"], "--out", str(tmp_path / "run")]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", DIES, *arguments],
            env={**environment, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(4)
    ]
    for rank, (code, _, errors) in enumerate(map(finish, processes)):
        if rank == 1:
            assert code == -signal.SIGKILL
            continue
        assert code == 1, errors
        assert "Traceback" not in errors
        (line,) = [line for line in errors.splitlines() if line.startswith("error")]
        assert line.startswith(f"error on rank {rank}: rank {rank} waited ")
        assert " s to average gradients at local step 5: rank 1 arrived and fell silent. A process" in line


DIES_WITH_A_NEW_FOLDER = """
import os, signal, sys
from fastlocal.train import run
from fastlocal.train.cli import main

begin = run._begin

def begin_and_die(*arguments):
    finished = begin(*arguments)
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return finished

run._begin = begin_and_die
sys.exit(main(sys.argv[1:]))
"""


def test_a_process_killed_right_after_it_made_the_folder_is_let_in_again(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(DIES_WITH_A_NEW_FOLDER)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "--max-restarts=1",
    ]
    arguments = [*RUN, "--workers", "2", "--epochs", "1", "--interval", "4", "--out", str(tmp_path / "run")]
    done = subprocess.run(
        [*command, str(script), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "no checkpoint in" in done.stdout
    assert (tmp_path / "run" / "summary.json").exists()


OTHER_ON_RANK_1 = """
import os, sys
from fastlocal.train.cli import main

other = sys.argv[1].split() if os.environ["RANK"] == "1" else []
sys.exit(main(sys.argv[2:] + other))
"""


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ("--lr 0.3", "lr must be the same on all ranks, got 0.3 on rank 1 and None on rank 0"),
        ("--eval-every 2", "eval_every must be the same on all ranks, got 2 on rank 1 and 1 on rank 0"),
        ("--resume", "resume must be the same on all ranks, got True on rank 1 and False on rank 0"),
        ("--method sync", "method must be the same on all ranks, got sync on rank 1 and local-sgd on rank 0"),
    ],
)
def test_processes_with_other_settings_are_told_so_before_anything_is_written(tmp_path, other, said):
    script = tmp_path / "script.py"
    script.write_text(OTHER_ON_RANK_1)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    arguments = [other, *RUN, "--workers", "2", "--epochs", "2", "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [*command, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode != 0
    assert said in done.stderr
    assert "Traceback" not in done.stderr.split("torch/distributed")[0]
    assert not (tmp_path / "out").exists()


def test_a_bad_request_ends_every_process_with_one_line(tmp_path):
    code, _, errors = finish(start(2, [*RUN, "--workers", "3", "--interval", "4"], tmp_path / "out"))
    assert code != 0
    for rank in (0, 1):
        assert f"error on rank {rank}: --workers must be a multiple of the 2 processes, got 3" in errors
    assert not (tmp_path / "out").exists()


def test_a_folder_that_was_refused_is_not_resumed_because_torchrun_tries_again(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    code, _, errors = finish(start(2, [*FOUR, "--interval", "4"], tmp_path, restarts=1))
    assert code != 0
    assert errors.count("holds a run already: add --resume") == 4  # two processes, twice
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
def test_synchronous_training_of_one_worker_a_process_goes_on_so_and_no_other_does(tmp_path):
    arguments = [*RUN, "--workers", "2", "--epochs", "2", *METHODS["sync"]]
    for began, goes_on, said in ((1, 2, "otherwise"), (2, 1, "with one worker a process")):
        out = tmp_path / str(began)
        process = start(began, [*arguments, "--checkpoint-seconds", "0"], out)
        stop_in_the_middle(process, out)
        before = (out / "checkpoint.pt").read_bytes()
        code, _, errors = finish(start(goes_on, [*arguments, "--resume"], out))
        assert code != 0
        assert f"is of synchronous training that began {said}, and goes on only so" in errors
        assert (out / "checkpoint.pt").read_bytes() == before
