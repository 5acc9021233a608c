"""All scenarios, in the order in which they run: every function of these modules that takes a rank and new_group."""

import inspect

from tests.many_processes import agreement, equality, failures, overlap, state, warmup

SCENARIOS = [
    function
    for module in (equality, warmup, agreement, state, overlap, failures)
    for function in vars(module).values()
    if inspect.isfunction(function)
    and function.__module__ == module.__name__
    and list(inspect.signature(function).parameters) == ["rank", "new_group"]
]
