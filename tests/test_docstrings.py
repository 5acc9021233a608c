"""The examples in docstrings run, and say what they print."""

import doctest
import importlib
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
