"""What the mean of the workers becomes: the mean itself, or a step with slow momentum.

Each object here owns the state of one block of rows. It sees tensors and rates, not modules or optimizers.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastlocal.ops import averaging as ops
from fastlocal.ops.implementation import Implementation

Form = Literal["lr-scaled", "nesterov"]
"""SlowMo's momentum, scaled by the inner learning rate, or DiLoCo's Nesterov momentum, which is not."""


class Average:
    """Every row becomes the mean: LocalSGD.

    Args:
        rows: shape (k, n), one row a worker.
        impl: which implementation averages.
    """

    def __init__(self, rows: Tensor, *, impl: Implementation) -> None:
        self.rows = rows
        self.impl: Implementation = impl

    @property
    def anchor(self) -> Tensor | None:
        """Where the workers started, shape (n,), if it is kept."""
        return None

    def begin(self) -> None:
        """Nothing to remember."""

    def step_(
        self, weights: Tensor, rates: Sequence[float | None], mean: Tensor | None = None, *, measures: bool
    ) -> Tensor | None:
        """Average the rows. See SlowMomentum.step_."""
        parts = _new_parts(self.rows) if measures else None
        ops.average_(self.rows, weights, parts, mean, impl=self.impl)
        return None if parts is None else parts.sum(dim=1, dtype=torch.float64)

    def step_from_mean_(self, rates: Sequence[float | None]) -> None:
        """The one row holds the mean already: nothing is left to do."""

    def commit(self, rates: Sequence[float | None]) -> None:
        """Nothing to remember."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing is kept between syncs."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing was kept."""


class AnchoredAverage(Average):
    """An average that remembers where the workers started, so that they can send their progress alone.

    Args:
        rows: shape (k, n), one row a worker.
        impl: which implementation averages.
    """

    def __init__(self, rows: Tensor, *, impl: Implementation) -> None:
        super().__init__(rows, impl=impl)
        self._anchor = torch.zeros_like(rows[0])

    @property
    def anchor(self) -> Tensor:
        """Where the workers started, shape (n,), in the rows' dtype."""
        return self._anchor

    def begin(self) -> None:
        """The first row becomes the anchor."""
        self._anchor.copy_(self.rows[0])

    def commit(self, rates: Sequence[float | None]) -> None:
        """The mean, which every row holds now, becomes the anchor."""
        self.begin()

    def state_dict(self) -> dict[str, Any]:
        """The anchor."""
        return {"anchor": self._anchor}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what state_dict() returned, into the same storage."""
        self._anchor.copy_(state_dict["anchor"])


class Coefficients(NamedTuple):
    """Of v ← decay·v + gain·Δ and x ← anchor − (direct·Δ + momentum·v)."""

    direct: float
    momentum: float
    decay: float
    gain: float


class SlowMomentum:
    """A step from the anchor along the mean progress, with momentum across rounds.

    lr-scaled: v ← β(γ_t/γ_{t−1})v + Δ; x ← anchor − αv, with γ the inner learning rate of the parameter, the
    mean over the round, and γ_{t−1} the last positive one. While γ_t is 0, v is neither applied nor lost.
    nesterov: v ← βv + Δ; x ← anchor − α(Δ + βv).

    Args:
        rows: shape (k, n), one row a worker.
        bounds: first column and column after the last of each parameter; together they cover the rows.
        slow_lr: α.
        slow_momentum: β.
        form: which of the two.
        impl: which implementation steps.

    References:
        Wang et al., `SlowMo <https://arxiv.org/abs/1910.00643>`_, algorithm 1, with v = γu;
        Douillard et al., `DiLoCo <https://arxiv.org/abs/2311.08105>`_, algorithm 1
    """

    def __init__(
        self,
        rows: Tensor,
        bounds: Sequence[tuple[int, int]],
        *,
        slow_lr: float,
        slow_momentum: float,
        form: Form,
        impl: Implementation,
    ) -> None:
        self.rows, self.bounds = rows, list(bounds)
        self.slow_lr, self.slow_momentum, self.form = slow_lr, slow_momentum, form
        self.impl: Implementation = impl
        dtype = ops.accumulate_dtype(rows.dtype)
        self.anchor = torch.zeros(rows.shape[1], dtype=dtype, device=rows.device)
        self.momentum_buffer = torch.zeros_like(self.anchor)
        self.last_rates = [0.0] * len(self.bounds)  # 0: none was positive yet

    def begin(self) -> None:
        """The first row becomes the anchor; the rows are equal unless somebody made them differ."""
        self.anchor.copy_(self.rows[0])

    def step_(
        self, weights: Tensor, rates: Sequence[float | None], mean: Tensor | None = None, *, measures: bool
    ) -> Tensor | None:
        """Take the outer step.

        Args:
            weights: shape (k,), float32; 0 leaves a row out.
            rates: each parameter's mean inner learning rate in the round that ends; None for one that takes the plain
                mean, its momentum left as it is.
            mean: shape (n,), where other processes have a share in it; may be overwritten.
            measures: whether the drift is wanted.

        Returns:
            ‖x_k − x̄‖² for each row, shape (k,), float64; None where it was not measured.
        """
        drift = torch.zeros(self.rows.shape[0], dtype=torch.float64, device=self.rows.device) if measures else None
        for start, stop, coefficients in self._spans(rates):
            rows = self.rows[:, start:stop]
            parts = _new_parts(rows) if measures else None
            ops.outer_step_(
                rows,
                self.anchor[start:stop],
                self.momentum_buffer[start:stop],
                weights,
                parts,
                None if mean is None else mean[start:stop],
                impl=self.impl,
                **coefficients._asdict(),
            )
            if drift is not None and parts is not None:
                drift += parts.sum(dim=1, dtype=torch.float64)
        return drift

    def step_from_mean_(self, rates: Sequence[float | None]) -> None:
        """Take the outer step where the one row holds the mean already; 24 bytes a float32 parameter."""
        self.step_(torch.ones(1, dtype=torch.float32, device=self.rows.device), rates, measures=False)

    def commit(self, rates: Sequence[float | None]) -> None:
        """The step that was taken with these rates counts: the next one refers to them."""
        self.last_rates = [rate or last for rate, last in zip(rates, self.last_rates, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """The anchor, the slow momentum and each parameter's last positive rate."""
        return {
            "anchor": self.anchor,
            "momentum_buffer": self.momentum_buffer,
            "last_rates": list(self.last_rates),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what state_dict() returned, into the same storage."""
        self.anchor.copy_(state_dict["anchor"])
        self.momentum_buffer.copy_(state_dict["momentum_buffer"])
        self.last_rates = list(state_dict["last_rates"])

    def _spans(self, rates: Sequence[float | None]) -> list[tuple[int, int, Coefficients]]:
        """Neighbouring parameters with equal coefficients, joined: usually one span, so one launch."""
        spans: list[tuple[int, int, Coefficients]] = []
        for (start, stop), rate, last in zip(self.bounds, rates, self.last_rates, strict=True):
            coefficients = self._coefficients(rate, last)
            if spans and spans[-1][2] == coefficients:
                start = spans.pop()[0]
            spans.append((start, stop, coefficients))
        return spans

    def _coefficients(self, rate: float | None, last_rate: float) -> Coefficients:
        alpha, beta = self.slow_lr, self.slow_momentum
        if rate is None:
            return Coefficients(direct=1.0, momentum=0.0, decay=1.0, gain=0.0)
        if self.form == "nesterov":
            return Coefficients(direct=alpha, momentum=alpha * beta, decay=beta, gain=1.0)
        if rate == 0:
            return Coefficients(direct=alpha, momentum=0.0, decay=1.0, gain=0.0)
        decay = beta * rate / last_rate if last_rate else 0.0
        return Coefficients(direct=0.0, momentum=alpha, decay=decay, gain=1.0)


Outer = Average | SlowMomentum
"""What a block's mean becomes, either way."""


def _new_parts(rows: Tensor) -> Tensor:
    shape = (rows.shape[0], ops.num_drift_parts(rows.shape[1]))
    return torch.empty(shape, dtype=torch.float32, device=rows.device)
