"""Time the contenders of a case in turn, in one process, beside a copy.

In turn, so that a noisy neighbour hits all of them; ratios are taken within a turn.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fastlocal.bench.cases import OURS, Case

COPY = "copy"
_SECONDS = 4.0
"""Of a case's turns, so that all cases take minutes on two cores; the slowest take longer, for the fewest turns."""
_FEWEST, _MOST = 5, 30

_CYCLES_ASLEEP = 20_000_000
"""About 10 ms at 2 GHz, in which the host issues what a stream can hold, about a thousand launches."""


class Turn(NamedTuple):
    """One call of a contender."""

    seconds: float
    host_bound: bool
    """Whether a GPU may have waited for the host within these seconds, which are then not the device's alone."""


@dataclass(frozen=True)
class Timing:
    """Seconds of a contender's turns; `ratio` is the median over turns of its seconds by ours."""

    p20: float
    p50: float
    p80: float
    ratio: float
    first: float
    """Seconds of the very first call."""
    host_bound: float
    """Of the turns, the share that was."""
    turns: int


def measure(case: Case, device: str) -> dict[str, Timing]:
    """Timings by contender, with that of a copy of `case.parameters` float32 numbers under COPY.

    Args:
        case: what to time.
        device: "cpu" or "cuda"; on CUDA, events time the device.
    """
    clock = on_device if device == "cuda" else _on_host
    calls = {contender.name: contender.calls for contender in case.contenders}
    calls[COPY] = _copies(case, device)
    turns: dict[str, list[Turn]] = {name: [] for name in calls}

    def take_turn() -> None:
        turn = len(turns[OURS])
        for index, (name, sets) in enumerate(calls.items()):
            turns[name].append(clock(sets[(turn + index) % len(sets)]))

    started = time.perf_counter()
    take_turn()
    warmup = 1
    if time.perf_counter() - started < _SECONDS:
        take_turn()
        warmup = 2
    started = time.perf_counter()
    for turn in range(_MOST):
        if turn >= _FEWEST and time.perf_counter() - started > _SECONDS:
            break
        take_turn()
    return {name: _timing(all_[warmup:], turns[OURS][warmup:], all_[0].seconds) for name, all_ in turns.items()}


def _timing(turns: list[Turn], ours: list[Turn], first: float) -> Timing:
    seconds = [turn.seconds for turn in turns]
    fifths = statistics.quantiles(seconds, n=5)
    ratio = statistics.median(s / own.seconds for s, own in zip(seconds, ours, strict=True))
    host_bound = sum(turn.host_bound for turn in turns) / len(turns)
    return Timing(fifths[0], statistics.median(seconds), fifths[-1], ratio, first, host_bound, len(turns))


def _copies(case: Case, device: str) -> list[Callable[[], object]]:
    """As many source and target pairs as the contenders have sets."""
    num_sets = len(case.contenders[0].calls)
    pairs = [[torch.ones(case.parameters, device=device) for _ in range(2)] for _ in range(num_sets)]
    return [lambda pair=pair: pair[0].copy_(pair[1]) for pair in pairs]


def _on_host(call: Callable[[], object]) -> Turn:
    started = time.perf_counter()
    call()
    return Turn(time.perf_counter() - started, host_bound=False)


def event_seconds(call: Callable[[], object], cycles_asleep: int = _CYCLES_ASLEEP) -> float:
    """Of a call on the device, as `on_device` has them."""
    return on_device(call, cycles_asleep).seconds


def on_device(call: Callable[[], object], cycles_asleep: int = _CYCLES_ASLEEP) -> Turn:
    """It sleeps until the host has issued everything, as in training it would be busy.

    What a stream cannot hold at once is issued later, and so is what follows a value that is read back.
    """
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    torch.cuda._sleep(cycles_asleep)
    begin.record()
    call()
    end.record()
    host_bound = begin.query()  # it had begun before all was issued
    end.synchronize()
    return Turn(begin.elapsed_time(end) / 1e3, host_bound)
