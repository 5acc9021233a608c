"""The examples in docstrings run, and say what they print."""

import ast
import doctest
import importlib
import inspect
import sys

import pytest

import fastlocal

PUBLIC = {value for name, value in vars(fastlocal).items() if not name.startswith("_") and isinstance(value, type)}
MODULES = sorted({kind.__module__ for kind in PUBLIC})


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_docstrings_hold(name):
    results = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert results.failed == 0


@pytest.mark.parametrize("kind", [fastlocal.LARS, fastlocal.LAMB, fastlocal.Workers], ids=lambda kind: kind.__name__)
def test_a_public_name_has_an_example(kind):
    found = doctest.DocTestFinder(recurse=False).find(kind, module=sys.modules[kind.__module__])
    assert sum(len(test.examples) for test in found) >= 3


USED = {kind for kind in PUBLIC - {fastlocal.Stats} if not issubclass(kind, Exception)}


@pytest.mark.parametrize("kind", sorted(USED, key=lambda kind: kind.__name__))
def test_a_public_name_describes_its_arguments_and_errors(kind):
    text = inspect.getdoc(kind) or ""
    arguments = text.partition("Args:\n")[2]
    for name in inspect.signature(kind).parameters:
        assert f"\n    {name}: " in f"\n{arguments}", f"{kind.__name__} does not describe {name}"
    assert "\nRaises:\n" in text


def test_each_figure_of_the_stats_is_described_where_a_reference_shows_it():
    tree = ast.parse(inspect.getsource(fastlocal.Stats)).body[0]
    for field, text in zip(tree.body[1::2], tree.body[2::2], strict=True):
        assert isinstance(field, ast.AnnAssign)
        assert isinstance(text.value.value, str)
