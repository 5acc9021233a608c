"""What must stand in the files of runs and studies that are read again: each key and its kind. Reads no file."""

import reprlib
from collections.abc import Callable
from typing import Any, NamedTuple


class Kind(NamedTuple):
    """Of a value."""

    words: str
    holds: Callable[[Any], bool]


def _or_none(kind: Kind) -> Kind:
    return Kind(f"{kind.words} or null", lambda value: value is None or kind.holds(value))


def _is_trace(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(entry, list) and [*map(type, entry)] == [int, int] for entry in value)
    )


TEXT = Kind("a string", lambda value: type(value) is str)
# The bounds are those of a Config; no NaN lies within them.
NUMBER = Kind("a finite number", lambda value: type(value) in (int, float) and abs(value) <= 1e30)
WHOLE = Kind("a whole number", lambda value: type(value) is int and abs(value) < 2**63)
COUNT = Kind("a whole number of at least 1", lambda value: type(value) is int and 1 <= value < 2**63)
LIST = Kind("a list", lambda value: isinstance(value, list))
TRACE = Kind("a list of [local step, interval]", _is_trace)
FOLDER = Kind(
    "a folder's name", lambda value: type(value) is str and bool(value.strip(" .")) and not {"/", "\0"} & {*value}
)

CONFIG = {
    **dict.fromkeys(("dataset", "method", "policy", "optimizer", "schedule"), TEXT),
    **dict.fromkeys(("workers", "interval", "batch_size", "epochs"), COUNT),
    "seed": WHOLE,
    "lr": _or_none(NUMBER),
    "weight_decay": _or_none(NUMBER),
}
"""A run's config.json, of any version: its other fields are shown as they are."""

SUMMARY = {
    "test_accuracy": _or_none(NUMBER),
    "best_val_accuracy": NUMBER,
    "communication_reduction": _or_none(NUMBER),
    "bytes_on_wire": NUMBER,
    "train_seconds": NUMBER,
    "local_steps": COUNT,
    "interval_trace": TRACE,
    "config": CONFIG,
    "versions": {},
    "images?": {"source?": TEXT},  # older runs did not record them, nor the next
    "resolved?": {"lr": NUMBER},
}
"""A run's summary.json."""

SHOWN = {
    **dict.fromkeys(("rounds", "bytes_synchronous", "samples_per_second"), NUMBER),
    "sync_seconds": _or_none(NUMBER),
}
"""What the table at a run's end shows besides."""

RECORD = {
    "epoch": COUNT,
    "train_loss": NUMBER,
    "val_loss": _or_none(NUMBER),
    "val_accuracy": _or_none(NUMBER),
}
"""A line of records.jsonl."""

STUDY_FILE = {"name": TEXT, "title": TEXT, "epochs": _or_none(COUNT), "cells": LIST}
"""A study.json."""

CELL = {
    "name": FOLDER,
    "group": TEXT,
    "original": {"test_accuracy?": NUMBER, "communication_reduction?": NUMBER},
    "config": CONFIG,
    "file_epochs?": _or_none(COUNT),
    "note?": TEXT,
}
"""One of a study's cells."""


def wrong(value: Any, shape: Kind | dict[str, Any], name: str = "it") -> str | None:
    """What is missing or of another kind, in words; None if nothing is.

    Args:
        value: as JSON gave it.
        shape: its kind; of an object the kinds by key, "key?" where it may be missing.
        name: of the value.
    """
    if isinstance(shape, Kind):
        return None if shape.holds(value) else f"{name} must be {shape.words}, got {reprlib.repr(value)}"
    if not isinstance(value, dict):
        return f"{name} must be an object, got {reprlib.repr(value)}"
    for key, inner in shape.items():
        field = key.removesuffix("?")
        if field not in value and key == field:
            return f"{name} has no {field}"
        if field in value and (told := wrong(value[field], inner, field)):
            return told
    return None
