"""The structure: who may import whom, the kernels link, and the size of the public API."""

import ast
import re
import sys
from pathlib import Path

import pytest

import fastlocal

ROOT = Path(__file__).parent.parent
# module (or package) of fastlocal -> what of fastlocal it may import; "kernels" only inside functions
ARROWS = {
    "reference": set(),
    "kernels": {"kernels"},
    "ops": {"reference", "ops", "kernels"},
    "policy": {"policy"},
    "comm": {"comm"},
    "buffers": set(),
    "checksum": set(),
    "following": {"buffers", "checksum", "comm"},
    "flat": {"buffers", "comm", "following", "memory", "twin"},
    "workers": {"buffers", "comm", "flat", "twin"},
    "memory": {"comm"},
    "twin": {"comm"},
    "inner": set(),
    "outer": {"ops"},
    "optim": {"ops", "optim", "comm"},
    "local": {
        *("buffers", "checksum", "comm", "flat", "following", "inner", "local", "ops", "outer", "policy", "workers"),
    },
    "bench": {"", "bench", "ops", "optim"},
    "train": {"", "bench", "local", "policy", "train", "comm", "workers"},
    "__init__": {"local", "optim", "policy", "workers"},
    "__main__": {"train"},
}
TRAIN_ARROWS = {
    "errors": set(),
    "config": {"errors"},
    "schedule": {"config"},
    "data": {"config", "errors"},
    "augment": {"data"},
    "model": {"config", "data"},
    "checkpoint": {"errors"},
    "allocator": set(),
    "data_parallel": set(),
    "build": {"config", "data_parallel", "errors", "model"},
    "processes": {"errors"},
    "state": {"build", "processes"},
    "step": {"augment", "config"},
    "record": set(),
    "loop": {
        *("augment", "build", "checkpoint", "config", "data", "data_parallel", "errors", "processes", "record"),
        *("schedule", "state", "step"),
    },
    "display": {"record", "tables"},
    "tables": set(),
    "run_files": {"checkpoint", "config", "errors", "kinds", "record"},
    "run": {
        *(
            "run_files",
            "build",
            "data",
            "allocator",
            "config",
            "curves",
            "display",
            "errors",
            "kinds",
            "lock",
            "loop",
            "processes",
            "ready",
        ),
    },
    "bench_table": {"errors", "tables"},
    "plan": {"errors"},
    "plan_report": {"errors", "figures", "plan", "tables"},
    "values": {"config", "errors"},
    "study_file": {"config", "errors", "values"},
    "ready": {"build", "config", "data", "errors"},
    "lock": {"errors"},
    "job": {"display", "errors", "run_files", "run", "tables", "values"},
    "pool": {"config", "errors", "job", "run_files"},
    "cells": {"errors", "pool", "run_files", "study_file"},
    "study_display": {"pool", "tables"},
    "search_file": {"config", "errors", "study_file", "values"},
    "search": {
        *(
            "checkpoint",
            "config",
            "errors",
            "kinds",
            "lock",
            "pool",
            "ready",
            "run_files",
            "search_file",
            "study_file",
        ),
        *("study_display", "tables", "values"),
    },
    "kinds": set(),
    "groups": {"config", "errors"},
    "collect": {"cells", "errors", "groups", "job", "kinds", "run_files"},
    "figures": set(),
    "curves": {"checkpoint", "figures", "record"},
    "plots": {"figures", "groups", "tuned"},
    "tuned": {"groups"},
    "report": {"checkpoint", "collect", "config", "display", "errors", "groups", "plots", "tuned"},
    "cli": {
        *(
            "bench_table",
            "cells",
            "config",
            "display",
            "errors",
            "lock",
            "report",
            "plan_report",
            "pool",
            "run",
            "search_file",
        ),
        *("ready", "study_file", "study_display", "tables", "search"),
    },
    "__init__": set(),
}


def sources():
    for path in sorted([*(ROOT / "fastlocal").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]):
        if "kernels" not in path.relative_to(ROOT).parts[1:]:  # the link shows them a second time
            yield path


def imports(path, inside_functions=True):
    """Modules that a file imports, as dotted names."""
    tree = ast.parse(path.read_text())
    nested = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if id(node) in nested and not inside_functions:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            assert node.module
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def place(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == "fastlocal" else "kernels"


def target_of(name):
    """Which part of fastlocal a dotted name lies in: "flat" for fastlocal.flat.Rows, "" for the public names."""
    rest = name.split(".")[1:]
    known = rest and ((ROOT / "fastlocal" / rest[0]).is_dir() or (ROOT / "fastlocal" / f"{rest[0]}.py").exists())
    return rest[0] if known else ""


@pytest.mark.parametrize("path", list(sources()), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_arrows(path):
    own = place(path)
    names = set(imports(path))
    for name in names:
        if name.startswith("torch.distributed"):
            assert own == "comm", f"{path} imports {name}: only comm may"
        if not name.startswith("fastlocal.") or any(other.startswith(f"{name}.") for other in names):
            continue  # `from a import b` yields a and a.b: the longer one tells
        assert target_of(name) in ARROWS[own], f"{path} imports {name}"
        if own == target_of(name) == "train":
            assert name.split(".")[2] in TRAIN_ARROWS[path.stem], f"{path} imports {name}"
    if own == "ops":
        assert not any(".kernels." in name for name in imports(path, inside_functions=False))
    if own == "kernels":
        packages = {name.partition(".")[0] for name in names}
        assert packages - sys.stdlib_module_names <= {"torch", "triton", "fastlocal"}
    if own == "policy":
        assert not any(name.startswith("torch") for name in names)


def test_every_module_has_its_place_in_the_arrows():
    assert {place(path) for path in sources()} == set(ARROWS)
    train = {path.stem for path in (ROOT / "fastlocal" / "train").glob("*.py")}
    assert train == set(TRAIN_ARROWS)


def test_no_arrow_is_without_an_import():
    used, used_in_train = {name: set() for name in ARROWS}, {name: set() for name in TRAIN_ARROWS}
    for path in sources():
        names = {name for name in imports(path) if name.startswith("fastlocal")}
        names = {name for name in names if not any(other.startswith(f"{name}.") for other in names)}
        used[place(path)] |= set(map(target_of, names))
        if place(path) == "train":
            used_in_train[path.stem] |= {name.split(".")[2] for name in names if target_of(name) == "train"}
    for shown, found in ((ARROWS, used), (TRAIN_ARROWS, used_in_train)):
        stale = {name: targets - found[name] for name, targets in shown.items() if targets - found[name]}
        assert not stale


def test_the_diagram_for_contributors_shows_arrows_that_hold():
    diagram = (ROOT / "CONTRIBUTING.md").read_text().split("```")[3]
    shown = [
        (source, target)
        for source, targets in re.findall(r"(\w+) [→⇢] (\{[^}]*\}|\w+)", diagram)
        for target in re.findall(r"\w+", targets)
    ]
    assert len(shown) > 40
    for source, target in shown:
        # build is the trainer's door to the library; bench is a package and a module of the trainer.
        allowed = TRAIN_ARROWS.get(source, set()) | ARROWS.get(source, set())
        allowed |= {*ARROWS["train"], "optim"} if source == "build" else set()
        assert target in allowed, f"{source} → {target}"
    assert {name for pair in shown for name in pair} >= set(ARROWS) - {"train", "__init__", "__main__"}


def test_kernels_is_a_link_to_a_folder_that_hides_no_other_package():
    link = ROOT / "fastlocal" / "kernels"
    assert link.is_symlink()
    assert link.resolve() == ROOT / "kernels"
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_public_names_are_few_and_documented():
    classes = [name for name, value in vars(fastlocal).items() if isinstance(value, type)]
    assert set(classes) == set(fastlocal.__all__)
    assert len(classes) <= 20
    for name in classes:
        assert getattr(fastlocal, name).__doc__, name
