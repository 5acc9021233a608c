"""GB/s of each averaging kernel against a copy in the same run, by block size and warps; the winner as JSON.

    python bench/roofline.py [--out roofline.json] [--parameters 100000000] [--workers 1 8]

Needs a CUDA device, torch, triton and a checkout. Each configuration is timed with its kernel compiled, in turn
with the copy; buffers are far larger than the L2 cache. No kernel is autotuned in the library, since it writes what
it reads: the constants in kernels/average.py are set by hand from this file.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fastlocal.kernels import average as kernels
from fastlocal.kernels import slowmo

BLOCKS = (512, 1024, 2048)
WARPS = (4, 8)  # a configuration compiles for about a second
TURNS = 15


def seconds(call: Callable[[], object]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


class Buffers:
    """What a sync of K rows reads and writes."""

    def __init__(self, k: int, n: int, dtype: torch.dtype) -> None:
        self.k, self.n = k, n
        self.rows = torch.randn(k, n, device="cuda").to(dtype)
        self.anchor, self.slow = torch.randn(n, device="cuda"), torch.zeros(n, device="cuda")
        self.weights = torch.ones(k, device="cuda")
        self.parts = torch.empty(k, -(-n // min(BLOCKS)), device="cuda")
        self.finite = torch.ones(k, dtype=torch.int8, device="cuda")


def launches(b: Buffers, block: int, warps: int) -> dict[str, tuple[Callable[[], object], int]]:
    """By kernel: a launch at these constants, and its bytes a column."""
    size, programs = b.rows.element_size(), -(-b.n // block)
    average: Any = kernels._average_kernel
    outer_step: Any = slowmo._outer_step_kernel
    finite_rows: Any = kernels._finite_rows_kernel
    constants = {"BLOCK": block, "num_warps": warps}
    rows = (b.rows, b.rows.stride(0))
    parts = (b.parts, b.parts.stride(0), b.n)
    return {
        "average": (
            lambda: average[(programs,)](*rows, b.weights, *parts, K=b.k, **constants),
            2 * size * b.k,
        ),
        "outer_step": (
            lambda: outer_step[(programs,)](
                *rows, b.anchor, b.slow, b.weights, *parts, 0.0, 1.0, 0.9, 1.0, K=b.k, **constants
            ),
            2 * size * b.k + 16,
        ),
        "finite_rows": (
            lambda: finite_rows[(programs, b.k)](*rows, b.finite, b.n, **constants),
            size * b.k,
        ),
    }


def measure(b: Buffers) -> tuple[float, dict[tuple[str, int, int], float]]:
    """Bytes a second of a copy, and of each (kernel, block, warps)."""
    source, target = torch.empty(2, 2**28, device="cuda").unbind()
    calls = {
        (name, block, warps): launch
        for block in BLOCKS
        for warps in WARPS
        for name, launch in launches(b, block, warps).items()
    }
    copies: list[float] = []
    times: dict[tuple[str, int, int], list[float]] = {key: [] for key in calls}
    for call, _ in calls.values():
        call()  # compile
    torch.cuda.synchronize()
    for _ in range(TURNS):
        copies.append(seconds(lambda: target.copy_(source)))
        for key, (call, _) in calls.items():
            times[key].append(seconds(call))
    rates = {key: calls[key][1] * b.n / statistics.median(times[key]) for key in calls}
    return 2 * source.nbytes / statistics.median(copies), rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("roofline.json"))
    parser.add_argument("--parameters", type=int, default=100_000_000)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 8])
    given = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device")
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        for k in given.workers:
            copy, rates = measure(Buffers(k, given.parameters // 16 * 16, dtype))
            for kernel in ("average", "outer_step", "finite_rows"):
                mine = {key: rate for key, rate in rates.items() if key[0] == kernel}
                for (_, block, warps), rate in sorted(mine.items(), key=lambda item: -item[1]):
                    share = f"{rate / 1e9:7.0f} GB/s {100 * rate / copy:6.1f} % of copy"
                    print(f"{kernel:12} K={k} {str(dtype)[6:]:9} BLOCK {block:5} warps {warps:2} {share}", flush=True)
                _, block, warps = max(mine, key=lambda key: mine[key])
                ours = mine[kernel, kernels.BLOCK, kernels.NUM_WARPS]
                best = mine[kernel, block, warps]
                found.append(
                    {"kernel": kernel, "workers": k, "dtype": str(dtype)[6:], "block": block, "num_warps": warps}
                    | {"bytes_a_second": best, "share_of_copy": best / copy, "as_shipped": ours / copy}
                )
            torch.cuda.empty_cache()
    result = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "parameters": given.parameters,
        "shipped": {"block": kernels.BLOCK, "num_warps": kernels.NUM_WARPS},
        "winners": found,
    }
    given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
