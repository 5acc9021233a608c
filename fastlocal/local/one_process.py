"""A sync among the workers of one process: no message is sent."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastlocal import buffers as module_buffers
from fastlocal import comm
from fastlocal.buffers import Buffers
from fastlocal.flat import Rows
from fastlocal.inner import (
    InnerState,
    Twins,
    average_gradients_,
    average_state_,
    reset_state_,
)
from fastlocal.local.meeting import compare
from fastlocal.local.sending import Sending, exchange_with_progress_
from fastlocal.local.shared_rows import divide_, progress_of, write_mean_of_progress
from fastlocal.ops import progress
from fastlocal.ops.averaging import accumulate_dtype, finite_rows, relative_weights, weighted_sum_
from fastlocal.ops.implementation import Implementation
from fastlocal.outer import Outer
from fastlocal.policy import Policy, Stats, decides_alike

Standing = Literal["equal", "close", "apart"]
"""How workers must stand to each other where an optimizer begins: before the first step and at a round's end, after
steps together, which in several processes may differ in the last digits, or in a round."""


class DivergedError(RuntimeError):
    """No worker's parameters are finite: there is nothing to average."""

    def __init__(self, local_steps: int) -> None:
        super().__init__(
            f"after {local_steps} local steps no worker's parameters are finite: training has "
            "diverged; nothing was averaged. Lower the learning rate, or go on from a checkpoint"
        )


class Choices(NamedTuple):
    """What the user chose for a sync, see LocalSGD."""

    inner_state: InnerState
    buffers: Buffers
    impl: Implementation
    wire_dtype: torch.dtype | None
    timeout: float


class Outcome(NamedTuple):
    """What a sync found and sent."""

    drift: float  # mean over the workers that count of ‖x_k − x̄‖; nan where it was not measured
    excluded: int  # workers left out
    payload: int  # bytes of one worker that were averaged


class Round(NamedTuple):
    """The round that a sync closes."""

    stats: Stats
    steps: int  # local steps in it
    weights: Sequence[float]  # of this process's rows
    rates: list[list[float | None]]  # of each block's parameters; None for what takes the plain mean
    reads_drift: bool  # whether somebody wants to know it


class OneProcess:
    """The workers are the rows of this process, and no others.

    Args:
        rows: their parameters.
        outers: what the mean of each block becomes.
        inner: the optimizer of the local steps.
        choices: what the user chose.
    """

    num_processes = 1

    def __init__(
        self,
        rows: Rows,
        outers: list[Outer],
        inner: torch.optim.Optimizer,
        choices: Choices,
    ) -> None:
        self.rows, self.outers, self.inner, self.choices = rows, outers, inner, choices
        self.pieces = comm.groups_of_pieces(rows.owners(), choices.timeout)
        # The bytes of one worker as they are sent: its gradients, and its parameters or what it sends in their place.
        self.gradients_payload = self.payload = rows.num_bytes
        if choices.wire_dtype is not None:
            self.payload = progress.num_bytes(rows.num_elements, choices.wire_dtype)

    def begin(self, settings: dict[str, Any], stats: Stats, expected: Standing) -> None:
        """What was loaded into the first worker alone is where a fresh round begins. Settings are compared with those
        who hold pieces of the same worker, if anybody does.

        Raises:
            DisagreementError: on every process, if one was set up differently.
        """
        self.compare_pieces(settings, stats)
        if expected != "apart":
            self.rows.following.begin()

    def compare_pieces(self, settings: dict[str, Any], stats: Stats) -> None:
        """Raise DisagreementError unless all processes that hold pieces of one worker have these settings."""
        for group, _ in self.pieces:
            compare(group, settings, [], stats.local_steps)

    def next_interval(self, decide: Callable[[], int], policy: Policy, stats: Stats) -> int:
        """What the policy says; see share_decision."""
        return decide() if decides_alike(policy) else self.share_decision(decide(), policy, stats)

    def share_decision(self, interval: int, policy: Policy, stats: Stats) -> int:
        """Who holds a worker's first piece decides for its others, on the losses observed there."""
        for group, source in self.pieces:
            group.arrive("choose an interval", stats.local_steps)
            said = interval, policy.state_dict(), stats.val_loss, stats.train_loss, stats.observations
            said = group.broadcast_object(said, source)
            interval, state, stats.val_loss, stats.train_loss, stats.observations = said
            policy.load_state_dict(state)
        return interval

    def warn_of_equal_gradients(self) -> None:
        """There is nobody to have them."""

    def forget_message(self) -> None:
        """Nothing was sent to anybody."""

    def share_anchors(self) -> None:
        """Nobody else has another."""

    def average_gradients(self, stats: Stats, finite: bool, weights: Sequence[float]) -> bool:
        """Give every worker the weighted mean gradient; returns whether the step may be taken."""
        average_gradients_(self.twins(), relative_weights(weights))
        return True

    def mean_loss(self, loss: Any, weight: float) -> Any:
        """Of all processes, each with a weight: this one's."""
        return loss

    def close_round(self, closing: Round) -> Outcome:
        """Average everything that is to be averaged, and take the outer step.

        Raises:
            DivergedError: no worker's parameters are finite; then nothing is written.
        """
        buffers = list(self._collect_buffers().values())
        self.rows.pull()
        finite = self.finite(closing.stats)
        squares = self._average(closing, finite)
        # Without a message to write, the one read from the device: which rows counted, and how far apart they were.
        included, squared_drift = finite.tolist(), squares.tolist()
        if not any(included):
            raise DivergedError(closing.stats.local_steps)
        self.rows.push()
        self._commit(closing.rates)
        payload = self.payload + self._settle(buffers, included)
        drifts = [math.sqrt(square) for square, counts in zip(squared_drift, included, strict=True) if counts]
        drift = sum(drifts) / len(drifts) if closing.reads_drift else math.nan
        return Outcome(drift, included.count(False), payload)

    def send(self, closing: Round) -> tuple[Sending | None, Outcome]:
        """As close_round, but that the workers keep their parameters, and take over at `land` what became of them.

        Where one is left out nothing is left to do: what it computed until then would be lost.
        """
        buffers = list(self._collect_buffers().values())
        self.rows.pull()
        if not self.finite(closing.stats).all():
            return None, self.close_round(closing)
        payload = self.payload + self._settle(buffers, [True] * len(self.rows))
        return self._new_sending(closing, relative_weights(closing.weights)), Outcome(math.nan, 0, payload)

    def _new_sending(self, closing: Round, weights: list[float]) -> Sending:
        sent = [block.rows.clone() for block in self.rows.blocks]
        return Sending(sent, closing.rates, weights, closing.reads_drift)

    def agree_to_land(self, stats: Stats) -> None:
        """Before a `land` that was asked for: here there is nobody to agree with."""

    def go_on(self, sending: Sending, stats: Stats) -> None:
        """Send what follows the first messages; there are none."""

    def land(self, sending: Sending, stats: Stats) -> float:
        """Take the outer step from what was sent, and add what each worker has done since.

        Returns:
            The drift of what was sent, or nan.
        """
        sending.wait()  # a process that is lost is found while the rows are still whole
        self.rows.pull()
        for block, sent in zip(self.rows.blocks, sending.rows, strict=True):
            exchange_with_progress_(block.rows, sent)
        drift = self._take_steps(sending)
        self._commit(sending.rates)  # while the rows are what the anchors are to be
        for block, done_since in zip(self.rows.blocks, sending.rows, strict=True):
            block.rows.add_(done_since)
        self.rows.push()
        return drift

    def _take_steps(self, sending: Sending) -> float:
        finite = torch.ones(len(self.rows), dtype=torch.bool, device=self.rows.blocks[0].rows.device)
        squares = self._average(sending, finite)
        if not sending.reads_drift:
            return math.nan
        return math.fsum(map(math.sqrt, squares.tolist())) / len(self.rows)

    def _average(self, closing: Round | Sending, finite: Tensor) -> Tensor:
        """Take the outer step with the rows that are finite; returns ‖x_k − x̄‖², shape (k,), or zeros."""
        relative = relative_weights(closing.weights)
        weights = finite.to(torch.float32)
        if set(relative) != {1.0}:
            weights *= torch.tensor(relative, dtype=torch.float32, device=weights.device)
        squares = torch.zeros(len(self.rows), dtype=torch.float64, device=finite.device)
        counted = None
        # Of float64 the weights must have all digits too, which those that the kernels take have not.
        wide = any(block.rows.dtype == torch.float64 for block in self.rows.blocks) and set(relative) != {1.0}
        if self.choices.wire_dtype is not None or wide:
            counted = [weight * counts for weight, counts in zip(relative, finite.tolist(), strict=True)]
            if not any(counted):
                return squares
        for block, outer, rates in zip(self.rows.blocks, self.outers, closing.rates, strict=True):
            mean = None
            if counted is not None and (self.choices.wire_dtype is not None or block.rows.dtype == torch.float64):
                mean = torch.empty(
                    block.rows.shape[1], dtype=accumulate_dtype(block.rows.dtype), device=block.rows.device
                )
                if self.choices.wire_dtype is not None:
                    message = progress_of(block, outer, counted, self.choices.wire_dtype)
                    write_mean_of_progress(mean, message, block, outer, math.fsum(counted))
                else:
                    weighted_sum_(mean, block.rows, counted)
                    divide_(mean, math.fsum(counted))
            own = outer.step_(weights.to(block.rows.device), rates, mean, measures=closing.reads_drift)
            if own is not None:
                squares += self.whole(own, block.owner).to(finite.device)
        return squares

    def _commit(self, rates: list[list[float | None]]) -> None:
        """The outer step has been taken."""
        for outer, own in zip(self.outers, rates, strict=True):
            outer.commit(own)

    def _settle(self, buffers: list[list[Tensor]], included: list[bool]) -> int:
        """What a sync does beside the parameters; returns the bytes of one worker's that were sent."""
        payload = module_buffers.merge_(buffers, self.choices.buffers, included)
        payload += self._heal_frozen(included)
        return payload + self._merge_inner_state(included)

    def _heal_frozen(self, included: list[bool]) -> int:
        """Give workers that are left out another's frozen parameters where one of theirs is not finite, such as an
        average of the trained ones that the model keeps; returns the bytes of one worker's that were sent.
        """
        if all(included):
            return 0
        frozen = list(self._healable().values())
        return module_buffers.merge_(itertools.compress(frozen, self._spoilt(frozen, included)), "keep", included)

    def _healable(self) -> dict[str, list[Tensor]]:
        """The frozen parameters that may hold NaN, each in every worker of this process."""
        frozen = self.rows.frozen().items()
        return {n: own for n, own in frozen if own[0].is_floating_point() and module_buffers.obstacle(own[0]) is None}

    def _spoilt(self, frozen: Sequence[Sequence[Tensor]], included: Sequence[bool]) -> list[bool]:
        """Which of these have something not finite, in any of their pieces, in a worker that is left out."""
        flags = torch.tensor(module_buffers.spoilt(frozen, included), dtype=torch.int32, device="cpu")
        flags = flags.to(self.rows.blocks[0].rows.device)
        for group, _ in self.pieces:
            group.reduce_(flags, "max")
        return flags.to(torch.bool).tolist()

    def merge_buffers(self, stats: Stats) -> int:
        """Do with the buffers alone what a sync does; returns the bytes of one worker's that were sent."""
        buffers = self._collect_buffers().values()
        return module_buffers.merge_(buffers, self.choices.buffers, [True] * len(self.rows))

    def finish(self, is_done: Callable[[], bool]) -> None:
        """Wait until the device has ended the messages of a sync, where the host does not: here there are none."""

    def _collect_buffers(self) -> dict[str, list[Tensor]]:
        """Each buffer in every worker of this process, by name."""
        # A worker alone has nobody to agree with, so that no kind of buffer is in its way.
        choice = self.choices.buffers if len(self.rows) * self.num_processes > 1 else "keep"
        return module_buffers.collect(self.rows.modules, choice)

    def finite(self, stats: Stats) -> Tensor:
        """Bool, shape (k,): which rows are finite, in all the pieces that other processes hold too."""
        device = self.rows.blocks[0].rows.device
        finite = torch.ones(len(self.rows), dtype=torch.int32, device=device)
        for block in self.rows.blocks:
            finite *= finite_rows(block.rows, impl=self.choices.impl).to(device)
        if self.choices.inner_state == "average":  # what is not finite there would be given to everybody
            for row, parameters in enumerate(self.rows.parameters):
                for name, parameter in parameters.items():
                    for key, value in self.inner.state.get(parameter, {}).items():
                        if not isinstance(value, Tensor):
                            continue
                        if value.layout != torch.strided:
                            raise ValueError(
                                f"{key} of parameter {name!r} is sparse, which inner_state='average' cannot average: "
                                "choose 'keep' or 'reset'"
                            )
                        if value.is_floating_point():
                            finite[row] *= comm.held_here(value).isfinite().all().to(device)
        for group, _ in self.pieces:
            group.arrive("close a round", stats.local_steps)
            group.reduce_(finite, "min")
        return finite.to(torch.bool)

    def whole(self, squares: Tensor, owner: Tensor | None) -> Tensor:
        """Sums of squares over a block, with those of the pieces that other processes hold."""
        cuts = [] if owner is None else [cut.group_name for cut in comm.cuts_of(owner)]
        for group, _ in self.pieces:
            if group.process_group.group_name in cuts:
                group.reduce_(squares, "sum")
        return squares

    def whether_anywhere(self, flag: Tensor, stats: Stats) -> Tensor:
        """The greatest of what the processes say that hold pieces of one worker; the flag itself stays as it is."""
        flag = flag.clone() if self.pieces else flag
        for group, _ in self.pieces:
            group.arrive("agree whether gradients overflowed", stats.local_steps)
            group.reduce_(flag, "max")
        return flag

    def twins(self) -> list[Twins]:
        """Each parameter in every worker of this process."""
        names = self.rows.parameters[0]
        return [tuple(parameters[name] for parameters in self.rows.parameters) for name in names]

    def _merge_inner_state(self, included: list[bool]) -> int:
        """Apply the choice for the inner state; returns the bytes of one worker's that were sent."""
        if self.choices.inner_state == "average":
            return average_state_(self.inner.state, self.twins(), included)
        self.reset_inner_state(included)
        return 0

    def reset_inner_state(self, included: Sequence[bool]) -> None:
        """Forget the inner state of the workers that are left out, or of all where that was chosen."""
        for parameters, counts in zip(self.rows.parameters, included, strict=True):
            # What drove a row to infinity is still in its momentum.
            everybody = self.choices.inner_state == "reset"
            if everybody or not counts:
                reset_state_(self.inner, parameters.values(), everybody)
