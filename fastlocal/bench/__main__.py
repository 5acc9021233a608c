"""`python -m fastlocal.bench`: the benchmarks as plain lines, where the command line's packages are not installed."""

import argparse
import sys
from pathlib import Path

import torch

from fastlocal.bench.cases import OPERATIONS, Case
from fastlocal.bench.run import BenchPlan, Measurement, ahead, append, host_bound, require_writable, run
from fastlocal.bench.shapes import SHAPES


def line(row: Measurement) -> str:
    """One result in one line."""
    return (
        f"{row.operation:10} {row.size:9} K={row.workers:2} {row.contender:22} {row.seconds_p50 * 1e3:9.3f} ms "
        f"({row.seconds_p20 * 1e3:.3f} to {row.seconds_p80 * 1e3:.3f})  {row.ratio:6.2f}x  "
        f"{row.bytes_a_parameter:6.1f} B/param  {100 * row.share_of_copy:6.1f} % of copy"
    )


def main() -> int:
    """Parse the flags, print, and append to the file asked for; returns the exit code, 2 for a wrong request."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--operation", choices=OPERATIONS)
    parser.add_argument("--size", choices=sorted(SHAPES))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()

    def show(case: Case, rows: list[Measurement]) -> None:
        for row in rows:
            print(line(row), flush=True)
        if case.missing:
            print(f"not installed: {', '.join(case.missing)}")
        if given.out:
            append(rows, given.out)

    try:
        if given.out:
            require_writable(given.out)
        plan = BenchPlan(
            operation=given.operation,
            size=given.size,
            quick=given.quick,
            device=given.device,
            compiled=given.compiled,
        )
    except ValueError as error:
        print(f"error: --{str(error).removeprefix('--')}", file=sys.stderr)
        return 2
    try:
        rows = run(plan, show, print)
        for said in ahead(rows) + host_bound(rows):
            print(said)
    except BrokenPipeError:  # `| head`
        sys.stdout = None  # which is flushed at the end
        return 1
    except OSError as error:
        print(f"error: {given.out or 'standard output'} cannot be written: {error.strerror}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
