"""Append finished runs to a file under bench/results/: python bench/record.py RESULTS.jsonl COMMIT RUN_FOLDER ...

A line is the run's summary with the commit it ran at and what each epoch reached, so that every figure can be traced
and run again.
"""

import json
import sys
from pathlib import Path


def main() -> None:
    """Append one line a run folder."""
    results, commit, folders = Path(sys.argv[1]), sys.argv[2], map(Path, sys.argv[3:])
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a") as file:
        for folder in folders:
            summary = json.loads((folder / "summary.json").read_text())
            for path in ("data_dir", "out"):  # of the machine that ran it, they say nothing to another
                del summary["config"][path]
            del summary["folder"]
            records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
            kept = ("val_accuracy", "val_loss", "bytes_on_wire", "rounds")
            epochs = {name: [record[name] for record in records] for name in kept}
            file.write(json.dumps({"run": folder.name, "commit": commit, "epochs": epochs, **summary}) + "\n")


if __name__ == "__main__":
    main()
