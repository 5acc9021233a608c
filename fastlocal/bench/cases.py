"""What is compared: for each operation its contenders, ours first, on tensors of a model's shapes.

A case is built for one device and holds everything its contenders read and write. Calling a contender runs the
operation once.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from fastlocal.bench import peers
from fastlocal.bench.installed import installed_optimizers
from fastlocal.bench.shapes import SHAPES, Shapes, num_parameters
from fastlocal.ops import averaging as ops
from fastlocal.optim import LAMB, LARS

Operation = Literal["lamb", "lars", "average", "outer-step"]
OPERATIONS: tuple[Operation, ...] = get_args(Operation)
OURS = "fastlocal"
_DECAY = 0.9  # slow momentum never becomes subnormal within a few hundred steps
_LR = 0.1

Call = Callable[[], object]
MakeOptimizer = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Contender:
    """One way to run an operation.

    Args:
        name: as shown in the table.
        calls: runs the operation once; several if it rotates over sets of tensors that no cache holds together.
        bytes_a_parameter: moved to and from memory if nothing but what was meant to stays in the cache; None to
            have it counted.
    """

    name: str
    calls: list[Call]
    bytes_a_parameter: float | None = None


@dataclass(frozen=True)
class Case:
    """Contenders for one operation at one size; `missing` are peers that are not installed."""

    operation: Operation
    size: str
    workers: int
    tensors: int
    parameters: int
    contenders: list[Contender]
    missing: list[str]


def named(operation: str, size: str, workers: int) -> str:
    """A case in words; an optimizer step has one worker always, which is not said."""
    if operation in ("lamb", "lars"):
        return f"{operation}, {size}"
    return f"{operation}, {size}, {workers} worker{'s' * (workers > 1)}"


def bytes_held(operation: Operation, size: str, workers: int) -> int:
    """Of one set of float32 tensors that a call works on."""
    vectors = {"lamb": 4, "lars": 3, "average": workers, "outer-step": workers + 2}[operation]
    return 4 * vectors * num_parameters(SHAPES[size]())


def bytes_needed(operation: Operation, size: str, workers: int, sets: int) -> int:
    """The most that a case holds at a time: all contenders' tensors, the copies beside them, a peer's temporaries."""
    if operation in ("lamb", "lars"):
        contenders = {"lamb": 5 * 4, "lars": 5 * 3}[operation]  # weights, gradients and moments of each
        vectors = contenders + 2 + 3
    else:
        # Rows, anchor and slow momentum; of peers with one row also x, gradients, momentum, anchor, slow and copies.
        own = workers + 2 if workers > 1 else 3 + 6
        vectors = sets * (own + 2) + max(2 * workers + 2, 8)
    return 4 * vectors * num_parameters(SHAPES[size]())


def build(operation: Operation, size: str, workers: int, device: str, sets: int, compiled: bool = False) -> Case:
    """The case of an operation.

    Args:
        operation: what is measured.
        size: a name in SHAPES.
        workers: rows of an averaging operation; 1 is one row a process, the collective left out.
        device: "cpu" or "cuda".
        sets: of tensors that calls rotate over.
        compiled: add torch.compile of the plain step, which compiles for a minute.
    """
    torch.manual_seed(0)
    shapes = SHAPES[size]()
    if operation in ("lamb", "lars"):
        return _optimizer_case(operation, size, shapes, device, compiled)
    make = {1: _one_row}.get(workers, _rows_average if operation == "average" else _rows_outer_step)
    contenders = make(shapes, workers, device, sets)
    parameters = num_parameters(shapes)
    return Case(operation, size, workers, len(shapes), parameters, contenders, [])


def _numbers(*shape: int, device: str) -> Tensor:
    """Random, from a million at most: drawing gigabytes takes longer than averaging them."""
    drawn = torch.randn(min(2**20, math.prod(shape)), device=device)
    filled = torch.empty(math.prod(shape), device=device)
    for part in filled.split(drawn.numel()):
        part.copy_(drawn[: part.numel()])
    return filled.view(shape)


class _Rows:
    """One set of everything that a sync of K rows reads and writes."""

    def __init__(self, shapes: Shapes, workers: int, device: str) -> None:
        n = -(-num_parameters(shapes) // 16) * 16  # as flat rows are padded
        self.rows = _numbers(workers, n, device=device)
        self.anchor = _numbers(n, device=device)
        self.slow = torch.zeros(n, device=device)
        self.weights = torch.ones(workers, device=device)
        self.parts = torch.empty(workers, ops.num_drift_parts(n), device=device)

    def average(self) -> None:
        ops.average_(self.rows, self.weights, None)

    def average_with_drift(self) -> None:
        ops.average_(self.rows, self.weights, self.parts)

    def outer_step(self) -> None:
        ops.outer_step_(
            self.rows, self.anchor, self.slow, self.weights, None,
            direct=0.0, momentum=1.0, decay=_DECAY, gain=1.0,
        )  # fmt: skip

    def plain_average(self) -> None:
        peers.plain_average_(self.rows)

    def plain_average_with_drift(self) -> None:
        peers.plain_average_with_drift_(self.rows)

    def looped_average(self) -> None:
        peers.looped_average_(self.rows)

    def plain_outer_step(self) -> None:
        peers.plain_outer_step_(self.rows, self.anchor, self.slow, decay=_DECAY)


def _rows_average(shapes: Shapes, workers: int, device: str, sets: int) -> list[Contender]:
    rows = [_Rows(shapes, workers, device) for _ in range(sets)]
    return [
        Contender(OURS, [r.average for r in rows], 8.0 * workers),
        Contender(f"{OURS}, drift", [r.average_with_drift for r in rows], 8.0 * workers),
        Contender("plain PyTorch", [r.plain_average for r in rows]),
        Contender("plain PyTorch, drift", [r.plain_average_with_drift for r in rows]),
        Contender("worker by worker", [r.looped_average for r in rows]),
    ]


def _rows_outer_step(shapes: Shapes, workers: int, device: str, sets: int) -> list[Contender]:
    rows = [_Rows(shapes, workers, device) for _ in range(sets)]
    return [
        Contender(OURS, [r.outer_step for r in rows], 8.0 * workers + 16),
        Contender("plain PyTorch", [r.plain_outer_step for r in rows]),
    ]


class _Tensors:
    """What one process of a peer holds: lists of tensors, and the outer optimizer of DiLoCo."""

    def __init__(self, shapes: Shapes, device: str) -> None:
        self.x: list[Tensor] = [_numbers(*shape, device=device) for shape in shapes]
        self.anchor = [p.clone() for p in self.x]
        self.slow = [torch.zeros_like(p) for p in self.x]
        self.outer = torch.optim.SGD(self.x, lr=0.7, momentum=0.9, nesterov=True, foreach=True)

    def torchdistx(self) -> None:
        peers.torchdistx_slowmo_(self.x, self.anchor, self.slow, lr=_LR, momentum=_DECAY, num_processes=1)

    def fairscale(self) -> None:
        peers.fairscale_slowmo_(self.x, self.anchor, self.slow, lr=_LR, momentum=_DECAY, num_processes=1)

    def torchft(self) -> None:
        peers.torchft_diloco_(self.x, self.anchor, self.outer, num_processes=1)


def _one_row(shapes: Shapes, workers: int, device: str, sets: int) -> list[Contender]:
    rows = [_Rows(shapes, workers, device) for _ in range(sets)]
    tensors = [_Tensors(shapes, device) for _ in range(sets)]
    return [
        Contender(OURS, [r.outer_step for r in rows], 24.0),
        Contender("torchdistx", [t.torchdistx for t in tensors]),
        Contender("fairscale", [t.fairscale for t in tensors]),
        Contender("torchft DiLoCo", [t.torchft for t in tensors]),
    ]


def _optimizer_case(
    operation: Literal["lamb", "lars"], size: str, shapes: Shapes, device: str, compiled: bool
) -> Case:
    makers, floor, missing = _lamb() if operation == "lamb" else _lars()
    if compiled:
        name, make = next((n, m) for n, m in makers.items() if n.startswith("torch") and n.endswith("foreach"))
        makers[f"{name}, compiled"] = make
    contenders = []
    for name, make in makers.items():
        step: Call = make(_parameters(shapes, device)).step
        if name.endswith("compiled"):
            step = torch.compile(step)
        contenders.append(Contender(name, [step], floor if name == OURS else None))
    parameters = num_parameters(shapes)
    return Case(operation, size, 1, len(shapes), parameters, contenders, missing)


def _parameters(shapes: Shapes, device: str) -> list[torch.nn.Parameter]:
    """Weights of a trained network's size, with gradients that stay the same."""
    parameters = [torch.nn.Parameter(0.05 * torch.randn(shape, device=device)) for shape in shapes]
    for p in parameters:
        p.grad = 0.01 * torch.randn_like(p)
    return parameters


def _lamb() -> tuple[dict[str, MakeOptimizer], float, list[str]]:
    makers: dict[str, MakeOptimizer] = {OURS: lambda p: LAMB(p, weight_decay=0.01)}
    peers, missing = installed_optimizers()
    if "timm" in peers:
        lamb = peers["timm"][0]
        makers["timm"] = lambda p: lamb(p, weight_decay=0.01, max_grad_norm=None)
    if "pytorch_optimizer" in peers:
        other = peers["pytorch_optimizer"][0]
        makers["pytorch_optimizer"] = lambda p: other(p, weight_decay=0.01, weight_decouple=False)
    makers["torch AdamW foreach"] = lambda p: torch.optim.AdamW(p, foreach=True)
    makers["torch AdamW fused"] = lambda p: torch.optim.AdamW(p, fused=True)
    return makers, 40.0, missing


def _lars() -> tuple[dict[str, MakeOptimizer], float, list[str]]:
    makers: dict[str, MakeOptimizer] = {OURS: lambda p: LARS(p, lr=0.1, weight_decay=1e-4)}
    peers, missing = installed_optimizers()
    for name, (_, lars) in peers.items():
        makers[name] = lambda p, lars=lars: lars(p, lr=0.1, momentum=0.9, weight_decay=1e-4)
    makers["torch SGD foreach"] = lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True)
    makers["torch SGD fused"] = lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True)
    return makers, 28.0, missing
