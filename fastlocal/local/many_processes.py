"""A sync among the workers of several processes: k rows in each.

Messages of a round: a header when it begins (and the policy's state if it has changed), a header when it closes,
then one flat all-reduce for each block of rows, and one for each dtype of what else is averaged; where the workers go
on meanwhile, the rows' come last. In low precision parameters take an all-to-all and an all-gather instead, but for
bfloat16 between two.
"""

import itertools
import math
import pickle
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlocal import comm
from fastlocal.comm import Group, Sum
from fastlocal.flat import Rows
from fastlocal.local.alike import are_alike, are_close, share_rows, share_states, take_first_, warn_of_equal_gradients
from fastlocal.local.meeting import BEGIN, CLOSE, COMPARE, GRADIENTS, LAND, LOADED, Header, compare, meet
from fastlocal.local.one_process import Choices, DivergedError, OneProcess, Outcome, Round, Standing
from fastlocal.local.rates import checksum_of
from fastlocal.local.sending import Sending
from fastlocal.local.shared_buffers import merge_across_
from fastlocal.local.shared_gradients import average_gradients_across_
from fastlocal.local.shared_rows import SharedRows
from fastlocal.local.shared_state import average_state_across_
from fastlocal.ops import averaging as ops
from fastlocal.outer import Outer, SlowMomentum
from fastlocal.policy import Policy, Stats, decides_alike


class _Agreed(NamedTuple):
    """What all processes know of a round that they close."""

    closing: Round
    buffers: list[list[Tensor]]  # those that are sent
    included: list[list[bool]]  # of each process, whether its rows count
    weights: list[float]  # relative ones, of all rows


class ManyProcesses(OneProcess):
    """The workers are the rows of all processes in a group.

    Args:
        rows: the parameters of this process's workers.
        outers: what the mean of each block becomes.
        inner: the optimizer of the local steps.
        choices: what the user chose.
        group: the processes.

    Raises:
        ValueError: the group's processes hold pieces of one and the same worker.
    """

    def __init__(
        self,
        rows: Rows,
        outers: list[Outer],
        inner: torch.optim.Optimizer,
        choices: Choices,
        group: Group,
    ) -> None:
        super().__init__(rows, outers, inner, choices)
        self.group = group
        self.num_processes = len(group)
        # Low precision travels as float32.
        self.gradients_payload = sum(
            parameter.numel() * ops.accumulate_dtype(parameter.dtype).itemsize
            for parameter in rows.parameters[0].values()
        )
        if choices.wire_dtype is None:
            self.payload = self.gradients_payload
        self.shared = SharedRows(group, choices.wire_dtype)
        self._last_message: bytes | None = None
        self._has_compared = False
        self._healed: list[str] = []
        for owner in rows.owners():
            shared = sorted(comm.ranks_on_mesh(owner) & set(group.ranks))
            if len(shared) > 1:
                raise ValueError(
                    f"process_group must hold one process of each worker, but the ranks {shared} hold pieces of the "
                    "same one: give the group of the other mesh dimension, such as mesh.get_group('replicate')"
                )

    def begin(self, settings: dict[str, Any], stats: Stats, expected: Standing) -> None:
        """Compare settings and tensors; where a fresh round's rows differ, all begin from the first process's first,
        except for what another optimizer over the same rows has stepped. Where they need only be close, differences
        no larger than roundings stay.

        Equal rows are left alone, and so are buffers then: they hold the first batch's statistics already. Gradients
        of rows that were replaced, which were computed elsewhere, become zero.

        Raises:
            DisagreementError: on every process, if one was set up differently.
            RuntimeError: DistributedDataParallel averages the gradients of every step.
        """
        if comm.averages_gradients(self.rows.modules, self.group.ranks):
            raise RuntimeError(
                "the model is under DistributedDataParallel, which averages the gradients of every step: call "
                "forward and backward inside of its no_sync(), or hand over and call the module that it holds"
            )
        slots = [
            (slot.name, tuple(slot.shape), slot.stride, str(block.rows.dtype))
            for block in self.rows.blocks
            for slot in block.slots
        ]
        buffers, frozen = self._sent_buffers(), self.rows.frozen()
        others = [*buffers.items(), *frozen.items()]
        kinds = [(name, tuple(own[0].shape), str(own[0].dtype)) for name, own in others]
        purpose = LOADED if self._has_compared else COMPARE
        compare(self.group, settings, slots + kinds, stats.local_steps, purpose)
        self._has_compared = True
        self._healed = list(self._healable())  # the same in all processes; one may freeze or add others later
        self.compare_pieces(settings, stats)
        if stats.local_steps:
            share_states(self.outers, self.group)
        begin = self.rows.begin(self.inner)
        if expected != "apart":
            self.rows.pull()
            parts = {
                slot.name: block.rows[:, slot.start : slot.stop]
                for block in self.rows.blocks
                for slot in block.slots
                if slot.name in begin
            }
            twins = [[*part] for part in parts.values()] + list(frozen.values())
            if stats.local_steps:  # between two rounds only what this optimizer steps is equal for certain
                stepped = self.rows.stepped_by(self.inner)
                twins = [[*part] for name, part in parts.items() if name in stepped]
            alike = are_alike(twins, self.group) or (expected == "close" and are_close(twins, self.group))
            if not alike:
                share_rows(self.rows, list(parts.values()), self.group)
                for own in frozen.values():
                    take_first_(own, self.group)
                merged = [*buffers.values(), *self._kept_buffers()]
                merge_across_(merged, "broadcast", [[True] * len(self.rows)] * len(self.group), self.group)

    def next_interval(self, decide: Callable[[], int], policy: Policy, stats: Stats) -> int:
        """What the policy of the first process says; the others' policies and losses become equal to its."""
        if decides_alike(policy):
            return decide()  # an interval that differs after all is found when the round closes
        first, interval, message = self.group.rank == 0, 0, b""
        if first:
            interval = decide()
            message = pickle.dumps((policy.state_dict(), stats.val_loss, stats.train_loss, stats.observations))
            self._last_message, message = message, b"" if message == self._last_message else message
        header = self._header(stats, 0)._replace(interval=interval, message_bytes=len(message))
        said = meet(self.group, BEGIN, header)[0]
        if said.message_bytes:
            packed = self.group.broadcast_bytes(message if first else None, said.message_bytes, source=0)
            if not first:
                state, stats.val_loss, stats.train_loss, stats.observations = pickle.loads(packed)
                policy.load_state_dict(state)
        return self.share_decision(said.interval, policy, stats)

    def warn_of_equal_gradients(self) -> None:
        """Before any are averaged here: something else may do that, or all may read the same data."""
        warn_of_equal_gradients(self.rows, self.group)

    def forget_message(self) -> None:
        """The others' policies may have changed: send the state again."""
        self._last_message = None

    def share_anchors(self) -> None:
        """Take the first process's anchors: where they differ, ranks that add the same progress never meet again."""
        for outer in self.outers:
            if outer.anchor is not None:
                self.group.broadcast_(outer.anchor, source=0)

    def average_gradients(self, stats: Stats, finite: bool, weights: Sequence[float]) -> bool:
        """Give every worker the weighted mean gradient, unless one process's overflowed: then nobody steps."""
        headers = meet(self.group, GRADIENTS, self._header(stats, 0, [finite] * len(self.rows), weights))
        if not all(flag for header in headers for flag in header.flags):
            return False
        everybody = ops.relative_weights([weight for header in headers for weight in header.weights])
        own = self._own_of(everybody)
        total = math.fsum(everybody)
        for block in self.rows.blocks:
            wire = self.shared.wire(block, extra=len(block.slots))
            average_gradients_across_(self.rows, block, own, total, wire, self.group)
        return True

    def mean_loss(self, loss: Any, weight: float) -> Any:
        """Of all processes, each with a weight; it follows right after average_gradients."""
        own = float(loss.detach() if isinstance(loss, Tensor) else loss)
        weights, products = zip(*self.group.gather([weight, weight * own]), strict=True)
        mean = math.fsum(products) / math.fsum(weights)
        return loss.new_tensor(mean) if isinstance(loss, Tensor) else mean

    def close_round(self, closing: Round) -> Outcome:
        """Average everything that is to be averaged, and take the outer step.

        Raises:
            DivergedError: on every process, if no worker's parameters are finite; then nothing is written.
            DisagreementError: on every process, if they are not at the same step.
        """
        return self._close(self._agree(closing))

    def send(self, closing: Round) -> tuple[Sending | None, Outcome]:
        """As close_round, but that the workers keep their parameters, and take over at `land` what became of them.

        Where one is left out nothing is left to do: what it computed until then would be lost.
        """
        agreed = self._agree(closing)
        if not all(map(all, agreed.included)):
            return None, self._close(agreed)
        payload = self._settle_across(agreed)  # first: it would wait behind the sums
        sending = self._new_sending(agreed.closing, agreed.weights)
        sending.sums = self.shared.begin_sums(
            self.rows.blocks, self.outers, self._own_of(agreed.weights), math.fsum(agreed.weights)
        )
        return sending, Outcome(math.nan, 0, payload)

    def agree_to_land(self, stats: Stats) -> None:
        """Before a `land` that was asked for, not one that is due: find that all have come to it.

        Raises:
            DisagreementError: on every process, if they are not at the same step.
        """
        meet(self.group, LAND, self._header(stats, 0))

    def go_on(self, sending: Sending, stats: Stats) -> None:
        """Send what follows the first messages."""
        self.group.arrive("go on with a sync", stats.local_steps)
        sending.go_on()

    def land(self, sending: Sending, stats: Stats) -> float:
        """See OneProcess."""
        self.group.arrive("end a sync", stats.local_steps)
        return super().land(sending, stats)

    def _agree(self, closing: Round) -> _Agreed:
        """Meet, and find that all close the same round; the rows are what each worker has."""
        buffers = list(self._sent_buffers().values())
        self.rows.pull()
        header = self._header(closing.stats, closing.steps, self.finite(closing.stats).tolist(), closing.weights)
        rates = self._rates_read(closing.rates)
        header = header._replace(
            rates=math.fsum(rates),
            order_of_rates=checksum_of(rates),
            resting=self._checksum_of_resting(closing.rates),
            slow_lr=getattr(self.outers[0], "slow_lr", 0.0),
            slow_momentum=getattr(self.outers[0], "slow_momentum", 0.0),
            elements=sum(own[0].numel() for own in buffers),
            reads_drift=int(closing.reads_drift),
        )
        headers = meet(self.group, CLOSE, header)
        closing = closing._replace(reads_drift=any(h.reads_drift for h in headers))
        included = [list(header.flags) for header in headers]
        counted = [w * counts for h in headers for w, counts in zip(h.weights, h.flags, strict=True)]
        if not any(counted):
            raise DivergedError(closing.stats.local_steps)
        return _Agreed(closing, buffers, included, ops.relative_weights(counted))

    def _close(self, agreed: _Agreed) -> Outcome:
        drift = self._average_rows(agreed.closing, agreed.weights)
        self.rows.push()
        self._commit(agreed.closing.rates)
        return Outcome(drift, sum(flags.count(False) for flags in agreed.included), self._settle_across(agreed))

    def _take_steps(self, sending: Sending) -> float:
        return self._average_rows(sending, sending.weights, sending.sums)

    def _settle_across(self, agreed: _Agreed) -> int:
        """What a sync does beside the parameters; returns the bytes of one worker's that were sent, with theirs."""
        included = agreed.included
        # Who is left out takes over those of others that each keeps.
        kept = [] if all(map(all, included)) else self._kept_buffers()
        payload = self.payload
        payload += merge_across_([*agreed.buffers, *kept], self.choices.buffers, included, self.group)
        payload += self._heal_frozen_across(included)
        if self.choices.inner_state == "average":
            return payload + average_state_across_(self.inner, self.rows, included, self.group)
        self.reset_inner_state(included[self.group.rank])
        return payload

    def _heal_frozen_across(self, included: list[list[bool]]) -> int:
        if not self._healed or all(map(all, included)):
            return 0
        present = self._healable()
        frozen = [present[name] for name in self._healed]
        flags = zip(*self.group.gather(self._spoilt(frozen, included[self.group.rank])), strict=True)
        return merge_across_(list(itertools.compress(frozen, map(any, flags))), "keep", included, self.group)

    def merge_buffers(self, stats: Stats) -> int:
        """Do with the buffers alone what a sync does; returns the bytes of one worker's that were sent."""
        buffers = list(self._sent_buffers().values())
        elements = sum(own[0].numel() for own in buffers)
        headers = meet(self.group, CLOSE, self._header(stats, 0)._replace(elements=elements))
        included = [[True] * len(header.flags) for header in headers]
        return merge_across_(buffers, self.choices.buffers, included, self.group)

    def _sent_buffers(self) -> dict[str, list[Tensor]]:
        """Those of each worker of this process that every sync sends, by name."""
        return {} if self.choices.buffers == "keep" else self._collect_buffers()

    def _kept_buffers(self) -> list[list[Tensor]]:
        """Where workers keep their own: those that all have in one shape, in one order in every process."""
        if self.choices.buffers != "keep":
            return []
        own = {(n, tuple(b[0].shape), str(b[0].dtype)): b for n, b in self._collect_buffers().items()}
        everybody = [set(kinds) for kinds in self.group.gather_objects(list(own))]
        return [own[kind] for kind in sorted(own) if all(kind in kinds for kinds in everybody)]

    def finish(self, is_done: Callable[[], bool]) -> None:
        """Wait until the device has ended the messages of a sync, where the host does not.

        Raises:
            LostRankError: it does not.
        """
        if self.group.in_stream_order:
            self.group.finish(is_done)

    def _average_rows(
        self, closing: Round | Sending, weights: list[float], sums: Sequence[Sum] | None = None
    ) -> float:
        """Rows become what the outer step makes of their mean over all processes; returns the drift or nan.

        Args:
            closing: the round.
            weights: relative ones, of all processes' rows, 0 for those that do not count.
            sums: those of the blocks where they were begun before.
        """
        own, total, alike = self._own_of(weights), math.fsum(weights), len(set(weights)) == 1
        measures = closing.reads_drift
        counts = torch.tensor([float(weight > 0) for weight in own], dtype=torch.float32, device="cpu")
        squares = torch.zeros(len(own), dtype=torch.float64, device="cpu")
        for index, (block, outer, rates) in enumerate(zip(self.rows.blocks, self.outers, closing.rates, strict=True)):
            if sums is None and not measures and self.shared.can_average_in_place(block):
                self.shared.average_in_place_(block, own, total, alike)
                outer.step_from_mean_(rates)
                continue
            begun = self.shared.begin_sum(block, outer, own, total) if sums is None else sums[index]
            mean = self.shared.mean_of(begun, block, outer, total)
            parts = outer.step_(counts.to(block.rows.device), rates, mean, measures=measures)
            if parts is not None:
                squares += self.whole(parts, block.owner).cpu()
        if not measures:
            return math.nan
        drifts = [math.sqrt(square) for square, weight in zip(squares.tolist(), own, strict=True) if weight]
        everybody = self.group.gather([math.fsum(drifts), len(drifts)])
        return math.fsum(drift for drift, _ in everybody) / sum(number for _, number in everybody)

    def _own_of(self, everybody: list[float]) -> list[float]:
        """This process's part of a list with an entry a worker."""
        k = len(self.rows)
        return everybody[self.group.rank * k : (self.group.rank + 1) * k]

    def _rates_read(self, rates: list[list[float | None]]) -> list[float]:
        """By the outer step, parameter by parameter."""
        if not any(isinstance(outer, SlowMomentum) and outer.form == "lr-scaled" for outer in self.outers):
            return []
        return [rate for own in rates for rate in own if rate is not None]

    def _checksum_of_resting(self, rates: list[list[float | None]]) -> int:
        """Of which parameters take no outer step; 0 if all do, or there is none."""
        rest = [rate is None for own in rates for rate in own]
        takes_steps = any(isinstance(outer, SlowMomentum) for outer in self.outers)
        return zlib.crc32(bytes(rest)) if takes_steps and any(rest) else 0

    def _header(
        self,
        stats: Stats,
        steps_in_round: int,
        flags: Sequence[bool] | None = None,
        weights: Sequence[float] | None = None,
    ) -> Header:
        ones = [1] * len(self.rows)
        return Header(
            stats.rounds,
            stats.local_steps,
            steps_in_round,
            flags=tuple(map(bool, flags or ones)),
            weights=tuple(map(float, weights or ones)),
        )
