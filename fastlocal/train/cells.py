"""A study's folder: which cell is kept where, how far each is, and what the study asked for."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastlocal.train import run_files
from fastlocal.train.errors import RunError, UsageError
from fastlocal.train.pool import Place, find, placed
from fastlocal.train.study_file import Study, is_wanted

STUDY = "study.json"
"""In a study's folder: the cells it asks for."""


def places(
    study: Study,
    root: Path,
    *,
    only: Sequence[str] = ("*",),
    data_dir: Path | None,
    threads: int | None,
    default_threads: int | None = None,
    device: str | None,
    retry: bool,
) -> list[Place]:
    """Where the cells stand whose name fits one of `only`. Writes nothing.

    Raises:
        UsageError: no cell has a name that fits one of them, or a folder holds another run.
    """
    for pattern in only:
        if not any(is_wanted(cell, [pattern]) for cell in study.cells):
            raise UsageError(f"--only {pattern} is none of {', '.join(cell.name for cell in study.cells)}")
    found = []
    for cell in study.cells:
        if not is_wanted(cell, only):
            continue
        config = placed(cell.config, data_dir, device, threads, default_threads)
        found.append(find(replace(config, out=root / cell.name, resume=True), retry=retry))
    return found


def begin(study: Study, root: Path) -> None:
    """Make the study's folder and write down what it asks for.

    Raises:
        UsageError: the folder cannot be used, or holds the study at another number of epochs or precision.
    """
    path = root / STUDY
    if path.exists():
        saved = run_files.read_json(path)
        now = {"name": study.name, "epochs": study.epochs, "precision": study.precision}
        for what in now:
            if saved.get(what) != now[what]:
                raise UsageError(
                    f"{root} holds the study with {what} {saved.get(what)}, not {now[what]}: choose another --out"
                )
    try:
        root.mkdir(parents=True, exist_ok=True)
        run_files.write_json(path, as_json(study))
    except OSError as error:
        raise UsageError(f"--out {root} cannot be made: {error.strerror}") from None
    except RunError as error:
        raise UsageError(str(error)) from None


def as_json(study: Study) -> dict[str, Any]:
    """What study.json holds."""
    return {
        "name": study.name,
        "title": study.title,
        "epochs": study.epochs,
        "precision": study.precision,
        "cells": [
            {
                "name": cell.name,
                "group": cell.group,
                "file_epochs": cell.file_epochs,
                "original": cell.original,
                "note": cell.note,
                "config": cell.config.as_dict(),
            }
            for cell in study.cells
        ],
    }
