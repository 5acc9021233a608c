"""Damaged state dicts, absurd flags and files: refused by name, and nothing has changed; or taken whole."""

import copy
import dataclasses
import datetime
import json
import math
import typing

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn

from fastlocal import LAMB, LARS, LocalSGD, SlowMo, Workers
from fastlocal.policy import OriginalValidationLoss
from fastlocal.train import cells, cli, search_file, study_file
from fastlocal.train.config import Config
from fastlocal.train.errors import UsageError
from fastlocal.train.plan_report import PlanConfig

settings.register_profile("ci", derandomize=True, deadline=None, database=None, max_examples=25)
settings.load_profile("ci")

REFUSALS = (ValueError, TypeError)


def places(value, path=()):
    """Every path into a nest of dicts and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def damage(state, path, how):
    """Remove what lies at the path, or put something else there."""
    for key in path[:-1]:
        state = state[key]
    if how == "remove":
        del state[path[-1]]
    else:
        state[path[-1]] = {"none": None, "text": "x", "minus": -1, "nan": math.nan, "empty": {}, "list": [1, 2]}[how]


def equal(first, second):
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and first.shape == second.shape and torch.equal(first, second)
    if isinstance(first, dict):
        return (
            isinstance(second, dict)
            and first.keys() == second.keys()
            and all(equal(first[k], second[k]) for k in first)
        )
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(equal, first, second))
    return type(first) is type(second) and (first == second or first is second)


def build(kind, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    return kind(model.parameters(), lr=0.1), model


def train(optimizer, model, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, 3)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", [LARS, LAMB])
def test_a_damaged_optimizer_state_is_refused_and_changes_nothing_or_is_loaded_and_steps(kind):
    source, model = build(kind)
    train(source, model, 3)
    whole = copy.deepcopy(source.state_dict())
    paths = list(places(whole))
    refused = set()

    @settings(max_examples=60)
    @given(st.sampled_from(paths), st.sampled_from(["remove", "none", "text", "minus", "nan", "empty", "list"]))
    def check(path, how):
        damaged = copy.deepcopy(whole)
        damage(damaged, path, how)
        given_ = copy.deepcopy(damaged)
        optimizer, model = build(kind)
        train(optimizer, model, 1)
        before = copy.deepcopy(optimizer.state_dict())
        try:
            optimizer.load_state_dict(damaged)
        except REFUSALS:
            refused.add((path, how))
            assert equal(optimizer.state_dict(), before), (path, how)
        else:
            train(optimizer, model, 1)
        assert repr(given_) == repr(damaged)

    check()
    assert len(refused) > 15


def wrapped(kind, steps):
    torch.manual_seed(0)
    workers = Workers(nn.Linear(3, 1), 2)
    inner = torch.optim.SGD(workers.parameters(), lr=0.1, momentum=0.9)
    optimizer = kind(inner, workers, OriginalValidationLoss(4, total_epochs=10))
    for step in range(steps):
        optimizer.zero_grad()
        for worker in workers:
            worker(torch.randn(5, 3)).square().mean().backward()
        optimizer.step()
        if step == 4:
            optimizer.observe(val_loss=1.0)
    return optimizer, workers


@pytest.mark.parametrize("kind", [LocalSGD, SlowMo])
def test_a_damaged_wrapper_state_is_refused_and_changes_nothing_or_is_loaded(kind):
    whole = copy.deepcopy(wrapped(kind, 10)[0].state_dict())
    paths = [("fastlocal", *path) for path in places(whole["fastlocal"])] + [("fastlocal",), ("param_groups",)]
    refused = set()

    @settings(max_examples=150)
    @given(st.sampled_from(paths), st.sampled_from(["remove", "none", "text", "minus", "nan", "empty", "list"]))
    def check(path, how):
        damaged = copy.deepcopy(whole)
        damage(damaged, path, how)
        optimizer, _ = wrapped(kind, 2)
        before = copy.deepcopy(optimizer.state_dict())
        try:
            optimizer.load_state_dict(damaged)
        except ValueError:
            refused.add((path, how))
            assert equal_but_nan(optimizer.state_dict(), before), (path, how)

    check()
    assert len(refused) > 50


def equal_but_nan(first, second):
    return equal(first, second) or repr(first) == repr(second)


# What every flag of a kind is tried with. The values are absurd for each of them, or the parser's to refuse.
ABSURD = {
    int: ["", "x", "1.5", "-1", "nan", "1e9", "--", "[]", "1" + 400 * "0"],
    float: ["", "x", "-1", "nan", "-inf", "1,5", "{}"],
    str: ["no-such-thing", "", "--"],
    bool: ["perhaps"],
}


def kinds_of(annotation):
    """The plain types behind an annotation: Literal["a"] and int | None are str and int."""
    if typing.get_origin(annotation) is typing.Literal:
        return {str}
    return {
        kind for inner in typing.get_args(annotation) or (annotation,) for kind in [inner] if kind is not type(None)
    }


def absurd(config, *without):
    """flag -> the values it is tried with, for every field of a config."""
    return {
        f"--{field.name.replace('_', '-')}": [
            value for kind in kinds_of(typing.get_type_hints(config)[field.name]) for value in ABSURD.get(kind, [])
        ]
        for field in dataclasses.fields(config)
        if field.name not in without
    }


def refuse(command, flag, values, capsys):
    for value in values:
        given_ = f"{flag}={value}"
        assert cli.main([*command, given_]) == 2, given_
        told = capsys.readouterr().err.strip()
        assert told.startswith("error: "), given_
        assert "\n" not in told
        assert flag in told, (given_, told)


# Not resume, a bare flag; nor device: PyTorch decides about devices when the run begins.
TRAIN_FLAGS = absurd(Config, "resume", "device")
PLAN_FLAGS = absurd(PlanConfig)


@pytest.mark.parametrize("flag", sorted(flag for flag, values in TRAIN_FLAGS.items() if values))
def test_an_absurd_value_ends_in_exit_code_2_and_one_line(flag, capsys, monkeypatch):
    def ran(config, display):
        raise AssertionError(f"it would have run with {config}")

    monkeypatch.setattr(cli, "run", ran)
    refuse(["train"], flag, TRAIN_FLAGS[flag], capsys)


@pytest.mark.parametrize("flag", sorted(flag for flag, values in PLAN_FLAGS.items() if values))
def test_an_absurd_value_for_the_planner_ends_in_exit_code_2_and_one_line(flag, capsys):
    needed = {"--parameters": "1e9", "--step-seconds": "0.1"}
    needed.pop(flag, None)
    refuse(["plan", *(f"{name}={value}" for name, value in needed.items())], flag, PLAN_FLAGS[flag], capsys)


STUDY = {
    "name": "mine",
    "title": "A study",
    "seeds": [0, 1],
    "base": {"epochs": 4, "method": "local-sgd", "test": True, "data_dir": "data"},
    "grid": {"workers": [2, 4], "policy": ["fixed"]},
    "cells": [{"name": "big", "batch_size": [128, 256], "lr_at_batch_64": 0.01}, {"interval": 8, "workers": 2}],
    "original": [{"where": {"workers": 2, "interval": 8}, "test_accuracy": 50.0, "note": "one seed"}],
}
SEARCH = {
    "name": "mine",
    "sampler": "tpe",
    "objective": "val_accuracy",
    "trials": 3,
    "seed": 1,
    "base": {"epochs": 2, "precision": "bf16"},
    "space": {
        "lr": {"low": 0.01, "high": 0.1, "log": True},
        "momentum": [0.5, 0.9],
        "warmup_steps": {"low": 0, "high": 3},
    },
}
WRONG = [
    *("x", "", "a/b\nc", "\0", -1, 0, 1.5, math.nan, math.inf, True, 10**400, 2**70),
    *([], [[1]], [1, 2], ["x"], {}, {"unheard_of": 1}, [{}], datetime.date(2026, 1, 1)),
]


def toml(value):
    """A value as TOML, tables inline."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value) if isinstance(value, (bool, str)) else str(value)


def planned(path):
    """Every cell of a study file, as far as it goes without training."""
    folder = path.parent / "none"
    return cells.places(study_file.load(path), folder, data_dir=None, threads=None, device=None, retry=False)


@pytest.mark.parametrize(("whole", "read"), [(STUDY, planned), (SEARCH, search_file.load)], ids=["study", "search"])
def test_a_wrong_value_at_any_key_of_a_file_is_taken_or_ends_in_one_line_that_names_file_and_key(
    tmp_path, whole, read
):
    path = tmp_path / "mine.toml"

    def written(content):
        path.write_text("\n".join(f"{key} = {toml(value)}" for key, value in content.items()))
        return path

    read(written(whole))
    refused = 0
    for place in places(whole):
        for wrong in WRONG:
            content = copy.deepcopy(whole)
            inside = content
            for key in place[:-1]:
                inside = inside[key]
            inside[place[-1]] = wrong
            try:
                read(written(content))
            except UsageError as error:
                refused += 1
                told = str(error)
                assert told.startswith(f"{path}: "), (place, wrong)
                assert "\n" not in told
                keys = [key for key in place if isinstance(key, str)] + (
                    list(wrong) if isinstance(wrong, dict) else []
                )
                # Without its cells a study has none that the original's figures could be about.
                assert "no cell is" in told or any(
                    name in told for key in keys for name in (key, key.replace("_", "-"), key.removesuffix("s"))
                ), (place, wrong, told)
    assert refused > 150


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("where = 'x'\ntest_accuracy = 50", "original 1: where must be a table of fields, { workers = 2 }, got 'x'"),
        ("where = { wrkers = 2 }\ntest_accuracy = 50", "original 1: there is no field wrkers; did you mean workers?"),
        ("test_accuracy = 101", "original 1: test_accuracy must be a number from 0 to 100, got 101"),
        ("communication_reduction = 84", "communication_reduction must be a number from 0 to 1, got 84"),
        ("where = { workers = 2 }", "original 1: it has no figure: give one of test_accuracy"),
    ],
)
def test_a_wrong_original_ends_the_command_in_one_line_and_exit_code_2(tmp_path, capsys, text, message):
    path = tmp_path / "mine.toml"
    path.write_text(f"[grid]\nworkers = [2]\n[[original]]\n{text}\n")
    assert cli.main(["study", str(path), "--dry-run"]) == 2
    told = capsys.readouterr().err.strip()
    assert "\n" not in told
    assert told.startswith(f"error: {path}: ")
    assert message in told
