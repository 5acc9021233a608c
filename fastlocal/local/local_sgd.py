"""LocalSGD: any torch.optim optimizer, with a sync every few steps.

The wrapper counts completed optimizer steps, closes a round when its interval is over, and asks the policy for
the next interval. The arithmetic of a sync is in `outer`, the storage in `flat`.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, get_args, overload

import torch
from torch import Tensor, nn

from fastlocal import buffers as module_buffers
from fastlocal import comm
from fastlocal.buffers import Buffers
from fastlocal.flat import Block, Rows, Workers
from fastlocal.inner import (
    InnerState,
    Twins,
    average_gradients_,
    average_state_,
    reset_state_,
    state_num_bytes,
)
from fastlocal.local.wrapper import Wrapper
from fastlocal.ops.averaging import finite_rows
from fastlocal.ops.implementation import Implementation, check_implementation
from fastlocal.outer import Average, SlowMomentum
from fastlocal.policy import FixedInterval, Policy, Stats, require_interval


class DivergedError(RuntimeError):
    """No worker's parameters are finite: there is nothing to average."""


class LocalSGD(Wrapper):
    """Let each worker step alone and average their parameters once an interval.

    Wraps an optimizer and is one: hooks, closures, LR schedulers, `state_dict` and `deepcopy` work as on any.
    `param_groups` and `state` are the inner optimizer's own.

    Args:
        inner: the optimizer that takes the local steps, built over the parameters of all workers.
        model: the workers, or one module (a single worker: nothing to average with).
        interval: local steps between two syncs, or a policy that chooses them.
        inner_state: what a sync does to the inner optimizer's state.
        buffers: what a sync does to module buffers. "average" takes the mean of floating-point ones and the
            maximum of the others, "broadcast" copies the first finite worker's.
        warmup_steps: average gradients instead of parameters for the first so many steps (post-local SGD).
        impl: how the averaging is carried out; "auto" chooses.

    Attributes:
        stats: what was counted so far, see Stats.

    Raises:
        ValueError: a value is out of its range, or a parameter of `inner` does not belong to `model`.
        TypeError: an argument is of the wrong kind.

    References:
        Stich, `Local SGD Converges Fast and Communicates Little <https://arxiv.org/abs/1805.09767>`_, 2019
    """

    _own_attributes: tuple[str, ...] = (
        "defaults",
        "inner",
        "policy",
        "rows",
        "inner_state",
        "buffers",
        "warmup_steps",
        "impl",
        "stats",
        "steps_in_round",
        "_anchored",
        "_round_is_open",
        "_rates",
    )

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        model: nn.Module | Workers,
        interval: int | Policy,
        *,
        inner_state: InnerState = "keep",
        buffers: Buffers = "average",
        warmup_steps: int = 0,
        impl: Implementation = "auto",
    ) -> None:
        comm.require_single_process()
        _require_choice("inner_state", inner_state, get_args(InnerState))
        _require_choice("buffers", buffers, get_args(Buffers))
        check_implementation(impl)
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps must be at least 0, got {warmup_steps}")
        if not isinstance(model, (nn.Module, Workers)):
            raise TypeError(f"model must be an nn.Module or Workers, got {type(model).__name__}")
        if isinstance(interval, type):
            raise TypeError(f"interval must be a policy, not its class: {interval.__name__}(...)")
        if isinstance(interval, Policy):
            self.policy: Policy = interval
        else:
            self.policy = FixedInterval(require_interval("interval", interval))
        super().__init__(inner)
        self.rows = model.rows if isinstance(model, Workers) else Rows([model])
        self.inner_state: InnerState = inner_state
        self.buffers: Buffers = buffers
        self.warmup_steps = warmup_steps
        self.impl: Implementation = impl
        self.stats = Stats()
        self.steps_in_round = 0
        self._anchored = False  # whether the first round has begun
        self._round_is_open = False
        self._rates: list[Any] = []  # of the last step, one a group
        self._group_of = self._find_groups()
        self._outers = [self._make_outer(block) for block in self.rows.blocks]

    def _make_outer(self, block: Block) -> Average | SlowMomentum:
        return Average(block.rows, impl=self.impl)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the inner optimizer; its parameters must belong to the model.

        Raises:
            ValueError: one does not, or not every worker's is in the group.
        """
        super().add_param_group(param_group)
        if "rows" in self.__dict__:
            try:
                self._group_of = self._find_groups()
            except ValueError:
                self.param_groups.pop()
                raise

    def _find_groups(self) -> dict[Tensor, int]:
        """Which group each parameter is in; worker k's is in the same one as worker 0's."""
        group_of = {p: index for index, group in enumerate(self.param_groups) for p in group["params"]}
        known = {parameter for parameters in self.rows.parameters for parameter in parameters.values()}
        for parameter in group_of:
            if parameter not in known and parameter.requires_grad:
                raise ValueError(
                    f"inner has a parameter of shape {tuple(parameter.shape)} that is no trainable parameter of "
                    "model: it would never be averaged"
                )
        for name in self.rows.parameters[0]:
            groups = [group_of.get(parameters[name]) for parameters in self.rows.parameters]
            if len(set(groups)) > 1:
                raise ValueError(
                    f"parameter {name!r} is in the groups {groups} for the workers 0 to {len(groups) - 1}: "
                    "all workers must have it in the same group"
                )
        return group_of

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one local step with every worker; sync if the interval is over.

        Args:
            closure: evaluates the model and returns the loss, as torch.optim takes it.

        Returns:
            What the closure returned.

        Raises:
            DivergedError: a sync was due and no worker's parameters are finite.
        """
        warming_up = self.stats.local_steps < self.warmup_steps
        if not self._round_is_open:
            self._begin_round(warming_up)
        # A scheduler may change the rates before sync() is called; the outer step wants those of this step.
        self._rates = [_copied(group["lr"]) for group in self.param_groups]
        if warming_up:
            loss = self._step_together(closure)
        else:
            loss = self.inner.step() if closure is None else self.inner.step(closure)
            self.steps_in_round += 1
        self.stats.local_steps += 1
        self.stats.bytes_synchronous += self._ring(self.rows.num_bytes)
        if warming_up:
            self._round_is_open = False
        elif self.steps_in_round >= self.stats.interval:
            self.sync()
        return loss

    def _begin_round(self, warming_up: bool) -> None:
        comm.require_single_process()
        if not warming_up:
            if not self._anchored:
                for outer in self._outers:
                    outer.begin()
                self._anchored = True
            self.stats.lr = max(float(group["lr"]) for group in self.param_groups)
            interval = self.policy.next_interval(self.stats)
            self.stats.interval = require_interval(f"the interval from {type(self.policy).__name__}", interval)
        elif self.stats.local_steps == 0:
            self.rows.check()
        self._round_is_open = True

    def _step_together(self, closure: Callable[[], float] | None) -> float | None:
        """A synchronous step: the gradients are averaged, and every worker takes the same step."""
        twins = self._twins()

        def average() -> None:
            started = time.perf_counter()
            average_gradients_(twins)
            self.stats.bytes_on_wire += self._ring(self.rows.num_bytes)
            self.stats.seconds_in_sync += time.perf_counter() - started

        def averaged_closure() -> float:
            assert closure is not None
            loss = closure()
            average()
            return loss

        self.stats.rounds += 1
        if closure is not None:
            return self.inner.step(averaged_closure)
        average()
        return self.inner.step()

    def _twins(self) -> list[Twins]:
        names = self.rows.parameters[0]
        return [tuple(parameters[name] for parameters in self.rows.parameters) for name in names]

    @torch.no_grad()
    def sync(self) -> None:
        """Close the round under way, even if it is not full; without a step since the last sync, do nothing.

        A worker whose parameters are not all finite is left out of the mean and goes on from it.

        Raises:
            DivergedError: no worker's parameters are finite; then nothing is written.
            RuntimeError: a parameter has left its row, or the workers' buffers differ.
        """
        if self.steps_in_round == 0:
            return
        started = time.perf_counter()
        self.rows.check()
        twin_buffers = module_buffers.collect(self.rows.modules)
        device = self.rows.blocks[0].rows.device
        finite = torch.ones(len(self.rows), dtype=torch.bool, device=device)
        for block in self.rows.blocks:
            finite &= finite_rows(block.rows, impl=self.impl).to(device)
        weights = finite.to(torch.float32)
        squares = torch.zeros(len(self.rows), dtype=torch.float64, device=device)
        rates = [[self._rate(slot.name) for slot in block.slots] for block in self.rows.blocks]
        for block, outer, own in zip(self.rows.blocks, self._outers, rates, strict=True):
            squares += outer.step_(weights.to(block.rows.device), own).to(device)
        # The one read from the device: which rows counted, and how far apart they were.
        included, squared_drift = finite.tolist(), squares.tolist()
        if not any(included):
            raise DivergedError(
                f"after {self.stats.local_steps} local steps no worker's parameters are finite: training has "
                "diverged; nothing was averaged. Lower the learning rate, or go on from a checkpoint"
            )
        for outer, own in zip(self._outers, rates, strict=True):
            outer.commit(own)
        payload = self.rows.num_bytes
        payload += module_buffers.merge_(twin_buffers, self.buffers, included) + self._merge_inner_state(included)
        drifts = [math.sqrt(square) for square, counts in zip(squared_drift, included, strict=True) if counts]
        self.stats.drift = sum(drifts) / len(drifts)
        self.stats.excluded += included.count(False)
        self.stats.bytes_on_wire += self._ring(payload)
        self.stats.rounds += 1
        self.stats.round_steps = self.steps_in_round
        self.steps_in_round = 0
        self._round_is_open = False
        self.stats.seconds_in_sync += time.perf_counter() - started

    def observe(self, *, val_loss: float | None = None, train_loss: float | None = None) -> None:
        """Tell the policy a loss, once an epoch; it counts from the next round on.

        Raises:
            ValueError: a loss is not finite.
        """
        for name, loss in (("val_loss", val_loss), ("train_loss", train_loss)):
            if loss is not None:
                if not math.isfinite(loss):
                    raise ValueError(f"{name} must be finite, got {loss}: training has diverged")
                setattr(self.stats, name, float(loss))
                self.stats.observations += name == "val_loss"

    def _rate(self, name: str) -> float:
        """The learning rate of the last step for this parameter; 1 if no optimizer moves it."""
        group = self._group_of.get(self.rows.parameters[0][name])
        if group is None:
            return 1.0
        # A group added since the last step has a rate too.
        return float(self._rates[group] if group < len(self._rates) else self.param_groups[group]["lr"])

    def _ring(self, payload: int) -> int:
        """Bytes that one worker sends in a ring all-reduce of `payload` bytes."""
        return 2 * (len(self.rows) - 1) * payload // len(self.rows)

    def _merge_inner_state(self, included: list[bool]) -> int:
        """Apply the choice for the inner state; returns the bytes of one worker's that were sent."""
        if self.inner_state == "average":
            payload = state_num_bytes(self.state, self.rows.parameters[included.index(True)].values())
            average_state_(self.state, self._twins(), included)
            return payload
        for parameters, counts in zip(self.rows.parameters, included, strict=True):
            # What drove a row to infinity is still in its momentum.
            if self.inner_state == "reset" or not counts:
                reset_state_(self.inner, parameters.values())
        return 0

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state_dict with one more entry, "fastlocal".

        With it and the modules' own state, training goes on bit by bit, in the middle of a round too.
        """
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        state = dict(self.inner.state_dict())
        state["fastlocal"] = {
            "method": type(self).__name__,
            "num_workers": len(self.rows),
            "layout": self.rows.layout,
            "outer": [outer.state_dict() for outer in self._outers],
            "policy": {"name": type(self.policy).__name__, "state": self.policy.state_dict()},
            "stats": asdict(self.stats),
            "steps_in_round": self.steps_in_round,
            "anchored": self._anchored,
            "rates": [float(rate) for rate in self._rates],
        }
        for hook in self._optimizer_state_dict_post_hooks.values():
            replaced = hook(self, state)
            state = state if replaced is None else replaced
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what state_dict() returned; before the first step too. The argument is not changed.

        Raises:
            ValueError: it comes from another method, policy, number of workers or model.
        """
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        if "fastlocal" not in state_dict:
            raise ValueError("state_dict has no entry 'fastlocal': it was not saved by a fastlocal wrapper")
        own = state_dict["fastlocal"]
        for what, saved, here in (
            ("method", own["method"], type(self).__name__),
            ("number of workers", own["num_workers"], len(self.rows)),
            ("policy", own["policy"]["name"], type(self.policy).__name__),
        ):
            if saved != here:
                raise ValueError(f"state_dict is of the {what} {saved!r}, this optimizer has {here!r}")
        self.rows.require_layout(own["layout"])
        self.inner.load_state_dict({key: value for key, value in state_dict.items() if key != "fastlocal"})
        for outer, state in zip(self._outers, own["outer"], strict=True):
            outer.load_state_dict(state)
        self.policy.load_state_dict(own["policy"]["state"])
        self.stats = Stats(**own["stats"])
        self.steps_in_round = own["steps_in_round"]
        self._anchored = own["anchored"]
        self._round_is_open = self.steps_in_round > 0
        self._rates = list(own["rates"])
        self._group_of = self._find_groups()
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def __getstate__(self) -> dict[str, Any]:
        # Not the hooks, nor the `step` that a scheduler put on the instance: as torch.optim does.
        state = {name: self.__dict__[name] for name in self._own_attributes}
        return state | {"outer_states": [outer.state_dict() for outer in self._outers]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        outer_states = state["outer_states"]
        super().__setstate__({name: state[name] for name in self._own_attributes})
        self._group_of = self._find_groups()
        self._outers = [self._make_outer(block) for block in self.rows.blocks]
        for outer, own in zip(self._outers, outer_states, strict=True):
            outer.load_state_dict(own)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.rows)} workers, interval {self.stats.interval}, {self.inner!r})"


def _copied(rate: float | Tensor) -> float | Tensor:
    return rate.detach().clone() if isinstance(rate, Tensor) else rate


def _require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
