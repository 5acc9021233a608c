"""Outer steps with slow momentum: SlowMo and DiLoCo."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fastlocal.buffers import Buffers
from fastlocal.flat import Block
from fastlocal.inner import InnerState
from fastlocal.local.arguments import checked_slow_lr, checked_slow_momentum
from fastlocal.local.kept import Kept
from fastlocal.local.local_sgd import LocalSGD
from fastlocal.local.rates import checksum_of
from fastlocal.ops.implementation import Implementation
from fastlocal.outer import Form, Outer, SlowMomentum
from fastlocal.policy import Policy
from fastlocal.workers import Workers


class SlowMo(LocalSGD):
    """LocalSGD with slow momentum: x ← anchor − αv, v ← β(γ_t/γ_{t−1})v + (anchor − x̄).

    γ_t is the inner learning rate, its mean over the round, and γ_{t−1} that of the last round where it was positive;
    in a round at rate 0, v is neither applied nor lost. α = 1 and β = 0 give LocalSGD; one worker and β = 0 give
    Lookahead.

    Args:
        inner: the optimizer that takes the local steps, built over the parameters of all workers.
        model: the workers, or one module.
        interval: local steps between two syncs, or a policy that chooses them.
        slow_lr: α, positive.
        slow_momentum: β, in [0, 1). The more workers, the larger: 0.2 to 0.6 are usual.
        inner_state: "keep", "reset" or "average", see LocalSGD.
        buffers: what a sync does to module buffers, see LocalSGD.
        warmup_steps: average gradients instead of parameters for the first so many steps.
        impl: how the outer step is carried out: "auto", "triton", "portable" or "reference", see LocalSGD.
        process_group: the processes that are averaged, see LocalSGD.
        timeout: seconds that a process waits for the others at a sync.
        wire_dtype: in which the workers' progress is sent, see LocalSGD; None sends the parameters.
        weights: of each worker of this process in the mean, see LocalSGD.
        overlap_steps: local steps of the next round that the messages of a sync may take, see LocalSGD.

    Raises:
        ValueError: a value is out of its range, or a parameter of `inner` does not belong to `model`.
        TypeError: an argument is of the wrong kind.
        RuntimeError: `impl` cannot run where the parameters are.

    References:
        Wang et al., `SlowMo <https://arxiv.org/abs/1910.00643>`_, 2020, algorithm 1
    """

    _form: Form = "lr-scaled"
    _own_attributes = (*LocalSGD._own_attributes, "_slow_lr", "_slow_momentum")
    _slow_lr = Kept[float]()
    _slow_momentum = Kept[float]()

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        model: nn.Module | Workers,
        interval: int | Policy,
        *,
        slow_lr: float = 1.0,
        slow_momentum: float = 0.5,
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
        self._slow_lr = checked_slow_lr(slow_lr)
        self._slow_momentum = checked_slow_momentum(slow_momentum)
        super().__init__(
            inner,
            model,
            interval,
            inner_state=inner_state,
            buffers=buffers,
            warmup_steps=warmup_steps,
            impl=impl,
            process_group=process_group,
            timeout=timeout,
            wire_dtype=wire_dtype,
            weights=weights,
            overlap_steps=overlap_steps,
        )

    @property
    def slow_lr(self) -> float:
        """α; it may be set between rounds, in all processes alike, and counts for the syncs that end after that."""
        return self._slow_lr

    @slow_lr.setter
    def slow_lr(self, slow_lr: float) -> None:
        self._slow_lr = checked_slow_lr(slow_lr)
        for outer in self._momenta:
            outer.slow_lr = self._slow_lr

    @property
    def slow_momentum(self) -> float:
        """β; it may be set between rounds, in all processes alike, and counts for the syncs that end after that."""
        return self._slow_momentum

    @slow_momentum.setter
    def slow_momentum(self, slow_momentum: float) -> None:
        self._slow_momentum = checked_slow_momentum(slow_momentum)
        for outer in self._momenta:
            outer.slow_momentum = self._slow_momentum

    @property
    def _momenta(self) -> list[SlowMomentum]:
        """What takes the outer steps; none before the optimizer is put together."""
        return [outer for outer in getattr(self, "_outers", ()) if isinstance(outer, SlowMomentum)]

    def _saved(self) -> dict[str, Any]:
        return super()._saved() | self._slow_settings()

    def _younger_entries(self, own: dict[str, Any]) -> dict[str, Any]:
        return super()._younger_entries(own) | self._slow_settings()

    def _check_saved(self, own: dict[str, Any]) -> None:
        super()._check_saved(own)
        checked_slow_lr(own["slow_lr"])
        checked_slow_momentum(own["slow_momentum"])

    def _restore(self, own: dict[str, Any]) -> None:
        super()._restore(own)
        self.slow_lr, self.slow_momentum = own["slow_lr"], own["slow_momentum"]

    def _make_outer(self, block: Block) -> Outer:
        return SlowMomentum(
            block.rows,
            [(slot.start, slot.stop) for slot in block.slots],
            slow_lr=self.slow_lr,
            slow_momentum=self.slow_momentum,
            form=self._form,
            impl=self.impl,
        )

    def _settings(self) -> dict[str, Any]:
        # DiLoCo reads no rates: its processes may have unlike ones.
        read = [rate for outer in self._momenta if outer.form == "lr-scaled" for rate in outer.last_rates]
        return super()._settings() | self._slow_settings() | {"checksum of last rates": checksum_of(read)}

    def _slow_settings(self) -> dict[str, float]:
        return {"slow_lr": self.slow_lr, "slow_momentum": self.slow_momentum}


class DiLoCo(SlowMo):
    """LocalSGD with an outer Nesterov step on the pseudo-gradient Δ = anchor − x̄, as DiLoCo takes it.

    v ← βv + Δ; x ← anchor − α(Δ + βv): torch.optim.SGD(lr=α, momentum=β, nesterov=True) on Δ.

    Args:
        inner: the optimizer that takes the local steps, built over the parameters of all workers.
        model: the workers, or one module.
        interval: local steps between two syncs, or a policy that chooses them.
        slow_lr: α, positive.
        slow_momentum: β, in [0, 1).
        inner_state: "keep", "reset" or "average", see LocalSGD.
        buffers: what a sync does to module buffers, see LocalSGD.
        warmup_steps: average gradients instead of parameters for the first so many steps.
        impl: how the outer step is carried out: "auto", "triton", "portable" or "reference", see LocalSGD.
        process_group: the processes that are averaged, see LocalSGD.
        timeout: seconds that a process waits for the others at a sync.
        wire_dtype: in which the workers' progress is sent, see LocalSGD; None sends the parameters.
        weights: of each worker of this process in the mean, see LocalSGD.
        overlap_steps: local steps of the next round that the messages of a sync may take, see LocalSGD.

    Raises:
        ValueError: a value is out of its range, or a parameter of `inner` does not belong to `model`.
        TypeError: an argument is of the wrong kind.
        RuntimeError: `impl` cannot run where the parameters are.

    References:
        Douillard et al., `DiLoCo <https://arxiv.org/abs/2311.08105>`_, 2023, algorithm 1
    """

    _form: Form = "nesterov"

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        model: nn.Module | Workers,
        interval: int | Policy,
        *,
        slow_lr: float = 0.7,
        slow_momentum: float = 0.9,
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
        super().__init__(
            inner,
            model,
            interval,
            slow_lr=slow_lr,
            slow_momentum=slow_momentum,
            inner_state=inner_state,
            buffers=buffers,
            warmup_steps=warmup_steps,
            impl=impl,
            process_group=process_group,
            timeout=timeout,
            wire_dtype=wire_dtype,
            weights=weights,
            overlap_steps=overlap_steps,
        )
