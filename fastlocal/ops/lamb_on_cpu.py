"""LAMB on a CPU from torch's fused AdamW kernel, sums of squares and one addition.

AdamW with learning rate 1 and weight decay 1 + λ turns a copy of the weights into −(m̂/(√v̂ + ε) + λw), and
updates both moments in the same pass over memory. Long tensors go through it a chunk at a time, so that the later
passes find the chunk in the cache; short ones together, one call for all of them.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastlocal.ops.cpu_memory import CHUNK, as_vectors, in_float32, short_in_batches, sum_of_squares
from fastlocal.reference.trust_ratio import LambOptions

# β^t is 0 long before: torch's Adam kernel, told this many steps, corrects no bias.
_NO_CORRECTION = 1e30

Entry = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""A parameter with its gradient, its moments and its count of steps."""


class LambOnCpu:
    """One step's options, and memory for updates that lasts from step to step: scratch["memory"], which may be that
    of other groups too."""

    def __init__(self, params: Sequence[Tensor], options: LambOptions, multiplier: float | Tensor, scratch: dict):
        self.options = options
        self.multiplier, self.lr = float(multiplier), float(options.lr)
        self.uncorrected = torch.tensor(_NO_CORRECTION, dtype=torch.float32, device="cpu")
        sizes = [p.numel() for p in params if p.is_cpu]
        chunk = min(CHUNK, sum(sizes))
        memory = scratch.setdefault("memory", {})
        self.update, self.gradient = _room(memory, "update", max(chunk, *sizes)), _room(memory, "gradient", chunk)
        self.scratch = scratch

    def step_(self, entries: Sequence[Entry]) -> list[Entry]:
        """Steps every tensor it can, and returns the others."""
        batches, others = short_in_batches(entries)
        for number, batch in enumerate(batches):
            self._step_short_(batch, number)
        return [entry for entry in others if not self._step_one_(*entry)]

    def _step_short_(self, entries: list[Entry], batch: int) -> None:
        weights, grads, exp_avgs, exp_avg_sqs, steps = (list(column) for column in zip(*entries, strict=True))
        updates, own = self._pieces(batch, [w.shape for w in weights])
        self._shrink_(weights)
        self._negative_updates_(updates, weights, grads, exp_avgs, exp_avg_sqs, steps, own)
        norms: list[float] = []
        if any(map(self.options.adapts, weights)):
            found = (*torch._foreach_norm(weights), *torch._foreach_norm(updates))  # pyright: ignore[reportPrivateImportUsage]
            norms = torch.stack(found).tolist()
        for i, (weight, update, step) in enumerate(zip(weights, updates, steps, strict=True)):
            ratio = 1.0
            if norms and self.options.adapts(weight):
                ratio = self._ratio(norms[i], norms[i + len(weights)])
            weight.add_(update, alpha=ratio * self._step_size(step))

    def _pieces(self, batch: int, shapes: list[torch.Size]) -> list[list[Tensor]]:
        """Memory for a batch's updates and gradients, as views that are made anew only for other shapes."""
        shapes_then, update_then, gradient_then, views = self.scratch.get(batch, (None, None, None, []))
        if shapes_then != shapes or update_then is not self.update or gradient_then is not self.gradient:
            sizes = [shape.numel() for shape in shapes]
            cut = [t[: sum(sizes)].split(sizes) for t in (self.update, self.gradient)]
            views = [[t.view(shape) for t, shape in zip(ts, shapes, strict=True)] for ts in cut]
            self.scratch[batch] = shapes, self.update, self.gradient, views
        return views

    def _step_one_(self, param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor) -> bool:
        """Steps one tensor, or returns False where this way cannot."""
        if not param.is_cpu:
            return False
        weight, grad = in_float32(param, grad)
        flat = as_vectors(weight, grad, exp_avg, exp_avg_sq)
        if flat is None:
            return False
        self._step_vector_(flat, step, self.options.adapts(param))
        if weight is not param:
            param.copy_(weight)
        return True

    def _step_vector_(self, flat: list[Tensor], step: Tensor, adapts: bool) -> None:
        weight, update = flat[0], self.update[: flat[0].numel()]
        self._shrink_([weight])
        weight_square = update_square = 0.0
        for w, g, m, v, u in zip(*(t.split(CHUNK) for t in (*flat, update)), strict=True):
            self._negative_updates_([u], [w], [g], [m], [v], [step], [self.gradient[: g.numel()]])
            if adapts:
                weight_square += sum_of_squares(w)
                update_square += sum_of_squares(u)
        ratio = self._ratio(math.sqrt(weight_square), math.sqrt(update_square)) if adapts else 1.0
        weight.add_(update, alpha=ratio * self._step_size(step))

    def _shrink_(self, weights: list[Tensor]) -> None:
        if self.options.decay == "decoupled" and self.options.weight_decay:
            factor = 1 - self.lr * self.options.weight_decay
            torch._foreach_mul_(weights, factor)  # pyright: ignore[reportPrivateImportUsage]

    def _ratio(self, weight_norm: float, update_norm: float) -> float:
        if not (weight_norm > 0 and update_norm > 0):
            return 1.0
        ratio = weight_norm / update_norm
        if self.options.trust_clip is not None:
            low, high = self.options.trust_clip
            ratio = min(max(ratio, low), high)
        return ratio

    def _step_size(self, step: Tensor) -> float:
        if self.options.bias_correction != "step":
            return self.lr
        beta1, beta2 = self.options.betas
        t = step.item()
        return self.lr * math.sqrt(1 - beta2**t) / (1 - beta1**t)

    def _negative_updates_(
        self,
        updates: list[Tensor],
        weights: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        steps: list[Tensor],
        own: list[Tensor],
    ) -> None:
        """updates ← −u, the moments stepped; `own` is memory for gradients that are not as they were given."""
        options = self.options
        decayed = options.decay == "update" and options.weight_decay != 0
        if decayed:
            torch._foreach_copy_(updates, weights)  # pyright: ignore[reportPrivateImportUsage]
        else:
            torch._foreach_zero_(updates)  # pyright: ignore[reportPrivateImportUsage]
        if self.multiplier != 1:
            grads = [torch.mul(g, self.multiplier, out=o) for g, o in zip(grads, own, strict=True)]
        if options.decay == "l2" and options.weight_decay != 0:
            alpha = -options.weight_decay if options.maximize else options.weight_decay
            grads = [torch.add(g, w, alpha=alpha, out=o) for g, w, o in zip(grads, weights, own, strict=True)]
        torch._fused_adamw_(  # pyright: ignore[reportPrivateImportUsage]
            updates,
            grads,
            exp_avgs,
            exp_avg_sqs,
            [],
            steps if options.bias_correction is True else [self.uncorrected] * len(steps),
            lr=1.0,
            beta1=options.betas[0],
            beta2=options.betas[1],
            weight_decay=1 + options.weight_decay if decayed else 0.0,
            eps=options.eps,
            amsgrad=False,
            maximize=options.maximize,
        )


def _room(memory: dict, name: str, count: int) -> Tensor:
    """Kept from step to step: fresh memory would cost a page fault every 4 KiB."""
    if name not in memory or memory[name].numel() < count:
        memory[name] = torch.empty(count, dtype=torch.float32, device="cpu")
    return memory[name]
