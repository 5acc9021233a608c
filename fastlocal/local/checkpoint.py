"""A wrapper that can be saved, copied and put together again: its parts, and what of them is kept."""

import copy
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from fastlocal import comm
from fastlocal.buffers import Buffers
from fastlocal.checksum import checksum
from fastlocal.comm import Group
from fastlocal.flat import Block, Rows
from fastlocal.inner import InnerState
from fastlocal.local.arguments import check_late_drift, checked_weights, policy_of
from fastlocal.local.form import require_form
from fastlocal.local.kept import Kept
from fastlocal.local.many_processes import ManyProcesses
from fastlocal.local.one_process import Choices, OneProcess
from fastlocal.local.rates import Rates
from fastlocal.local.sending import Sending, form_of_sending, sending_from
from fastlocal.local.wrapper import Wrapper
from fastlocal.ops.implementation import Implementation
from fastlocal.outer import Outer
from fastlocal.policy import Policy, Stats

_FIXED = (
    *("inner", "rows", "inner_state", "buffers", "warmup_steps", "impl", "wire_dtype", "process_group", "timeout"),
    *("interval", "overlap_steps"),
)
"""Arguments that the parts of a wrapper have copies of, or have gone into."""


_OF_SCHEDULERS = {"initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr"}


def _complete(group: dict[str, Any], before: dict[str, Any], options: Iterable[str]) -> None:
    """Give a loaded group the options that it lacks, which are younger than it.

    Raises:
        ValueError: it has others instead: torch.optim takes another optimizer's group, and fails at the next step.
    """
    lacking = [name for name in options if name in before and name not in group]
    foreign = group.keys() - before.keys() - _OF_SCHEDULERS
    if lacking and foreign:
        raise ValueError(f"its param_groups have {', '.join(sorted(foreign))}, but not {', '.join(lacking)}")
    group.update((name, before[name]) for name in lacking)


class Checkpointed(Wrapper):
    """What LocalSGD is made of, without what it does."""

    rows: Rows
    inner_state: InnerState
    buffers: Buffers
    impl: Implementation
    wire_dtype: torch.dtype | None
    warmup_steps: int
    overlap_steps: int
    _group: Group | None
    _timeout: float

    stats = Kept[Stats]()
    steps_in_round = Kept[int]()
    _policy = Kept[Policy]()
    _weights = Kept[tuple[float, ...] | None]()
    _anchored = Kept[bool]()  # whether the first round has begun
    _round_is_open = Kept[bool]()
    _buffers_apart = Kept[bool]()  # whether steps of the warm-up have changed them since they were last merged
    _compared = Kept[bool]()  # whether the processes have found that they agree
    _sending = Kept[Sending | None]()  # a sync whose outcome is yet to come
    _rows_saved = Kept[list[int]]()  # checksums of what a loaded state's anchors go with, until a round begins

    _own_attributes: tuple[str, ...] = (
        "defaults",
        "inner",
        "_policy",
        "rows",
        "inner_state",
        "buffers",
        "warmup_steps",
        "impl",
        "wire_dtype",
        "overlap_steps",
        "stats",
        "steps_in_round",
        "_anchored",
        "_round_is_open",
        "_buffers_apart",
        "_rows_saved",
        "_group",
        "_chose_group",
        "_timeout",
        "_weights",
    )

    def _assemble(self) -> None:
        """What is built from the rest, anew in a copy."""
        self._rates = Rates(self.rows, self.inner)
        self._outers = [self._make_outer(block) for block in self.rows.blocks]
        self.num_workers = len(self.rows) * (1 if self._group is None else len(self._group))
        wire_dtype = self.wire_dtype if self.num_workers > 1 else None  # a lone worker sends nothing
        choices = Choices(self.inner_state, self.buffers, self.impl, wire_dtype, self._timeout)
        parts = (self.rows, self._outers, self.inner, choices)
        self._team = OneProcess(*parts) if self._group is None else ManyProcesses(*parts, self._group)
        self._compared = False
        self._method = type(self).__name__  # a stand-in's class has another

    @abstractmethod
    def _make_outer(self, block: Block) -> Outer:
        """What the mean of a block becomes."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _FIXED and hasattr(self, "_team"):
            instead = "set policy" if name == "interval" else "build another one"
            raise AttributeError(f"{name} was chosen when the optimizer was built and cannot be set: {instead}")
        super().__setattr__(name, value)

    @property
    def policy(self) -> Policy:
        """What chooses the interval; an int that is set becomes the policy of that interval."""
        return self._policy

    @policy.setter
    def policy(self, interval: int | Policy) -> None:
        policy = policy_of(interval)
        check_late_drift(policy, self.overlap_steps)
        self._policy = policy

    @property
    def weights(self) -> tuple[float, ...] | None:
        """Of each worker of this process in the mean; None weighs all alike."""
        return self._weights

    @weights.setter
    def weights(self, weights: Sequence[float] | None) -> None:
        self._weights = None if weights is None else checked_weights(weights, len(self.rows))

    def _weights_or_ones(self) -> Sequence[float]:
        return self._weights or (1.0,) * len(self.rows)

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state_dict with one more entry, "fastlocal".

        With it and the modules' own state, training goes on bit by bit, in the middle of a round too. In several
        processes each saves its own, and loads it again before its first step.
        """
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        own = {**self._saved(), "rows": self._rows_of_anchors()}
        state = {**self.inner.state_dict(), "fastlocal": own}
        for hook in self._optimizer_state_dict_post_hooks.values():
            replaced = hook(self, state)
            state = state if replaced is None else replaced
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what state_dict() returned; before the first step too. The argument is not changed.

        What may be set between rounds comes back too: an interval, slow_lr, slow_momentum. A state saved right
        after `sync()` may go on in another number of processes. All processes load one, and compare themselves before
        the next step.

        Raises:
            ValueError: it comes from another method, policy, number of workers or model, from LocalSGD without a
                wire_dtype where this one has one or the reverse, or from no wrapper.
        """
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        if "fastlocal" not in state_dict:
            raise ValueError(
                "state_dict has no entry 'fastlocal': it was not saved by a fastlocal wrapper, or by something that "
                "keeps an optimizer's state and groups alone, as get_optimizer_state_dict of "
                "torch.distributed.checkpoint does: save what optimizer.state_dict() returns"
            )
        own = state_dict["fastlocal"]
        if isinstance(own, dict):
            own = {**self._younger_entries(own), **own}
        self._check_saved(own)
        policy_before = self.policy.state_dict()
        inner_before = self.inner.state, self.inner.param_groups
        try:
            self.policy.load_state_dict(own["policy"]["state"])
            inner = {key: value for key, value in state_dict.items() if key != "fastlocal"}
            # torch.optim takes tensors as they are where they fit, and its steps would change what was saved.
            self.inner.load_state_dict(copy.deepcopy(inner))
            for before, group in zip(inner_before[1], self.inner.param_groups, strict=True):
                _complete(group, before, self.inner.defaults.keys())
        except Exception as error:  # a policy may be anybody's
            self.policy.load_state_dict(policy_before)
            self.inner.state, self.inner.param_groups = inner_before
            raise ValueError(f"state_dict does not fit the policy or the inner optimizer: {error!r}") from error
        self._restore(own)
        self._team.forget_message()
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def __getstate__(self) -> dict[str, Any]:
        # Not the hooks, nor the `step` that a scheduler put on the instance: as torch.optim does.
        state = {name: getattr(self, name) for name in self._own_attributes}
        outer_states = [outer.state_dict() for outer in self._outers]
        rates = self._rates.last, self._rates.missed, self._rates.resting
        return state | {"outer_states": outer_states, "rates": rates, "sending": self._sending_saved()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        outer_states, rates = state["outer_states"], state["rates"]
        for name in self._own_attributes:
            setattr(self, name, state[name])
        super().__setstate__({})
        self._assemble()
        self._rates.last, self._rates.missed, self._rates.resting = rates
        for outer, own in zip(self._outers, outer_states, strict=True):
            outer.load_state_dict(own)
        self._take_sending(state["sending"])

    def _sending_saved(self) -> dict[str, Any] | None:
        return None if self._sending is None else self._sending.state_dict()

    def _take_sending(self, saved: dict[str, Any] | None) -> None:
        self._sending = None if saved is None else sending_from(saved, [block.rows for block in self.rows.blocks])

    def _saved(self) -> dict[str, Any]:
        """The entry "fastlocal" but for its "rows": this process's share of all that the next step depends on."""
        return {
            "method": self._method,
            "num_workers": self.num_workers,
            "num_rows": len(self.rows),
            "layout": self.rows.layout,
            "places": self._places(),
            "outer": [outer.state_dict() for outer in self._outers],
            "policy": {"name": type(self.policy).__name__, "state": self.policy.state_dict()},
            "stats": asdict(self.stats),
            "steps_in_round": self.steps_in_round,
            "anchored": self._anchored,
            "buffers_apart": self._buffers_apart,
            "sending": self._sending_saved(),
            "rates": [float(rate) for rate in self._rates.last],
            "missed": list(self._rates.missed),
            "resting": [index for index, name in enumerate(self._names()) if name in self._rates.resting],
        }

    def _younger_entries(self, own: dict[str, Any]) -> dict[str, Any]:
        """What old entries lack, as it stands or as it must have been."""
        stats = own.get("stats")
        steps = stats.get("local_steps") if isinstance(stats, dict) else None
        apart = isinstance(steps, int) and 0 < steps <= self.warmup_steps
        rates = own.get("rates")
        missed = [0] * len(rates) if isinstance(rates, list) else []
        return {
            "resting": [],
            "buffers_apart": apart,
            "rows": [],
            "places": self._places(),
            "sending": None,
            "missed": missed,
        }

    def _rows_of_anchors(self) -> list[int]:
        """Checksums of the rows that the anchors go with; none in a round, or before there are anchors."""
        if self._rows_saved or self.steps_in_round or not self._anchored or self._sending is not None:
            return self._rows_saved
        self.rows.pull()
        return self._checksums()

    def _checksums(self) -> list[int]:
        """Of what this optimizer steps in the first row of each block that has an anchor."""
        blocks = [b for b, outer in zip(self.rows.blocks, self._outers, strict=True) if outer.anchor is not None]
        return [int(checksum(own)) for block in blocks if len(own := self.rows.stepped_columns(block, self.inner))]

    def _places(self) -> list[int]:
        """Where the pieces of this process lie on the mesh, one way of cutting after the other."""
        return [coordinate for owner in self.rows.owners() for coordinate in comm.place_of(owner)]

    def _names(self) -> list[str]:
        return list(self.rows.parameters[0])

    def _check_saved(self, own: dict[str, Any]) -> None:
        """Raise ValueError unless a saved entry fits the optimizer; nothing is changed yet."""
        present = self._saved() | {"stats": asdict(Stats()), "rows": []}
        # What a policy keeps is its own affair, and the layout has an error of its own, before the tensors.
        skipped: dict[str, Any] = {"layout": [], "policy": {}, "outer": [], "sending": None}
        saved = {key: skipped.get(key, value) for key, value in own.items()} if isinstance(own, dict) else own
        require_form(saved, present | skipped, "['fastlocal']")
        if not isinstance(own["policy"], dict) or own["policy"].keys() != {"name", "state"}:
            raise ValueError(f"state_dict: the policy must be a dict of name and state, got {own['policy']}")
        rows = own["num_rows"]
        matches: list[tuple[str, Any, Any]] = [
            ("method", own["method"], self._method),
            ("policy", own["policy"]["name"], type(self.policy).__name__),
        ]
        if rows != len(self.rows):  # the inner optimizer's state is that of so many rows
            if own["num_workers"] != self.num_workers:
                matches.append(("number of workers", own["num_workers"], self.num_workers))
            matches.append(("number of workers a process", rows, len(self.rows)))
        for what, before, here in matches:
            if before != here:
                raise ValueError(f"state_dict is of the {what} {before!r}, this optimizer has {here!r}")
        if own["num_workers"] != self.num_workers and (own["steps_in_round"] or own["sending"] is not None):
            raise ValueError(
                f"state_dict is of the number of workers {own['num_workers']} in the middle of a round, or with a "
                f"sync under way; this optimizer has {self.num_workers}: only one saved right after sync() fits "
                "another number"
            )
        self.rows.require_layout(own["layout"])
        if own["places"] != present["places"]:
            raise ValueError(
                f"state_dict is of the pieces at {own['places']} on the mesh, this process holds those at "
                f"{present['places']}: load in each process its own"
            )
        first = own["outer"][0] if isinstance(own["outer"], list) and own["outer"] else None
        if isinstance(first, dict) and ("anchor" in first) != (self._outers[0].anchor is not None):
            raise ValueError(
                f"state_dict was saved {'with' if 'anchor' in first else 'without'} a wire_dtype, this optimizer has "
                f"{self.wire_dtype}: bfloat16 and float8_e4m3fn may take each other's place, and no other"
            )
        require_form(own["outer"], present["outer"], "['fastlocal']['outer']")
        if own["sending"] is not None:
            blocks = self.rows.blocks
            form = form_of_sending([b.rows for b in blocks], [len(b.slots) for b in blocks], self.num_workers)
            require_form(own["sending"], form, "['fastlocal']['sending']")

    def _restore(self, own: dict[str, Any]) -> None:
        """Take back what _saved() returned, and its rows."""
        for outer, state in zip(self._outers, own["outer"], strict=True):
            outer.load_state_dict(state)
        self.stats = Stats(**own["stats"])
        self.steps_in_round = own["steps_in_round"]
        self._anchored = own["anchored"]
        self._round_is_open = self.steps_in_round > 0
        self._buffers_apart = own["buffers_apart"]
        self._rows_saved = list(own["rows"])
        self._take_sending(own["sending"])
        self._rates.last, self._rates.missed = list(own["rates"]), list(own["missed"])
        self._rates.resting = {name for index, name in enumerate(self._names()) if index in own["resting"]}
        self._rates.find_groups()
        if self.stats.local_steps:
            self.rows.begin(self.inner)
        self._compared = False  # what is loaded into rank 0 alone is where all processes go on, but within a round
