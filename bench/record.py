"""Append finished runs to a file under bench/results/: python bench/record.py RESULTS.jsonl COMMIT FOLDER ...

A folder is a run or holds some, as a study does. A line is the run's summary with the commit it ran at and what each
epoch reached, so that every figure can be traced and run again. A run that is in the file already is left out.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

KEPT = ("val_accuracy", "val_loss", "bytes_on_wire", "rounds")
"""What is kept of each epoch."""


def row(folder: Path, commit: str) -> dict[str, Any]:
    """A finished run in one line, without what is of the machine alone."""
    summary = json.loads((folder / "summary.json").read_text())
    config = {key: value for key, value in summary["config"].items() if key not in ("data_dir", "out")}
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    epochs = {name: [record[name] for record in records] for name in KEPT}
    rest = {key: value for key, value in summary.items() if key != "folder"}
    return {"run": folder.name, "commit": commit, "epochs": epochs, **rest, "config": config}


def record(results: Path, commit: str, folders: Iterable[Path]) -> list[str]:
    """Append the runs in the folders that are not in the file yet; returns their names."""
    lines = results.read_text().splitlines() if results.exists() else []
    seen = [_identity(json.loads(line)) for line in lines]
    names = []
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a") as file:
        for path in sorted(path for folder in folders for path in folder.rglob("summary.json")):
            found = row(path.parent, commit)
            if _identity(found) not in seen:
                seen.append(_identity(found))
                names.append(found["run"])
                file.write(json.dumps(found) + "\n")
    return names


def _identity(found: dict[str, Any]) -> dict[str, Any]:
    """What one run has for itself: two with the same settings do not take the same seconds."""
    return {key: found[key] for key in ("run", "train_seconds", "sync_seconds", "best_val_accuracy")}


def main() -> None:
    """Append one line a run, and say which."""
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    results, commit, folders = Path(sys.argv[1]), sys.argv[2], [Path(folder) for folder in sys.argv[3:]]
    missing = [str(folder) for folder in folders if not any(folder.rglob("summary.json"))]
    if missing:
        sys.exit(f"there is no finished run in {', '.join(missing)}")
    names = record(results, commit, folders)
    print(f"{len(names)} new lines in {results}: {', '.join(names) or 'all were there'}")


if __name__ == "__main__":
    main()
