"""Seconds of each operation of ours, and what it moves: asv run, asv compare, asv publish."""

from fastlocal.bench.cases import Operation, build
from fastlocal.bench.count import count


class Optimizer:
    """One step of all tensors of a model."""

    params = (("lamb", "lars"), ("lenet", "resnet50"))
    param_names = ("operation", "size")

    def setup(self, operation: Operation, size: str) -> None:
        self.step = build(operation, size, 1, "cpu", 1).contenders[0].calls[0]
        self.step()  # makes the state

    def time_step(self, operation: Operation, size: str) -> None:
        self.step()


class Sync:
    """One sync of K workers' rows."""

    params = (("average", "outer-step"), ("lenet", "resnet18"), (2, 4, 8, 16))
    param_names = ("operation", "size", "workers")

    def setup(self, operation: Operation, size: str, workers: int) -> None:
        self.sync = build(operation, size, workers, "cpu", 1).contenders[0].calls[0]

    def time_sync(self, operation: Operation, size: str, workers: int) -> None:
        self.sync()

    def track_bytes(self, operation: Operation, size: str, workers: int) -> int:
        """Bytes that the operations read and write, blocks in the cache included."""
        return count(self.sync).bytes_moved

    track_bytes.unit = "bytes"  # type: ignore[attr-defined]
