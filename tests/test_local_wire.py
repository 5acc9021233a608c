"""wire_dtype: what is sent, what is rounded, and what is refused."""

import copy

import pytest
import torch
from local_runs import make, parameters_of, poison, run

from fastlocal import DiLoCo, LocalSGD, SlowMo
from fastlocal.reference.averaging import rounded_to_float8

DTYPES = [torch.bfloat16, torch.float8_e4m3fn]
ROUND = {torch.bfloat16: lambda values: values.bfloat16().double(), torch.float8_e4m3fn: rounded_to_float8}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [LocalSGD, SlowMo, DiLoCo])
def test_with_a_low_precision_wire_the_outer_step_is_taken_from_the_rounded_progress(kind, dtype):
    optimizer, team = make(kind, workers=3, interval=100, wire_dtype=dtype, weights=[1.0, 2.0, 1.0])
    start = parameters_of(team[0]).double()
    run(optimizer, team, 4)
    sent = [ROUND[dtype](parameters_of(team[k]).double() - start) for k in range(3)]
    progress = ROUND[dtype]((sent[0] + 2 * sent[1] + sent[2]) / 2) / 2
    optimizer.sync()
    step = {LocalSGD: 1.0, SlowMo: 1.0, DiLoCo: 0.7 * 1.9}[kind]  # the first round's momentum is its progress
    for k in range(3):
        torch.testing.assert_close(parameters_of(team[k]).double(), start + step * progress, rtol=0, atol=3e-7)


@pytest.mark.parametrize(("dtype", "share"), [(torch.bfloat16, 2), (torch.float8_e4m3fn, 4)], ids=str)
def test_a_low_precision_wire_sends_a_half_or_a_quarter_of_the_bytes_of_the_parameters_alone(dtype, share):
    optimizer, team = make(LocalSGD, interval=4, buffers="keep", wire_dtype=dtype, warmup_steps=1)
    run(optimizer, team, 9)
    payload = sum(p.numel() * 4 for p in team[0].parameters())
    chunks = -(-payload // 4096) if share == 4 else 0
    assert optimizer.stats.bytes_on_wire == 4 * payload // 3 + 2 * (4 * (payload // share + chunks) // 3)
    assert optimizer.stats.bytes_synchronous == 9 * (4 * payload // 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [LocalSGD, SlowMo])
def test_with_a_low_precision_wire_a_bad_worker_is_healed_and_if_all_are_nothing_is_written(kind, dtype):
    optimizer, team = make(kind, workers=3, interval=100, wire_dtype=dtype)
    run(optimizer, team, 3)
    poison(team[1])
    optimizer.sync()
    assert optimizer.stats.excluded == 1
    assert parameters_of(team).isfinite().all()
    run(optimizer, team, 3, first=3)
    for model in team:
        poison(model)
    before, state = parameters_of(team), copy.deepcopy(optimizer.state_dict()["fastlocal"]["outer"])
    with pytest.raises(RuntimeError, match="no worker's parameters are finite"):
        optimizer.sync()
    assert torch.equal(parameters_of(team).nan_to_num(7), before.nan_to_num(7))
    torch.testing.assert_close(optimizer.state_dict()["fastlocal"]["outer"], state, rtol=0, atol=0)


def test_a_wire_dtype_that_loses_small_steps_is_refused():
    with pytest.raises(
        ValueError, match=r"wire_dtype must be None, torch.bfloat16 or torch.float8_e4m3fn, got torch.float16"
    ):
        make(LocalSGD, wire_dtype=torch.float16)
    with pytest.raises(
        TypeError, match=r"wire_dtype must be None, torch.bfloat16 or torch.float8_e4m3fn, got 'bfloat16'"
    ):
        make(LocalSGD, wire_dtype="bfloat16")


def test_a_lone_worker_sends_nothing_so_nothing_of_it_is_rounded():
    results = []
    for wire_dtype in (None, *DTYPES):
        optimizer, team = make(DiLoCo, workers=1, interval=2, wire_dtype=wire_dtype)
        run(optimizer, team, 5)
        results.append(parameters_of(team))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_with_a_low_precision_wire_each_round_sends_the_progress_since_the_last_one(dtype):
    optimizer, team = make(LocalSGD, workers=2, interval=100, wire_dtype=dtype)
    for first in (0, 4):
        start = parameters_of(team[0]).double()
        run(optimizer, team, 4, first=first)
        sent = [ROUND[dtype](parameters_of(model).double() - start) for model in team]
        optimizer.sync()
        mean = start + ROUND[dtype](sent[0] + sent[1]) / 2
        torch.testing.assert_close(parameters_of(team[1]).double(), mean, rtol=0, atol=3e-7)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_what_is_sent_does_not_depend_on_the_implementation(impl):
    plain, team = make(SlowMo, interval=3, wire_dtype=torch.bfloat16)
    other, same = make(SlowMo, interval=3, wire_dtype=torch.bfloat16, impl=impl)
    for optimizer, workers in ((plain, team), (other, same)):
        run(optimizer, workers, 6)
    torch.testing.assert_close(parameters_of(same[0]), parameters_of(team[0]), rtol=1e-6, atol=1e-7)
    assert other.stats.bytes_on_wire == plain.stats.bytes_on_wire
