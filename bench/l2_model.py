"""How many bytes of LAMB and LARS reach a GPU's memory, by a model of its L2 cache. Nothing is measured.

    python bench/l2_model.py [--out l2_model.jsonl]

The model is least recently used, write-back, and of whole chunks, in the order in which the kernels' programs begin:
one launch a phase, the second backwards; or both in one launch, in the order of `queue_of` with a lag of so many
chunks. On a device programs overlap, and other data passes through the cache as well: what that makes of it,
bench/roofline.py measures.
"""

import argparse
import sys
from collections import OrderedDict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fastlocal.bench import machine
from fastlocal.bench.shapes import SHAPES
from fastlocal.kernels.trust_ratio_common import CHUNK
from fastlocal.kernels.trust_ratio_queue import queue_of

# What a phase accesses, and whether it writes it.
PHASES = {
    "lamb": ({"p": False, "g": False, "m": True, "v": True}, {"p": True, "m": False, "v": False}),
    "lars": ({"p": False, "g": False}, {"p": True, "g": False, "b": True}),
}
SIZES = ("resnet50", "bert-base", "bert-large")
MEGABYTES = (25, 40)  # of the 50 that an H100 has
LAGS = (None, 0, 64, 192)


class Cache:
    """Least recently used, write-back; `moved` counts the bytes between it and memory."""

    def __init__(self, capacity: float) -> None:
        self.capacity, self.held, self.moved = capacity, 0, 0
        self.lines: OrderedDict[tuple[str, int], tuple[int, bool]] = OrderedDict()  # bytes, and whether written

    def touch(self, key: tuple[str, int], num_bytes: int, writes: bool) -> None:
        known = self.lines.pop(key, None)
        if known is None:
            self.moved += num_bytes
            self.held += num_bytes
        self.lines[key] = num_bytes, writes or (known is not None and known[1])
        while self.held > self.capacity:
            self.drop()

    def drop(self) -> None:
        _, (num_bytes, written) = self.lines.popitem(last=False)
        self.held -= num_bytes
        self.moved += num_bytes * written


def bytes_a_parameter(optimizer: str, sizes: list[int], megabytes: float, lag: int | None) -> float:
    counts = torch.tensor([-(-size // CHUNK) for size in sizes])
    lengths = [min(CHUNK, size - start) for size in sizes for start in range(0, size, CHUNK)]
    chunks = range(len(lengths))
    order = [*chunks, *(-1 - c for c in reversed(chunks))] if lag is None else queue_of(counts, lag).tolist()
    cache = Cache(megabytes * 1e6)
    for entry in order:
        chunk = entry if entry >= 0 else -1 - entry
        for tensor, writes in PHASES[optimizer][entry < 0].items():
            cache.touch((tensor, chunk), 4 * lengths[chunk], writes)
    while cache.lines:
        cache.drop()
    return cache.moved / sum(sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    for size in SIZES:
        sizes = [torch.Size(shape).numel() for shape in SHAPES[size]()]
        for optimizer in PHASES:
            for megabytes in MEGABYTES:
                row = {"size": size, "optimizer": optimizer, "l2_megabytes": megabytes}
                for lag in LAGS:
                    name = "two_launches" if lag is None else f"one_launch_lag_{lag}"
                    row[name] = round(bytes_a_parameter(optimizer, sizes, megabytes, lag), 1)
                print(row, flush=True)
                machine.append_rows(given.out, row)


if __name__ == "__main__":
    main()
