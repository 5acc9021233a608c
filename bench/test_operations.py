"""pytest-benchmark over the cases of `fastlocal bench`: pytest bench --benchmark-only."""

import pytest
import torch

from fastlocal.bench.cases import Operation, build

SYNCS: tuple[Operation, ...] = ("average", "outer-step")
CASES: list[tuple[Operation, int]] = [
    ("lamb", 1),
    ("lars", 1),
    ("outer-step", 1),
    *((operation, workers) for operation in SYNCS for workers in (2, 4, 8, 16)),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def contenders() -> list[tuple[Operation, int, str]]:
    return [
        (operation, workers, contender.name)
        for operation, workers in CASES
        for contender in build(operation, "lenet", workers, "cpu", 1).contenders
    ]


@pytest.mark.parametrize(("operation", "workers", "contender"), contenders())
def test_operation(benchmark, operation: Operation, workers: int, contender: str) -> None:
    benchmark.group = f"{operation} lenet K={workers}"
    case = build(operation, "lenet", workers, DEVICE, 1)
    call = next(c.calls[0] for c in case.contenders if c.name == contender)

    def run() -> None:
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=9, warmup_rounds=2)
