"""Which cases are run, and the row that each contender yields."""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from fastlocal.bench import machine
from fastlocal.bench.cases import OPERATIONS, OURS, Case, Contender, Operation, build, bytes_held, bytes_needed, named
from fastlocal.bench.count import count
from fastlocal.bench.measure import COPY, Timing, measure
from fastlocal.bench.shapes import SHAPES

_SHARE = 0.8
"""Of the free memory, what a case may take."""

WORKERS = (1, 2, 4, 8, 16)
FEW_WORKERS = (1, 2, 4)  # of a model that takes seconds: more do not fit into minutes, nor into 16 GB


@dataclass(frozen=True)
class Measurement:
    """A contender's result. Times are seconds, from `turns` turns."""

    operation: str
    size: str
    workers: int
    contender: str
    tensors: int
    parameters: int
    dtype: str
    seconds_p20: float
    seconds_p50: float
    seconds_p80: float
    seconds_first: float
    ratio: float
    """Times as long as fastlocal takes: the median over turns."""
    bytes_a_parameter: float
    """For fastlocal, what has to move to and from memory; for a peer, what its operations read and write."""
    launches: int | None
    """PyTorch operations that run a kernel; None where Triton kernels run, which are not counted here."""
    share_of_copy: float
    """Bytes a second by those of a copy in the same turns."""
    host_bound: float
    """The share of turns in which a GPU may have waited for the host: its time is then the host's too."""
    turns: int
    sets: int
    """Sets of tensors that the turns rotate over."""
    rotated_bytes: int
    cache_bytes: int
    """A rotation larger than the cache finds its tensors in memory, a smaller one in the cache."""
    missing: tuple[str, ...]
    device: str
    threads: int
    versions: dict[str, str]
    commit: str | None
    date: str


@dataclass(frozen=True, kw_only=True)
class BenchPlan:
    """What to measure.

    Args:
        operation: one operation only.
        size: one model's shapes only.
        quick: the small sizes, two and eight workers.
        device: "cpu" or "cuda".
        compiled: add a compiled peer to the optimizers.
    """

    operation: Operation | None = None
    size: str | None = None
    quick: bool = False
    device: str = "cpu"
    compiled: bool = False

    def __post_init__(self) -> None:
        if self.operation is not None and self.operation not in OPERATIONS:
            raise ValueError(f"operation must be one of {', '.join(OPERATIONS)}, got {self.operation!r}")
        if self.size is not None and self.size not in SHAPES:
            raise ValueError(f"size must be one of {', '.join(SHAPES)}, got {self.size!r}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device must be 'cpu' here: there is no CUDA device")

    def cases(self) -> Iterator[tuple[Operation, str, int]]:
        """(operation, size, workers) of each case."""
        for operation in OPERATIONS if self.operation is None else (self.operation,):
            optimizer = operation in ("lamb", "lars")
            sizes = ("lenet", "resnet50") if optimizer else ("lenet", "resnet18", "bert-base")
            if self.quick:
                sizes = sizes[:1]
            for size in sizes if self.size is None else (self.size,):
                if optimizer:
                    yield operation, size, 1
                    continue
                for workers in (2, 8) if self.quick else FEW_WORKERS if size.startswith("bert") else WORKERS:
                    if (operation, workers) != ("average", 1):  # one row is its own mean
                        yield operation, size, workers


def run(
    plan: BenchPlan, show: Callable[[Case, list[Measurement]], None], note: Callable[[str], None]
) -> list[Measurement]:
    """Measure every case of the plan; `show` gets each with its rows, `note` what is left out and why."""
    found: list[Measurement] = []
    for operation, size, workers in plan.cases():
        free, cache = machine.free_bytes(plan.device), machine.cache_bytes(plan.device)
        held = bytes_held(operation, size, workers)
        most = min(1 + math.ceil(2 * cache / held), 8)
        fitting = [n for n in range(1, most + 1) if bytes_needed(operation, size, workers, n) <= _SHARE * free]
        if not fitting:
            gigabytes = (
                f"{bytes_needed(operation, size, workers, 1) / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free"
            )
            note(f"{named(operation, size, workers)}: left out, it needs {gigabytes}")
            continue
        sets = fitting[-1]
        case = build(operation, size, workers, plan.device, sets, plan.compiled)
        rows = _rows(case, plan, held, cache)
        show(case, rows)
        found += rows
    return found


def ahead(rows: list[Measurement]) -> list[str]:
    """Where somebody is faster than fastlocal, and by how much: a line each."""
    return [
        f"ahead of fastlocal: {row.contender} in {named(row.operation, row.size, row.workers)}: "
        f"{row.ratio:.2f} of its time"
        for row in rows
        if row.ratio < 1 and row.contender != COPY and not row.contender.startswith(OURS)
    ]


def host_bound(rows: list[Measurement]) -> list[str]:
    """Whose times may not be the device's alone: a line each."""
    return [
        f"may have waited for the host: {row.contender} in {named(row.operation, row.size, row.workers)}, "
        f"in {row.host_bound:.0%} of the turns"
        for row in rows
        if row.host_bound
    ]


def require_writable(file: Path) -> None:
    """Make the file and its folder, so that nothing is measured in vain.

    Raises:
        ValueError: lines cannot be appended to it.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.open("a").close()
    except OSError as error:
        raise ValueError(f"out {file} cannot be written: {error.strerror}") from None


def append(rows: list[Measurement], file: Path) -> None:
    """One JSON line a row."""
    machine.append_rows(file, *map(asdict, rows))


def _rows(case: Case, plan: BenchPlan, held: int, cache: int) -> list[Measurement]:
    timings = measure(case, plan.device)
    copy_rate = 8 * case.parameters / timings[COPY].p50
    copy = Contender(COPY, [lambda: None], 8.0)
    return [
        _row(case, plan, contender, timings[contender.name], copy_rate, held, cache)
        for contender in [*case.contenders, copy]
    ]


def _row(
    case: Case, plan: BenchPlan, contender: Contender, timing: Timing, copy_rate: float, held: int, cache: int
) -> Measurement:
    traffic = count(contender.calls[0])
    moved = contender.bytes_a_parameter
    if moved is None:
        moved = round(traffic.bytes_moved / case.parameters, 2)
    sets = len(case.contenders[0].calls)
    runs_triton = contender.name.startswith(OURS) and plan.device == "cuda"
    return Measurement(
        operation=case.operation,
        size=case.size,
        workers=case.workers,
        contender=contender.name,
        tensors=case.tensors,
        parameters=case.parameters,
        dtype="float32",
        seconds_p20=timing.p20,
        seconds_p50=timing.p50,
        seconds_p80=timing.p80,
        seconds_first=timing.first,
        ratio=timing.ratio,
        bytes_a_parameter=moved,
        launches=1 if contender.name == COPY else None if runs_triton else traffic.launches,
        share_of_copy=moved * case.parameters / timing.p50 / copy_rate,
        host_bound=timing.host_bound,
        turns=timing.turns,
        sets=sets,
        rotated_bytes=held * (len(case.contenders) if case.operation in ("lamb", "lars") else sets),
        cache_bytes=cache,
        missing=tuple(case.missing),
        **machine.origin(plan.device),
    )
