"""GB/s of each kernel against a copy in the same run, by block size and warps; the winners as JSON.

    python bench/roofline.py [--out roofline.json] [--adopt] [--parameters 100000000] [--workers 1 8]

Needs a CUDA device, torch, triton and a checkout. Each configuration is timed with its kernel compiled, in turn
with the copy; buffers are far larger than the L2 cache. No kernel is autotuned in the library, since it writes what
it reads: with --adopt the winners are written to kernels/launch.json under the device's name, from where the library
takes them on devices of that name.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fastlocal.bench.measure import event_seconds
from fastlocal.kernels import average, lamb, lars, slowmo
from fastlocal.kernels import launch as constants
from fastlocal.kernels.trust_ratio_common import CHUNK, square_kernel
from fastlocal.kernels.trust_ratio_tables import DTYPES, Bucket, buckets

# Parts of the drift are as wide as a block, so averages have one block size.
ONE_BLOCK = (constants.BLOCK,)
BLOCKS = {"average": ONE_BLOCK, "outer_step": ONE_BLOCK}
OTHER_BLOCKS = (512, 1024, 2048)
WARPS = (4, 8)  # a configuration compiles for about a second
QUEUED = 200_000  # cycles, 0.1 ms: the device waits so long before a timed launch, which is queued by then
TURNS = 12
Launch = Callable[[int, int], object]


def rows_launches(k: int, n: int, dtype: torch.dtype, device: str) -> dict[str, tuple[Launch, int]]:
    """By kernel: its launch at a block size and warps, and the bytes it has to move."""
    kernels: Any = (average._average_kernel, slowmo._outer_step_kernel, average._finite_rows_kernel)
    mean_of_rows, outer_step, finite_rows = kernels
    x = torch.randn(k, n, device=device).to(dtype)
    anchor, slow = torch.randn(n, device=device), torch.zeros(n, device=device)
    weights, finite = torch.ones(k, device=device), torch.ones(k, dtype=torch.int8, device=device)
    parts = torch.empty(k, -(-n // constants.BLOCK), device=device)
    rows, drift = (x, x.stride(0)), (parts, parts.stride(0), x, n)

    def programs(block: int) -> int:
        return -(-n // block)

    return {
        "average": (
            lambda block, warps: mean_of_rows[(programs(block),)](
                *rows, weights, *drift, K=k, HAS_MEAN=False, BLOCK=block, num_warps=warps
            ),
            2 * k * n * x.element_size(),
        ),
        "outer_step": (
            lambda block, warps: outer_step[(programs(block),)](
                *rows, anchor, slow, weights, *drift, 0.0, 1.0, 0.9, 1.0,
                K=k, HAS_MEAN=False, BLOCK=block, num_warps=warps,
            ),
            2 * k * n * x.element_size() + 16 * n,
        ),
        "finite_rows": (
            lambda block, warps: finite_rows[(programs(block), k)](*rows, finite, n, BLOCK=block, num_warps=warps),
            k * n * x.element_size(),
        ),
    }  # fmt: skip


def optimizer_launches(n: int, dtype: torch.dtype, device: str) -> dict[str, tuple[Launch, int]]:
    """The same for the kernels of LAMB and LARS, over tensors of a million elements."""
    tensors = max(1, n // 2**20)
    size = n // tensors // 16 * 16

    def made(of: torch.dtype) -> list[torch.Tensor]:
        return list(torch.full((tensors, size), 0.01, dtype=of, device=device).unbind())

    p, g, m, v = made(dtype), made(dtype), made(torch.float32), made(torch.float32)
    (of_lamb,) = buckets({}, "lamb", (p, g, m, v), (0, 2, 3), None, lambda _: True)
    (of_lars,) = buckets({}, "lars", (p, g, m), (0, 2), None, lambda _: True)
    (of_norm,) = buckets({}, "norm", (g,), (), None, lambda _: True)
    scalar = torch.ones((), device=device)
    partials = of_lamb.float_scratch("partials", of_lamb.num_chunks, 2)
    table = torch.full((tensors, max(lamb.COLUMNS, lars.COLUMNS)), 1e-6, device=device)
    kernels: Any = (lamb.moments_kernel, lamb.weights_kernel, lars.norms_kernel, lars.weights_kernel, square_kernel)
    moments, lamb_weights, norms, lars_weights, square = kernels
    types = {"P_DTYPE": DTYPES[dtype], "G_DTYPE": DTYPES[dtype]}

    def tables(bucket: Bucket) -> tuple[torch.Tensor, ...]:
        return bucket.pointers, bucket.sizes, bucket.chunks

    def common(block: int, warps: int) -> dict[str, Any]:
        return {"ALIGNED": of_lamb.aligned, "CHUNK": CHUNK, "BLOCK": block, "num_warps": warps}

    grid, each, total = (of_lamb.num_chunks,), p[0].element_size(), tensors * size
    return {
        "lamb_moments": (
            lambda block, warps: moments[grid](
                *tables(of_lamb), table, partials, tensors, scalar, 0.9, 0.999, 0.1, 0.001, 1e-6, 0.0, 0.01,
                HAS_FOUND=False, HAS_MASTER=False, **types, **common(block, warps),
            ),
            total * (2 * each + 16),
        ),
        "lamb_weights": (
            lambda block, warps: lamb_weights[grid](
                *tables(of_lamb), table, tensors, scalar, 1e-6, 0.01,
                HAS_FOUND=False, HAS_MASTER=False, P_DTYPE=types["P_DTYPE"], **common(block, warps),
            ),
            total * (2 * each + 8),
        ),
        "lars_norms": (
            lambda block, warps: norms[grid](
                *tables(of_lars), of_lars.adapts, partials, tensors, scalar, scalar, 0.01,
                HAS_FOUND=False, HAS_SCALE=False, JOINT=False, MAXIMIZE=False, MASTER=0, **types,
                **common(block, warps),
            ),
            total * 2 * each,
        ),
        "lars_weights": (
            lambda block, warps: lars_weights[grid](
                *tables(of_lars), table, tensors, scalar, 0.9, 0.01,
                HAS_FOUND=False, HAS_BUFFER=True, NESTEROV=False, MASTER=0, **types, **common(block, warps),
            ),
            total * (3 * each + 8),
        ),
        "square": (
            lambda block, warps: square[grid](
                *tables(of_norm), partials, tensors, ROW=0, G_DTYPE=DTYPES[dtype], **common(block, warps)
            ),
            total * each,
        ),
    }  # fmt: skip


def measure(launches: dict[str, tuple[Launch, int]]) -> tuple[float, dict[tuple[str, int, int], float]]:
    """Bytes a second of a copy, and of each (kernel, block, warps)."""
    source, target = torch.empty(2, 2**28, device="cuda").unbind()
    keys = [(name, b, w) for name in launches for b in BLOCKS.get(name, OTHER_BLOCKS) for w in WARPS]
    calls = [(key, launches[key[0]][0]) for key in keys]
    copies: list[float] = []
    times: dict[tuple[str, int, int], list[float]] = {key: [] for key in keys}
    for (_, block, warps), launch in calls:
        launch(block, warps)  # compile
    torch.cuda.synchronize()
    for _ in range(TURNS):
        copies.append(event_seconds(lambda: target.copy_(source), QUEUED))
        for key, launch in calls:
            times[key].append(event_seconds(lambda launch=launch, key=key: launch(key[1], key[2]), QUEUED))
    rates = {key: launches[key[0]][1] / statistics.median(times[key]) for key in keys}
    return 2 * source.nbytes / statistics.median(copies), rates


def winners(
    launches: dict[str, tuple[Launch, int]], dtype: torch.dtype, rows: int, copy: float, rates: dict
) -> list[dict[str, Any]]:
    """Print every configuration, fastest first; the fastest of each kernel."""
    found = []
    for kernel in launches:
        mine = sorted(((rate, key) for key, rate in rates.items() if key[0] == kernel), reverse=True)
        for rate, (_, block, warps) in mine:
            share = f"{rate / 1e9:7.0f} GB/s {100 * rate / copy:6.1f} % of copy"
            name = f"{kernel:12} K={rows} {str(dtype)[6:]:9}"
            print(f"{name} BLOCK {block:5} warps {warps:2} {share}", flush=True)
        best, (_, block, warps) = mine[0]
        default = rates[kernel, constants.BLOCK, constants.NUM_WARPS]
        found.append(
            {"entry": constants.entry(kernel, dtype, rows), "block": block, "num_warps": warps}
            | {"bytes_a_second": best, "share_of_copy": best / copy, "by_default": default / copy}
        )
    return found


def adopt(device: str, found: list[dict[str, Any]]) -> None:
    """Write the winners to the file that the library reads at its first launch on a device of this name."""
    known = json.loads(constants.MEASURED.read_text())
    known[device] = {row["entry"]: [row["block"], row["num_warps"]] for row in found}
    constants.MEASURED.write_text(json.dumps(known, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("roofline.json"))
    parser.add_argument("--adopt", action="store_true")
    parser.add_argument("--parameters", type=int, default=100_000_000)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--seconds", type=float, default=600.0, help="start no further measurement after this long")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device")
    n, device, started = given.parameters // 16 * 16, torch.cuda.get_device_name(), time.monotonic()
    found: list[dict[str, Any]] = []
    result = {
        "device": device,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "parameters": n,
        "defaults": {"block": constants.BLOCK, "num_warps": constants.NUM_WARPS},
        "winners": found,
    }
    for dtype in (torch.float32, torch.bfloat16):
        for k in (0, *given.workers):  # 0: the optimizers' kernels
            if time.monotonic() - started > given.seconds:
                print(f"out of time: {dtype}, K={k} left out")
                continue
            launches = rows_launches(k, n, dtype, "cuda") if k else optimizer_launches(n, dtype, "cuda")
            found += winners(launches, dtype, max(k, 1), *measure(launches))
            del launches
            torch.cuda.empty_cache()
            given.out.write_text(json.dumps(result, indent=1) + "\n")
            if given.adopt:
                adopt(device, found)


if __name__ == "__main__":
    main()
