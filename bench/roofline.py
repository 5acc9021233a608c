"""GB/s of each kernel against a copy in the same run, by block size and warps; the winners as JSON.

    python bench/roofline.py [--out roofline.json] [--adopt] [--parameters 100000000] [--workers 1 8]

Needs a CUDA device, torch, triton and a checkout. Each configuration is timed with its kernel compiled, in turn
with the copy; buffers are far larger than the L2 cache. No kernel is autotuned in the library, since it writes what
it reads: with --adopt the winners are written to kernels/launch.json under the device's name, from where the library
takes them on devices of that name. LAMB and LARS take a step in one launch there if that is faster than two phases.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fastlocal.bench.measure import event_seconds
from fastlocal.bench.shapes import SHAPES
from fastlocal.kernels import average, lamb, lars, slowmo
from fastlocal.kernels import launch as constants
from fastlocal.kernels.trust_ratio_common import CHUNK, square_kernel
from fastlocal.kernels.trust_ratio_tables import DTYPES, Bucket, buckets

WARPS = (4, 8)  # a configuration compiles for about a second
# Parts of the drift are as wide as a block, so averages have one block size.
ONE_BLOCK = [(constants.BLOCK, warps) for warps in WARPS]
LAGS = [(constants.BLOCK, warps, lag) for warps in WARPS for lag in (0, 64, 192)]
CONFIGURATIONS: dict[str, list[tuple[int, ...]]] = {
    "average": ONE_BLOCK,
    "outer_step": ONE_BLOCK,
    "lamb_step": LAGS,
    "lars_step": LAGS,
}
OTHERS = [(block, warps) for block in (512, 1024, 2048) for warps in WARPS]
DTYPES_MEASURED = (torch.float32, torch.bfloat16)
GAIN = 0.97  # what a step in one launch may take of the time of its phases
PHASES = {"lamb_step": ("lamb_moments", "lamb_weights"), "lars_step": ("lars_norms", "lars_weights")}
QUEUED = 2_000_000  # cycles, 1 ms: the device waits so long before a timed launch, which is queued by then
TURNS = 12
Launch = Callable[..., object]  # given a configuration
Key = tuple[str, tuple[int, ...]]  # a kernel and its configuration


def rows_launches(k: int, n: int, dtype: torch.dtype, device: str) -> dict[str, tuple[Launch, int]]:
    """By kernel: its launch at a block size and number of warps, and the bytes it has to move."""
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


def optimizer_launches(sizes: Sequence[int], dtype: torch.dtype, device: str) -> dict[str, tuple[Launch, int]]:
    """The same for the kernels of LAMB and LARS, over tensors of these sizes."""

    def made(of: torch.dtype) -> list[torch.Tensor]:
        return [torch.full((size,), 0.01, dtype=of, device=device) for size in sizes]

    tensors = len(sizes)
    p, g, m, v = made(dtype), made(dtype), made(torch.float32), made(torch.float32)
    (of_lamb,) = buckets({}, "lamb", (p, g, m, v), (0, 2, 3), None, lambda _: True)
    (of_lars,) = buckets({}, "lars", (p, g, m), (0, 2), None, lambda _: True)
    (of_norm,) = buckets({}, "norm", (g,), (), None, lambda _: True)
    scalar = torch.ones((), device=device)
    partials = of_lamb.float_scratch("partials", of_lamb.num_chunks, 2)
    table = torch.full((tensors, max(lamb.COLUMNS, lars.COLUMNS)), 1e-6, device=device)
    kernels: Any = (
        lamb.moments_kernel, lamb.weights_kernel, lamb.step_kernel,
        lars.norms_kernel, lars.weights_kernel, lars.step_kernel, square_kernel,
    )  # fmt: skip
    moments, lamb_weights, lamb_step, norms, lars_weights, lars_step, square = kernels
    types = {"P_DTYPE": DTYPES[dtype], "G_DTYPE": DTYPES[dtype]}

    def tables(bucket: Bucket, pointed_at: object = (p, g, m, v)) -> tuple[torch.Tensor, ...]:
        # The tables hold addresses alone: what lies there lives as long as this function.
        return bucket.pointers, bucket.sizes, bucket.chunks

    def common(block: int, warps: int) -> dict[str, Any]:
        return {"ALIGNED": of_lamb.aligned, "CHUNK": CHUNK, "BLOCK": block, "num_warps": warps}

    def queued(bucket: Bucket, lag: int) -> tuple[torch.Tensor, ...]:
        queue, counters = bucket.queue(lag)
        counters.zero_()
        return *tables(bucket), bucket.first_chunk, bucket.adapts, table, partials, queue, counters

    grid, each, total = (of_lamb.num_chunks,), p[0].element_size(), sum(sizes)
    twice = (2 * of_lamb.num_chunks,)
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
        "lamb_step": (
            lambda block, warps, lag: lamb_step[twice](
                *queued(of_lamb, lag), tensors, scalar, 0.9, 0.999, 0.1, 0.001, 1e-6, 0.0, 0.01, 0.0, 1.0,
                HAS_FOUND=False, HAS_CLIP=False, HAS_MASTER=False, **types, **common(block, warps),
            ),
            total * (3 * each + 16),
        ),
        "lars_step": (
            lambda block, warps, lag: lars_step[twice](
                *queued(of_lars, lag), tensors, scalar, scalar, scalar, 0.9, 0.01, 1e-3, 1e-8, 1.0,
                HAS_SCALE=False, HAS_FOUND=False, HAS_BUFFER=True, NESTEROV=False, COUNTED=False, STEP=0, MASTER=0,
                JOINT=False, CLIP=False, LR_IN_BUFFER=False, MAXIMIZE=False, **types, **common(block, warps),
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


def measure(launches: dict[str, tuple[Launch, int]]) -> tuple[float, dict[Key, float]]:
    """Seconds of each kernel in each configuration, and bytes a second of a copy."""
    source, target = torch.empty(2, 2**28, device="cuda").unbind()
    keys = [(name, configuration) for name in launches for configuration in CONFIGURATIONS.get(name, OTHERS)]
    calls = [(key, partial(launches[key[0]][0], *key[1])) for key in keys]
    copies: list[float] = []
    times: dict[Key, list[float]] = {key: [] for key in keys}
    for _, call in calls:
        call()  # compile
    torch.cuda.synchronize()
    for _ in range(TURNS):
        copies.append(event_seconds(lambda: target.copy_(source), QUEUED))
        for key, call in calls:
            times[key].append(event_seconds(call, QUEUED))
    return 2 * source.nbytes / statistics.median(copies), {key: statistics.median(times[key]) for key in keys}


def winners(
    launches: dict[str, tuple[Launch, int]], dtype: torch.dtype, rows: int, copy: float, seconds: dict[Key, float]
) -> list[dict[str, Any]]:
    """Print every configuration, fastest first; the fastest of each kernel."""
    found = []
    for kernel, (_, num_bytes) in launches.items():
        mine = sorted((taken, configuration) for (name, configuration), taken in seconds.items() if name == kernel)
        for taken, (block, warps, *lag) in mine:
            rate = num_bytes / taken
            share = f"{1e6 * taken:7.0f} us {rate / 1e9:6.0f} GB/s {100 * rate / copy:6.1f} % of copy"
            name = f"{kernel:12} K={rows} {str(dtype)[6:]:9}"
            print(f"{name} BLOCK {block:5} warps {warps:2} {f'lag {lag[0]:3}' if lag else '':7} {share}", flush=True)
        best, configuration = mine[0]
        row = {"entry": constants.entry(kernel, dtype, rows), "constants": list(configuration), "seconds": best}
        row |= {"bytes": num_bytes, "share_of_copy": num_bytes / best / copy}
        if kernel not in PHASES:
            row["by_default"] = num_bytes / seconds[kernel, (constants.BLOCK, constants.NUM_WARPS)] / copy
        found.append(row)
    return found


def slower_than_its_phases(row: dict[str, Any], found: list[dict[str, Any]]) -> bool:
    """Also if it is no clear gain. Each is counted in bytes of the copy beside it: the clock may have changed."""

    def copied(of: dict[str, Any]) -> float:
        return of["bytes"] / of["share_of_copy"]

    kernel, _, rest = row["entry"].partition(" ")
    phases = [f"{phase} {rest}" for phase in PHASES.get(kernel, ())]
    return bool(phases) and copied(row) >= GAIN * sum(copied(other) for other in found if other["entry"] in phases)


def adopt(device: str, found: list[dict[str, Any]]) -> None:
    """Write the winners to the file that the library reads at its first launch on a device of this name."""
    known = json.loads(constants.MEASURED.read_text())
    kept = {row["entry"]: row["constants"] for row in found if not slower_than_its_phases(row, found)}
    measured = {row["entry"] for row in found}
    known[device] = {name: old for name, old in known.get(device, {}).items() if name not in measured} | kept
    constants.MEASURED.write_text(json.dumps(known, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("roofline.json"))
    parser.add_argument("--adopt", action="store_true")
    parser.add_argument("--parameters", type=int, default=100_000_000)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--seconds", type=float, default=600.0, help="start no further measurement after this long")
    parser.add_argument("--no-steps", action="store_true", help="measure no step in one launch, and adopt none")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device")
    n, device, started = given.parameters // 16 * 16, torch.cuda.get_device_name(), time.monotonic()
    sizes = [torch.Size(shape).numel() for shape in SHAPES["bert-base"]()]
    found: list[dict[str, Any]] = []
    result = {
        "device": device,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "parameters": n,
        "parameters_of_optimizers": sum(sizes),
        "defaults": {"block": constants.BLOCK, "num_warps": constants.NUM_WARPS},
        "winners": found,
    }
    # Steps in one launch come after what they are held to, and before what matters less where time is short.
    kinds = ("phases", *([] if given.no_steps else ["steps"]), *given.workers)
    left_out = []
    for kind, dtype in itertools.product(kinds, DTYPES_MEASURED):
        if time.monotonic() - started > given.seconds:
            left_out.append(f"{kind} in {dtype}")
            continue
        if isinstance(kind, int):
            launches = rows_launches(kind, n, dtype, "cuda")
        else:
            every = optimizer_launches(sizes, dtype, "cuda")
            launches = {name: every[name] for name in every if (name in PHASES) == (kind == "steps")}
            del every
        found += winners(launches, dtype, kind if isinstance(kind, int) else 1, *measure(launches))
        del launches
        torch.cuda.empty_cache()
        given.out.write_text(json.dumps(result, indent=1) + "\n")
        if given.adopt:
            adopt(device, found)
    if left_out:
        sys.exit(f"out of time, left out: {', '.join(left_out)}")


if __name__ == "__main__":
    main()
