"""A group's state as lists, one a name, without looking up every parameter at every step.

The hash of a tensor is a Python call, so a look-up a tensor costs more than the kernels of a small model.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from itertools import repeat
from operator import is_, itemgetter
from typing import Any

import torch
from torch import Tensor

State = dict[str, Any]


def _same(known: Sequence[object], now: Iterable[object], num_now: int) -> bool:
    return len(known) == num_now and all(map(is_, known, now))


class StateColumns:
    """Remembers which state dicts belong to which group, and forgets it all when one is replaced."""

    def __init__(self) -> None:
        self._held: Mapping[Any, State] = {}
        self._params: list[object] = []
        self._states: list[object] = []
        self._groups: dict[Hashable, tuple[list[Tensor], list[State]]] = {}

    def begin(self, state: Mapping[Any, State]) -> None:
        """Looks, once a step, whether the optimizer's state still holds the same dicts."""
        self._held = state
        if not _same(self._params, state, len(state)) or not _same(self._states, state.values(), len(state)):
            self._params, self._states, self._groups = list(state), list(state.values()), {}

    def gather(
        self, group: Hashable, params: list[Tensor], names: Sequence[str], find: Callable[[Tensor], State]
    ) -> list[list[Tensor]]:
        """The state tensors of these parameters, a list a name.

        Args:
            group: a key that the caller uses for these parameters alone.
            params: the parameters stepped.
            names: the entries wanted; the first of them may be there and be None.
            find: looks a parameter's state up, and creates what it lacks of the names.
        """
        if not torch.compiler.is_compiling():
            known = self._groups.get(group)
            if known is not None and _same(known[0], params, len(params)):
                try:
                    columns = [list(map(itemgetter(name), known[1])) for name in names]
                except KeyError:  # options now ask for an entry that nothing has needed so far
                    columns = None
                if columns is not None and not any(map(is_, columns[0], repeat(None))):
                    return columns
        states = [find(p) for p in params]
        if not torch.compiler.is_compiling():
            self._groups[group] = (params, states)
            if len(self._held) > len(self._params):
                # What was created just now may be dropped again before the next step looks: it must not find things
                # as it knew them.
                self._params, self._states = [None], [None]
        return [[s[name] for s in states] for name in names]
