"""LocalSGD: any torch.optim optimizer, with a sync every few steps.

The wrapper counts completed optimizer steps, closes a round when its interval is over, and asks the policy for
the next interval. The workers are the rows of this process (`one_process`) or of a group (`many_processes`); the
arithmetic of a sync is in `outer`, the storage in `flat`.
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, get_args, overload

import torch
from torch import nn

from fastlocal import comm
from fastlocal.buffers import Buffers
from fastlocal.flat import Block, Rows
from fastlocal.inner import InnerState
from fastlocal.local import arguments
from fastlocal.local.checkpoint import Checkpointed
from fastlocal.local.clock import Clock
from fastlocal.local.one_process import Round
from fastlocal.local.scaling import Scaling
from fastlocal.local.sending import Sending
from fastlocal.ops.implementation import Implementation, check_implementation, choose
from fastlocal.outer import AnchoredAverage, Average, Outer
from fastlocal.policy import Policy, Stats, decides_alike, require_interval
from fastlocal.workers import Workers


class LocalSGD(Checkpointed):
    """Let each worker step alone and average their parameters once an interval.

    Wraps an optimizer and is one: hooks, closures, LR schedulers, `state_dict` and `deepcopy` work as on any.
    `param_groups` and `state` are the inner optimizer's own.

    Loading weights: until the first step, weights loaded into worker 0 alone become those of all workers of the
    process; likewise, of workers that have not stepped yet, until the first step after `load_state_dict` of a state
    saved at the end of a round. At any other time load every worker: what you set a parameter to then counts as
    progress of the round. If a forward pass writes to parameters, as that of an embedding with `max_norm` does, load
    before you build this optimizer.

    Parameters that require no gradient when the model is handed over stay each worker's own. A moving average of the
    weights is averaged if it is a buffer.

    Several processes: each holds k rows, and the workers of all are averaged. All build their wrappers in one order,
    and no process one more. Before the first step, and before the
    first one after `load_state_dict`, the processes compare their settings, and where parameters differ, rank 0's
    parameters and buffers replace the others'. Two things are not replaced: kept buffers that cannot be sent, such as
    sparse ones, and, after a state saved in the warm-up, parameters that differ by no more than roundings, 1e-4 of a
    tensor's norm. Rank 0's policy decides for all, on the losses that rank 0 observes. A step that GradScaler skips
    in one process still counts there.

    FSDP2: pass `process_group=mesh.get_group("replicate")`, the group of the mesh dimension across which whole models
    are replicated. DTensors are averaged piece by piece, and rank 0's policy decides for all pieces.

    Args:
        inner: the optimizer that takes the local steps, built over the parameters of all workers.
        model: the workers, or one module (a single worker: nothing to average with in this process).
        interval: local steps between two syncs, or a policy that chooses them.
        inner_state: what a sync does to the inner optimizer's state: "keep" leaves each worker its own, "reset" drops
            it, "average" gives all the mean.
        buffers: what a sync does to module buffers. "average" takes the mean of floating-point ones and the
            maximum of the others, "broadcast" copies the first finite worker's, which spectral_norm and
            fake quantisers need, whose buffers belong together; "keep" leaves each worker its own.
        warmup_steps: average gradients instead of parameters for the first so many steps (post-local SGD).
            A loaded state whose workers have stepped alone is past them.
        impl: how a process averages its rows, looks for values that are not finite and takes the outer step: "triton"
            on CUDA, "portable" in PyTorch, or "reference", the readable definition. "auto" chooses Triton on CUDA for
            up to 32 workers a process, but for float64. Sums over processes and what `wire_dtype` sends are plain
            PyTorch always.
        process_group: the processes that are averaged; the default group if torch.distributed is initialised.
        timeout: seconds that a process waits for the others at a sync before it raises an error that names who is
            missing. Give more where one process evaluates or saves for longer than that between two steps.
        wire_dtype: in which the workers send how far each has come since the last sync, from a copy of where it
            started: torch.bfloat16 takes half the bytes and keeps 8 significant bits, torch.float8_e4m3fn a quarter
            and 4 bits, where each 1,024 neighbours share a power of two: beside one that goes a quarter of a million
            times further a parameter may stand still. A process with several workers sends their sum, which is
            rounded too. What you set parameters to between two syncs counts as such progress. None sends the
            parameters as they are. Buffers, inner state and the gradients of the warm-up are not rounded.
        weights: of each worker of this process in the mean of parameters, and of gradients in the warm-up, such as
            the samples it sees; None weighs all alike. Buffers and inner state are not weighted. The attribute may be
            set between rounds. It is not part of the state_dict: it belongs to this process's data, which another
            number of processes cuts otherwise.
        overlap_steps: local steps of the next round that the messages of a sync may take. The workers go on, then
            take over what became of the sync, and add what they have done since; a copy of each worker's parameters
            and the message are kept meanwhile. From the first sync on the workers are apart until you call `sync()`,
            in all processes, which ends all that is under way: call it before you load, evaluate, take the mean, and
            at the end. `stats.drift` is as late as the parameters, buffers and inner state are not; a sync that
            leaves a worker out ends at once. Needs one optimizer for all parameters, and a policy that does not read
            the drift; one that sends messages (ValidationLoss, AdaComm) may wait behind those of the sync. With a
            `wire_dtype` two messages follow each other, the second after half of the steps.

    Attributes:
        stats: what was counted so far, see Stats.
        steps_in_round: local steps since the last sync.
        policy: what chooses the interval; it may be set between rounds, in all processes alike.
        num_workers: in all processes.

    Raises:
        ValueError: a value is out of its range, a parameter of `inner` does not belong to `model`, or with
            `overlap_steps` the policy reads the drift or a parameter is not in `inner`.
        TypeError: an argument is of the wrong kind.
        RuntimeError: `impl` cannot run where the parameters are.

    References:
        Stich, `Local SGD Converges Fast and Communicates Little <https://arxiv.org/abs/1805.09767>`_, 2019
    """

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
        process_group: Any = None,
        timeout: float = 300.0,
        wire_dtype: torch.dtype | None = None,
        weights: Sequence[float] | None = None,
        overlap_steps: int = 0,
    ) -> None:
        arguments.check_choice("inner_state", inner_state, get_args(InnerState))
        arguments.check_choice("buffers", buffers, get_args(Buffers))
        check_implementation(impl)
        arguments.check_steps("warmup_steps", warmup_steps)
        arguments.check_steps("overlap_steps", overlap_steps)
        arguments.check_model(model)
        arguments.check_wire_dtype(wire_dtype)
        timeout = arguments.as_float("timeout", timeout)
        policy = arguments.policy_of(interval)
        super().__init__(inner)
        self.overlap_steps = overlap_steps
        self.policy = policy
        self.rows = model.rows if isinstance(model, Workers) else Rows([model])
        if overlap_steps and (left_out := self.rows.parameters[0].keys() - self.rows.stepped_by(inner)):
            raise ValueError(
                f"overlap_steps needs an inner that steps all parameters of the model, and {min(left_out)!r} is in "
                "none of its groups: two optimizers would each add what the other has averaged"
            )
        for block in self.rows.blocks:
            choose(impl, block.rows.device, block.rows.dtype)  # raises here, not at the first sync
        self.rows.following.catch_up()  # a forward pass before the first step may write to parameters
        self.inner_state: InnerState = inner_state
        self.buffers: Buffers = buffers
        self.warmup_steps = warmup_steps
        self.impl: Implementation = impl
        self.wire_dtype = wire_dtype
        self.weights = weights
        self.stats = Stats()
        self.steps_in_round = 0
        self._anchored = self._round_is_open = self._buffers_apart = False
        self._rows_saved = []
        self._sending = None
        self._chose_group, self._timeout = process_group is not None, timeout
        self._group = comm.find_group(process_group, timeout, [block.rows.device for block in self.rows.blocks])
        self._assemble()

    def _make_outer(self, block: Block) -> Outer:
        return (Average if self.wire_dtype is None else AnchoredAverage)(block.rows, impl=self.impl)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # GradScaler then calls step() whether or not this process's gradients overflowed: all must count alike.
        return self._team.num_processes > 1

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the inner optimizer; its parameters must belong to the model.

        Raises:
            ValueError: one does not, or not every worker's is in the group.
        """
        super().add_param_group(param_group)
        if hasattr(self, "_rates"):  # not while the base class is being built
            try:
                self._rates.find_groups()
            except ValueError:
                self.param_groups.pop()
                raise
            if self._compared:
                self.rows.begin(self.inner)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one local step with every worker; sync if the interval is over.

        Args:
            closure: evaluates the model and returns the loss, as torch.optim takes it.

        Returns:
            What the closure returned; of a step of the warm-up with L-BFGS the mean over the processes.

        Raises:
            DivergedError: a sync was due and no worker's parameters are finite.
            LostRankError: a process has ended or stalled; seen at the first step, and where a round begins or closes.
            DisagreementError: the processes differ in settings or step counts; likewise.
            RuntimeError: a parameter has left its row, buffers differ or cannot be averaged, a gradient of the
                warm-up is sparse, the model is under DistributedDataParallel without its no_sync(), or
                torch.distributed was initialised after this optimizer was built.
            TypeError: the policy's interval is no int.
            ValueError: it is below 1.
        """
        # In a loaded state the workers may have stepped alone: their momenta differ, and would take a mean gradient
        # to different places.
        warming_up = self.stats.local_steps < self.warmup_steps and not self._anchored
        if not self._round_is_open:
            self._begin_round(warming_up)
        else:
            self._compare()  # a state that was saved within a round has been loaded
        seen = self._rates.look(self.steps_in_round)
        if warming_up:
            loss = self._step_together(closure)
            self._rates.note(0, *seen)
        else:
            loss = self.inner.step(closure) if closure else self._scaling().step(self.inner)
            self._rates.note(self.steps_in_round, *seen)
            self.steps_in_round += 1
            if self.stats.local_steps == 0:  # after the step, since a closure brings gradients
                self._team.warn_of_equal_gradients()
        self.stats.local_steps += 1
        self.stats.bytes_synchronous += self._ring(self.rows.num_bytes)
        if self._sending is not None:
            self._receive(self._sending)
        if self.steps_in_round >= self.stats.interval:
            self._close(overlaps=self.overlap_steps > 0)
        return loss

    def _begin_round(self, warming_up: bool) -> None:
        if self.stats.local_steps == 0:
            self.rows.check()
        self._compare()
        self.stats.lr = max(float(group["lr"]) for group in self.param_groups)
        if warming_up:
            if decides_alike(self.policy):
                self.policy.next_interval(self.stats)  # it may follow the rate; this answer is not used
        else:
            if not self._anchored or self._rows_saved:
                self._anchor()
            self.stats.interval = self._team.next_interval(self._decide, self.policy, self.stats)
        self._round_is_open = True

    def _anchor(self) -> None:
        """The rows are where the outer steps begin, unless a loaded state's anchors are of the same rows."""
        self.rows.pull()
        if not self._anchored or self._rows_saved != self._checksums():
            for outer in self._outers:
                outer.begin()
        # Processes' rows differ in the last digit after steps together, and by a step where another optimizer began.
        if self.stats.local_steps or self.rows.others_have_begun(self.inner):
            self._team.share_anchors()
        self._anchored, self._rows_saved = True, []

    def _decide(self) -> int:
        interval = self.policy.next_interval(self.stats)
        return require_interval(f"the interval from {type(self.policy).__name__}", interval)

    def _compare(self) -> None:
        """Once: find out whether all processes agree."""
        if self._compared:
            return
        if self._group is None and not self._chose_group and comm.several_processes_run():
            raise RuntimeError(
                "torch.distributed was initialised after this optimizer was built, which averages the workers of "
                "this process alone: build it after init_process_group"
            )
        # Steps together may leave the processes apart in the last digits; at a round's end all rows are equal.
        exact = self.stats.local_steps == 0 or self._anchored
        expected = "apart" if self.steps_in_round or self._sending is not None else "equal" if exact else "close"
        self._team.begin(self._settings(), self.stats, expected)
        self._compared = True

    def _settings(self) -> dict[str, Any]:
        """What must be the same in every process."""
        return {
            "method": self._method,
            "policy": type(self.policy).__name__,
            **arguments.plain_settings(self.policy),
            "inner_state": self.inner_state,
            "buffers": self.buffers,
            "warmup_steps": self.warmup_steps,
            "wire_dtype": str(self.wire_dtype),
            "overlap_steps": self.overlap_steps,
            "a sync is under way": self._sending is not None,
            "workers a process": len(self.rows),
            "processes": self._team.num_processes,
            "local steps": self.stats.local_steps,
            "steps in the round": self.steps_in_round,
        }

    def _step_together(self, closure: Callable[[], float] | None) -> float | None:
        """A synchronous step: the gradients are averaged, and every worker takes the same step."""
        if closure is None:
            loss = self.inner.step() if self._average_gradients() else None
        else:

            def averaged_closure() -> float:
                loss = closure()
                self._average_gradients()
                if isinstance(self.inner, torch.optim.LBFGS):  # it looks at it, and would take other steps elsewhere
                    return self._team.mean_loss(loss, math.fsum(self._weights_or_ones()))
                return loss

            loss = self.inner.step(averaged_closure)
        self.stats.rounds += 1
        self._round_is_open, self._buffers_apart = False, True
        return loss

    def _scaling(self) -> Scaling:
        return Scaling(self, lambda flag: self._team.whether_anywhere(flag, self.stats))

    def _average_gradients(self) -> bool:
        """Give every worker the mean gradient; returns whether the step may be taken."""
        if self.stats.local_steps == 0:
            self._team.warn_of_equal_gradients()
        started = time.perf_counter()
        scaling = self._scaling()
        finite = not scaling.overflowed()
        if finite:
            scaling.unscale_(self.inner)
        agreed = self._team.average_gradients(self.stats, finite, self._weights_or_ones())
        self.stats.bytes_on_wire += self._ring(self._team.gradients_payload) if agreed else 0
        self.stats.seconds_in_sync += time.perf_counter() - started
        return agreed

    @torch.inference_mode(False)  # what is made inside and kept could never be written again outside
    @torch.no_grad()
    def sync(self) -> None:
        """Close the round under way, even if it is not full; without a step since the last sync, do nothing.

        After steps of the warm-up, which leave the parameters equal, it merges the buffers alone. A worker
        whose parameters are not all finite is left out of the mean and goes on from it. With `overlap_steps` it ends
        the sync that is under way too.

        Raises:
            DivergedError: no worker's parameters are finite; then nothing is written.
            LostRankError: a process has ended or stalled.
            DisagreementError: the processes are not at the same step.
            RuntimeError: a parameter has left its row, buffers differ or cannot be averaged, or torch.distributed was
                initialised after this optimizer was built.
        """
        if self._sending is not None:
            self._compare()
            self._team.agree_to_land(self.stats)
            self._land(self._sending)
        if self.steps_in_round:
            self._close(overlaps=False)
        elif self._buffers_apart:
            self._compare()
            self.stats.bytes_on_wire += self._ring(self._team.merge_buffers(self.stats))
            self._buffers_apart = False

    @torch.inference_mode(False)
    @torch.no_grad()
    def _close(self, overlaps: bool) -> None:
        """Close the round, and wait for what becomes of it unless it may come later."""
        self._compare()
        clock = Clock(self.rows.blocks[0].rows.device)
        self.rows.check()
        reads_drift = getattr(self.policy, "reads_drift", True)
        rates = self._rates.of_blocks()
        closing = Round(self.stats, self.steps_in_round, self._weights_or_ones(), rates, reads_drift)
        if overlaps:
            self._sending, outcome = self._team.send(closing)
        else:
            outcome = self._team.close_round(closing)
        self.stats.round_steps, self.steps_in_round = self.steps_in_round, 0
        self._round_is_open = self._buffers_apart = False
        self.stats.rounds += 1
        if self._sending is None:
            self.stats.drift = outcome.drift
        self.stats.excluded += outcome.excluded
        self.stats.bytes_on_wire += self._ring(outcome.payload)
        self._count(clock)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _receive(self, sending: Sending) -> None:
        """Of a sync that is under way what is due after this step."""
        due = min(self.overlap_steps, self.stats.interval)
        if self.steps_in_round >= due:
            self._land(sending)
        elif self.steps_in_round == (due + 1) // 2:
            clock = Clock(self.rows.blocks[0].rows.device)
            self._team.go_on(sending, self.stats)
            self._count(clock)

    def _land(self, sending: Sending) -> None:
        """End the sync that is under way."""
        clock = Clock(self.rows.blocks[0].rows.device)
        self.rows.check()
        self.stats.drift = self._team.land(sending, self.stats)
        self._sending = None
        self._count(clock)

    def _count(self, clock: Clock) -> None:
        clock.stop()
        self._team.finish(clock.is_done)
        self.stats.seconds_in_sync += clock.seconds()

    def observe(self, *, val_loss: float | None = None, train_loss: float | None = None) -> None:
        """Tell the policy a loss, once an epoch and after sync(); it counts from the next round on.

        The policy is asked when a round begins: of losses observed within one round it sees the last alone.
        In several processes only what rank 0 observes counts, and is sent to the others where the policy needs it.

        Raises:
            TypeError: a loss is no number.
            ValueError: it is not finite; then neither is taken.
        """
        for name, loss in (("val_loss", val_loss), ("train_loss", train_loss)):
            if loss is not None and not math.isfinite(arguments.as_float(name, loss)):
                if self._group is not None and self._group.rank != 0:  # a worker that will be left out and healed
                    return
                raise ValueError(f"{name} must be finite, got {loss}: training has diverged")
        if val_loss is not None:
            self.stats.val_loss, self.stats.observations = float(val_loss), self.stats.observations + 1
        if train_loss is not None:
            self.stats.train_loss = float(train_loss)

    def _ring(self, payload: int) -> int:
        return comm.ring_bytes(payload, self.num_workers)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.num_workers} workers, interval {self.stats.interval}, {self.inner!r})"
