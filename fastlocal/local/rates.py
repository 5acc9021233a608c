"""Which learning rate each parameter had in the round under way: what the outer step needs to know."""

import struct
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastlocal.flat import Rows

_LOW_PRECISION = {torch.bfloat16, torch.float16}


def checksum_of(rates: Sequence[float]) -> int:
    """By which processes find that theirs, parameter by parameter, are the same."""
    return zlib.crc32(struct.pack(f"{len(rates)}d", *rates))


class Rates:
    """The learning rates of the round, by parameter: the mean over its steps.

    Args:
        rows: the workers' parameters.
        optimizer: whose groups they are in.

    Attributes:
        last: the mean so far, one a group; of the last step alone during warm-up.
        missed: steps of the round that each group was not there for.
        resting: names of the parameters that no step of the round has moved: they are in no group, or frozen and
            without a gradient in every worker.

    Raises:
        ValueError: a parameter is in no row, or in different groups for different workers; a group clips the
            gradients of several workers together or keeps master weights; L-BFGS steps several workers.
    """

    def __init__(self, rows: Rows, optimizer: torch.optim.Optimizer) -> None:
        self._rows, self._optimizer = rows, optimizer
        self.last: list[Any] = []
        self.missed: list[int] = []
        self.resting: set[str] = set()
        self.find_groups()

    def find_groups(self) -> None:
        """Look up again which group each parameter is in; worker k's is in the same one as worker 0's."""
        groups = self._optimizer.param_groups
        self._require_options()
        group_of = {p: index for index, group in enumerate(groups) for p in group["params"]}
        known = {parameter for parameters in self._rows.parameters for parameter in parameters.values()}
        for parameter in group_of:
            if parameter not in known and parameter.requires_grad:
                raise ValueError(
                    f"inner has a parameter of shape {tuple(parameter.shape)} that is no trainable parameter of "
                    "model: it would never be averaged"
                )
        for name in self._rows.parameters[0]:
            places = [group_of.get(parameters[name]) for parameters in self._rows.parameters]
            if len(set(places)) == 1:
                continue
            if None in places:
                raise ValueError(
                    f"parameter {name!r} is not in inner for worker {places.index(None)}, but for others it is: "
                    "build inner over workers.parameters()"
                )
            raise ValueError(
                f"parameter {name!r} is in the groups {places} for the workers 0 to {len(places) - 1}: "
                "all workers must have it in the same group"
            )
        self._group_of, self._num_groups = group_of, len(groups)

    def _require_options(self) -> None:
        if len(self._rows) > 1 and isinstance(self._optimizer, torch.optim.LBFGS):
            raise ValueError(
                "torch.optim.LBFGS takes one step for all workers' parameters together: have one worker a process"
            )
        for index, group in enumerate(self._optimizer.param_groups):
            if "lr" not in group:
                raise ValueError(f"inner's param group {index} has no 'lr': give it one, which syncs refer to")
            if len(self._rows) > 1 and group.get("max_grad_norm"):
                raise ValueError(
                    f"max_grad_norm={group['max_grad_norm']} would bound the norm of all workers' gradients "
                    "together: leave it out, and clip each worker's, clip_grad_norm_(worker.parameters(), ...)"
                )
            if group.get("master_weights") and (low := {p.dtype for p in group["params"]} & _LOW_PRECISION):
                raise ValueError(
                    f"master_weights=True keeps float32 weights of parameters in {low.pop()} that no sync averages: "
                    "what is below the parameters' precision would be lost. Leave it out, or train float32 "
                    "parameters under torch.autocast"
                )

    def look(self, steps_in_round: int) -> tuple[list[Any], set[str]]:
        """The rates of the step that begins, the one after so many others of its round, and what has rested so far.

        Raises:
            ValueError: see the class; groups are looked at where a round begins or one was added.
        """
        if len(self._optimizer.param_groups) != self._num_groups:  # added to the optimizer, not to its wrapper
            self.find_groups()
        elif steps_in_round == 0:
            self._require_options()
        rested = self._at_rest(self.resting if steps_in_round else self._rows.parameters[0])
        return [_copied(group["lr"]) for group in self._optimizer.param_groups], rested

    def note(self, steps_in_round: int, now: list[Any], rested: set[str]) -> None:
        """Take in what look() saw before a step, once it was taken: one that failed may be tried again.

        The last rate alone would make slow momentum explode where a rate that fell to almost nothing rises again.
        """
        self.resting = self._at_rest(rested)  # a closure brings gradients, hooks may take them away
        if steps_in_round == 0:
            self.last, self.missed = now, [0] * len(now)
            return
        added = now[len(self.last) :]
        self.last, self.missed = self.last + added, self.missed + [steps_in_round] * len(added)
        self.last = [
            old + (new - old) / (steps_in_round - missed + 1)
            for old, new, missed in zip(self.last, now, self.missed, strict=True)
        ]

    def of_blocks(self) -> list[list[float | None]]:
        """The round's rate of each parameter in each block; None if it rests."""
        values = [float(rate) for rate in self.last]
        # A group added since the last step has a rate too.
        values += [float(group["lr"]) for group in self._optimizer.param_groups[len(values) :]]
        return [[self._of(slot.name, values) for slot in block.slots] for block in self._rows.blocks]

    def _of(self, name: str, values: list[float]) -> float | None:
        group = self._group_of.get(self._rows.parameters[0][name])
        return None if group is None or name in self.resting else values[group]

    def _at_rest(self, names: Iterable[str]) -> set[str]:
        """Those that a step now leaves: torch.optim steps by the gradient, whether the parameter is frozen or not."""
        return {
            name
            for name in names
            if self._rows.parameters[0][name] not in self._group_of
            or not any(own[name].requires_grad or own[name].grad is not None for own in self._rows.parameters)
        }


def _copied(rate: float | Tensor) -> float | Tensor:
    return rate.detach().clone() if isinstance(rate, Tensor) else rate
