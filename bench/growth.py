"""How the cost of a sync grows with workers, interval and model, as a Markdown table from measured rows.

    python bench/growth.py bench/results/operations-cpu.jsonl bench/results/trainer.jsonl

The first table is fastlocal's outer step by model and workers (milliseconds a sync), and what of it falls to a local
step at an interval; the second is the share of a sync measured within the trainer's local steps.
"""

import argparse
import json
from pathlib import Path
from typing import Any

INTERVALS = (1, 4, 16, 64)


def read(file: str) -> list[dict[str, Any]]:
    """The objects of a JSON lines file."""
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def print_table(head: list[str], body: list[list[str]]) -> None:
    """In Markdown."""
    for cells in (head, ["---"] * len(head), *body):
        print(f"| {' | '.join(cells)} |")


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operations", help="rows of `fastlocal bench`")
    parser.add_argument("trainer", help="rows of bench/trainer.py")
    arguments = parser.parse_args()
    operations, trainer = read(arguments.operations), read(arguments.trainer)
    body = []
    for row in operations:
        if (row["operation"], row["contender"]) == ("outer-step", "fastlocal"):
            seconds, workers = row["seconds_p50"], row["workers"]
            step = [f"{1e3 * seconds / interval:.3g}" for interval in INTERVALS]
            nanoseconds = f"{1e9 * seconds / (workers * row['parameters']):.2f}"
            body.append([row["size"], f"{row['parameters'] / 1e6:.1f}M", str(workers), *step, nanoseconds])
    times = [f"ms a step, J = {interval}" for interval in INTERVALS]
    print_table(["model", "parameters", "K", *times, "ns a parameter and worker"], body)
    print()
    shares = []
    for row in trainer:
        case = row["case"]
        if case.keys() == {"workers", "interval", "precision"} and case["precision"] == "bf16":
            share = f"{row['sync_percent']:.2f} %"
            shares.append([str(case["workers"]), str(case["interval"]), f"{row['step_ms']:.1f}", share])
    print_table(["K", "J", "ms a local step of all workers", "of it in syncs"], shares)


if __name__ == "__main__":
    main()
