"""Processes that meet, wait for each other and lose each other: real ones, and a torch without torch.distributed."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from waiting import free_port

from fastlocal import comm
from fastlocal.comm import answer, launch, lent
from fastlocal.comm.answer import within
from fastlocal.comm.group import _bytes_of
from fastlocal.comm.notes import Notes

ROOT = Path(__file__).parent.parent


@pytest.fixture
def store():
    """What torchrun keeps for the processes it starts."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def start(program, port, rank, world, *arguments, **variables):
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        **variables,
    }
    command = [sys.executable, "-c", program, *map(str, arguments)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(command, env=environment, text=True, **pipes)


def finish(process):
    try:
        said, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    lines = said.splitlines(keepends=True)
    return process.returncode, "".join(line for line in lines if not _is_of_gloo(line)), errors


def next_line(process):
    return next((line for line in process.stdout if not _is_of_gloo(line)), "")


def _is_of_gloo(line):
    """Up to PyTorch 2.9 gloo itself prints to the standard output."""
    return line.startswith("[Gloo]")


UNDER_TORCHRUN = {"TORCHELASTIC_USE_AGENT_STORE": "True"}
JOIN = """
import torch
from fastlocal import comm
try:
    comm.join(torch.device("cpu"), timeout=2.0)
except comm.RendezvousError as error:
    print(error)
"""


def test_a_process_that_does_not_come_to_the_rendezvous_is_named(store):
    # Long enough that the two who come meet on a busy machine.
    processes = [start(JOIN.replace("2.0", "8.0"), store.port, rank, 3, **UNDER_TORCHRUN) for rank in (0, 2)]
    for rank, process in zip((0, 2), processes, strict=True):
        _, said, errors = finish(process)
        assert said.startswith(f"rank {rank} of 3 did not meet the others at 127.0.0.1:{store.port} "), errors
        assert said.endswith(" s: rank 1 did not come\n"), said


def test_rank_0_that_does_not_come_to_the_rendezvous_is_named_too(store):
    _, said, errors = finish(start(JOIN, store.port, 1, 2, **UNDER_TORCHRUN))
    assert said.startswith(f"rank 1 of 2 did not meet the others at 127.0.0.1:{store.port} "), errors
    assert said.endswith(" s: rank 0 did not come\n")


def test_what_is_no_group_of_this_process_is_refused():
    devices = [torch.device("cpu")]
    with pytest.raises(ValueError, match="process_group must be one that this process is in: it is not"):
        comm.find_group(torch.distributed.GroupMember.NON_GROUP_MEMBER, 1.0, devices)
    with pytest.raises(TypeError, match="process_group must be a torch.distributed process group, got 'world'"):
        comm.find_group("world", 1.0, devices)


MEET = """
import sys
import torch
from fastlocal import comm
group = comm.join(torch.device("cpu"), timeout=30.0)
noted = comm.was_noted("began")
ranks = group.gather([group.rank + 1.0])
comm.note_for_restarts("began")
print(sum(said[0] for said in ranks), noted, group.timeout, flush=True)
sys.stdin.read()
"""


def test_processes_meet_again_whose_machines_have_counted_other_numbers_of_restarts(store):
    # A machine whose processes did not die themselves is told to start them again, and does not count that.
    for counts, noted in ((("0", "0"), False), (("1", "0"), True)):
        processes = [
            start(MEET, store.port, rank, 2, **UNDER_TORCHRUN, TORCHELASTIC_RESTART_COUNT=count)
            for rank, count in enumerate(counts)
        ]
        said = [next_line(process) for process in processes]
        for process in processes:  # dead before it can tell anybody
            process.kill()
            process.communicate()
        assert said == [f"3.0 {noted} 30.0\n"] * 2


def test_processes_that_no_agent_started_meet_at_the_store_that_rank_0_keeps():
    port = free_port()
    processes = [start(MEET, port, rank, 2) for rank in range(2)]
    said = [next_line(process) for process in processes]
    errors = []
    for process in processes:
        process.kill()
        errors.append(process.communicate()[1])
    assert said == ["3.0 False 30.0\n"] * 2, errors


def test_a_process_that_came_and_is_started_again_before_the_last_one_came_is_met(store, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")

    def meet(rank):
        job = TCPStore(
            "127.0.0.1", store.port, is_master=False, timeout=timedelta(seconds=20), wait_for_workers=False
        )
        return launch._store_of_attempt(job, rank, time.monotonic() + 20).get("fastlocal/came/0")

    with ThreadPoolExecutor(4) as threads:
        first = threads.submit(meet, 0)
        assert threads.submit(meet, 1).result() == b"1"  # dies now
        again = threads.submit(meet, 1)
        assert again.result() == b"1"
        assert not first.done()
        assert threads.submit(meet, 2).result() == b"1"
        assert first.result() == b"1"


def test_a_place_to_meet_that_cannot_be_reached_is_one_line_with_address_and_seconds():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # and does not listen
        port = unused.getsockname()[1]
        _, said, errors = finish(start(JOIN, port, 1, 2))
    assert said.startswith(f"rank 1 of 2 did not meet the others at 127.0.0.1:{port} "), errors
    assert "(MASTER_ADDR and MASTER_PORT) in " in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"MASTER_PORT": "http"}, "MASTER_PORT must be a number from 0 to 65535, got 'http'"),
        ({"RANK": "2"}, "RANK must be a number from 0 to 1, got '2'"),
        ({"RANK": None}, "WORLD_SIZE is 2 but RANK is not set: start with torchrun"),
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE must be a whole number of at least 1, got 'x'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE must be a whole number of at least 1, got '0'"),
    ],
)
def test_an_environment_that_torchrun_would_not_make_is_refused(monkeypatch, changed, message):
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1", **changed}.items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        comm.join(torch.device("cpu"))


@pytest.mark.parametrize("size", [1, 15, 24, 5000])
def test_bytes_that_came_by_another_device_are_read_before_their_copy_is_let_go_of(size):
    class Far(torch.Tensor):
        """Its .cpu() is a copy, as that of a tensor on CUDA, which nobody holds."""

        def cpu(self, memory_format=torch.preserve_format):
            return torch.Tensor.clone(self)

    sent = bytes(range(1, 252)) * 20
    message = torch.frombuffer(bytearray(sent), dtype=torch.uint8).as_subclass(Far)
    assert _bytes_of(message[:size], size) == sent[:size]


TURN = """
import sys, time
import torch
from fastlocal import comm
from fastlocal.comm import turn

turn._SILENT_SECONDS = 3.0
group = comm.join(torch.device("cpu"), timeout=10.0)
group.timeout = 2.0

def work():
    print("at work", flush=True)
    time.sleep(float(sys.argv[1]))
    return "done"

group.arrive("fetch the images", 7)
try:
    print(group.broadcast_object(group.by_one(0, work), source=0))
except comm.LostRankError as error:
    print(error)
else:
    comm.leave()
"""


def test_work_of_one_process_may_take_longer_than_any_timeout(store):
    processes = [start(TURN, store.port, rank, 2, 5.0, **UNDER_TORCHRUN) for rank in range(2)]
    said = [finish(process)[1] for process in processes]
    assert said == ["at work\ndone\n", "done\n"]


def test_a_process_that_is_killed_at_work_alone_is_named_soon(store):
    first, second = (start(TURN, store.port, rank, 2, 100.0, **UNDER_TORCHRUN) for rank in range(2))
    assert next_line(first) == "at work\n", first.communicate()[1]
    os.kill(first.pid, signal.SIGKILL)
    killed = time.monotonic()
    _, said, errors = finish(second)
    finish(first)
    assert (
        "s to fetch the images at local step 7: rank 0, at work alone, has given no sign of life for 3 s" in said
    ), errors
    assert time.monotonic() - killed < 20


STORE_STOPS = """
import os, signal, time
import torch
from torch import distributed as dist, nn
from fastlocal import LocalSGD, comm

dist.init_process_group("gloo")
model = nn.Linear(4, 2)
optimizer = LocalSGD(torch.optim.SGD(model.parameters(), lr=0.1), model, 2, timeout=60.0)
for step in range(4):
    if step == 3:
        optimizer._group.timeout = 2.0
        print("at step 3", flush=True)
        if dist.get_rank() == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
    try:
        optimizer.step()
    except comm.LostRankError as error:
        print(error, flush=True)
        began = time.monotonic()
        try:
            optimizer.sync()
        except comm.LostRankError:
            print("again" if time.monotonic() - began < 1 else "late", flush=True)
"""


def test_a_process_whose_store_is_stopped_says_so_and_ends():
    port = free_port()
    first, second = (start(STORE_STOPS, port, rank, 2) for rank in range(2))
    try:
        assert next_line(second) == "at step 3\n", second.communicate()[1]
        began = time.monotonic()
        code, said, errors = finish(second)
        assert "close a round at local step 4, and torch.distributed's store no longer answers" in said, errors
        assert said.endswith("(rank 0, or torchrun) has ended or is stopped\nagain\n")
        assert code == 0
        assert time.monotonic() - began < 60  # 2 s for the message, 2 for the notes and 5 for the answer, at rest
    finally:
        first.kill()
        finish(first)


def test_what_a_call_within_a_time_returns_and_raises_is_its_own_and_a_longer_one_is_an_error():
    assert within(10.0, lambda: 7) == 7
    with pytest.raises(KeyError, match="x"):
        within(10.0, lambda: {}["x"])
    held = threading.Event()
    with pytest.raises(RuntimeError, match=r"no answer within 0\.01 s"):
        within(0.01, held.wait)
    with pytest.raises(RuntimeError, match="an earlier call has had no answer yet"):
        within(10.0, lambda: 7)
    held.set()
    answer._unanswered.pop().join()
    assert within(10.0, lambda: 7) == 7


STALLED = """
import time
import torch
from fastlocal import comm

group = comm.join(torch.device("cpu"), timeout=100.0)
group.timeout = 1.0
group.arrive("close a round", 3)
if group.rank == 1:
    print("stalls", flush=True)
    time.sleep(60.0)
try:
    group.gather([1.0])
except comm.LostRankError as error:
    print(error, flush=True)
"""


def test_a_process_whose_group_is_broken_ends_before_the_one_it_waited_for(store):
    first, second = (start(STALLED, store.port, rank, 2, **UNDER_TORCHRUN) for rank in range(2))
    assert next_line(second) == "stalls\n", second.communicate()[1]
    said = next_line(first)
    assert "s to close a round at local step 3: rank 1 " in said
    began = time.monotonic()
    finish(first)
    assert time.monotonic() - began < 15  # gloo's own thread would wait for 100 s, or until rank 1 wakes
    second.kill()
    finish(second)


def test_a_process_that_comes_a_little_late_is_not_named_for_one_that_has_ended(store):
    first, second, third = (Notes(store, rank, [4, 5, 6]) for rank in range(3))
    first.arrive(7)
    third.arrive(7)
    assert first.find_missing(late=True, grace_seconds=0.1) == "rank 5 has not arrived (never seen)"

    def come_and_fail():
        second.arrive(7)
        second.find_missing(late=False, grace_seconds=0.0)

    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(first.find_missing, late=False, grace_seconds=0.5)
        time.sleep(0.15)
        come_and_fail()
        assert asked.result() == "rank 6 arrived and fell silent"


def test_a_process_that_waits_on_is_not_named_and_one_that_has_ceased_to_is(store):
    first, second = (Notes(store, rank, [4, 5]) for rank in range(2))
    first.arrive(7)
    second.arrive(7)
    with second.waiting():
        assert first.find_missing(late=False, grace_seconds=1.5) is None
    assert first.find_missing(late=False, grace_seconds=0.3) == "rank 5 arrived and fell silent"


def test_a_process_that_has_gone_on_to_the_next_point_is_not_named(store):
    first, second = (Notes(store, rank, [4, 5]) for rank in range(2))
    first.arrive(7)
    second.arrive(7)
    second.arrive(8)  # as the source of a broadcast, which waits for nobody
    with second.waiting():
        assert first.find_missing(late=True, grace_seconds=1.5) is None


def test_a_failure_before_is_none_at_the_next_point(store):
    first, second = (Notes(store, rank, [4, 5]) for rank in range(2))
    for notes in (first, second):
        notes.arrive(7)
        notes.find_missing(late=False, grace_seconds=0.0)
    for notes in (first, second):
        notes.arrive(8)
    assert first.find_missing(late=False, grace_seconds=0.1) == "rank 5 arrived and fell silent"


def test_tensors_that_were_let_go_of_are_forgotten_and_one_that_is_held_is_waited_for_a_while_only():
    for _ in range(50):
        lent.lent(torch.zeros(1))
    held = lent.lent(torch.zeros(1))
    assert len(lent._lent) <= 2
    began = time.monotonic()
    within(20.0, lent.wait_for_all)
    assert 0.5 < time.monotonic() - began < 20
    assert held.item() == 0.0


# By gloo, but waited for as for NCCL, which is asked again and again whether it is done.
POLLED = STALLED.replace(
    'group.arrive("close',
    """group._by_nccl = lambda device: True
print(group.gather([group.rank, 0.5]), group.broadcast_object([1], 1), flush=True)
group.arrive("close""",
)


def test_a_message_by_nccl_is_given_up_before_the_watchdog_would_end_the_process(store):
    first, second = (start(POLLED, store.port, rank, 2, **UNDER_TORCHRUN) for rank in range(2))
    for process in (first, second):
        assert next_line(process) == "[[0.0, 0.5], [1.0, 0.5]] [1]\n", process.communicate()[1]
    assert next_line(second) == "stalls\n", second.communicate()[1]
    began = time.monotonic()
    assert "s to close a round at local step 3: rank 1 " in next_line(first)
    assert time.monotonic() - began < 15  # of the 31 s that the transfer may take
    for process in (second, first):
        process.kill()
        finish(process)


# What a torch built with USE_DISTRIBUTED=0 lacks is taken from torch._C before the rest of torch looks for it.
WITHOUT_DISTRIBUTED = """
import importlib.abc
import importlib.machinery
import os
import sys


class Without(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != "torch._C":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            for entry in ("_c10d_init", "_rpc_init", "_dist_autograd_init", "_faulty_agent_init"):
                if hasattr(module, entry):
                    delattr(module, entry)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Without())
import torch

assert not torch.distributed.is_available()
import fastlocal
from fastlocal import comm

team = fastlocal.Workers(torch.nn.ParameterList([torch.zeros(1)]), 2)
optimizer = fastlocal.SlowMo(fastlocal.LAMB(team.parameters(), lr=1.0), team, 1, warmup_steps=1)
for _ in range(2):
    team[0][0].grad, team[1][0].grad = torch.tensor([1.0]), torch.tensor([3.0])
    optimizer.step()
optimizer.load_state_dict(optimizer.state_dict())
print("rounds", optimizer.stats.rounds)
inner = torch.optim.SGD(team.parameters(), lr=1.0)
try:
    fastlocal.LocalSGD(inner, team, 1, process_group="world")
except RuntimeError as error:
    print(error)
os.environ["WORLD_SIZE"] = "2"
try:
    comm.join(torch.device("cpu"))
except ValueError as error:
    print(error)
del os.environ["WORLD_SIZE"]
from fastlocal.train.cli import main

train = "train --epochs 1 --workers 2 --batch-size 8 --synthetic-images 60 --device cpu"
print("exit code", main([*train.split(), "--out", sys.argv[1]]))
"""


def test_one_process_needs_no_torch_distributed_and_several_say_what_they_lack(tmp_path):
    command = [sys.executable, "-c", WITHOUT_DISTRIBUTED, str(tmp_path / "run")]
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    lines = done.stdout.splitlines()
    assert "rounds 2" in lines, done.stderr
    assert "process_group was given, but this torch was built without torch.distributed" in lines
    assert "WORLD_SIZE is 2, but this torch was built without torch.distributed: start one" in lines
    assert lines[-1] == "exit code 0"
    assert (tmp_path / "run" / "summary.json").exists()


HOLDS = """
import torch
from fastlocal import comm
from fastlocal.comm import lent

def held():
    return sum(reference() is not None for reference in lent._lent)

group = comm.join(torch.device("cpu"))
group.arrive("add up", 0)
total = torch.zeros(5)
at_once, after_waiting = 0, 0
for _ in range(300):
    group.gather([1.0, 2.0])
    group.reduce_(total.fill_(1.0), "sum")
    group.broadcast_(total, 0)
    assert total.tolist() == [2.0] * 5
    at_once += held() > 0
    lent.wait_for_all()
    after_waiting += held()
print("held", at_once, after_waiting, flush=True)
comm.leave()
"""


def test_a_process_can_wait_until_gloo_holds_none_of_its_tensors(store):
    both = [start(HOLDS, store.port, rank, 2, **UNDER_TORCHRUN) for rank in (0, 1)]
    held = []
    for code, said, errors in map(finish, both):
        assert code == 0, errors
        held.append([int(number) for number in said.split()[1:]])
    assert all(after_waiting == 0 for _, after_waiting in held)
    if not any(at_once for at_once, _ in held):
        pytest.skip("gloo let go at once in 600 collectives: there was nothing to wait for")


ENDS_IN_OVERLAP = """
import torch
from torch import nn
from fastlocal import SlowMo, comm

def main():
    comm.join(torch.device("cpu"))
    model = nn.Linear(20_000, 1000, bias=False)
    optimizer = SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model, 1, overlap_steps=1, timeout=20.0)
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    assert optimizer._sending is not None

main()
"""


def test_a_process_that_ends_while_a_sync_is_under_way_ends_in_order(store):
    options = {**UNDER_TORCHRUN, "PYTHONWARNINGS": "ignore:all processes have the same gradients"}
    both = [start(ENDS_IN_OVERLAP, store.port, rank, 2, **options) for rank in (0, 1)]
    for code, _, errors in map(finish, both):
        assert code == 0, errors
