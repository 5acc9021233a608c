"""LAMB as a `torch.optim` optimizer."""

from typing import Any, Literal

from torch import Tensor
from torch.optim.optimizer import ParamsT

from fastlocal.ops import trust_ratio as ops
from fastlocal.ops.implementation import Implementation
from fastlocal.ops.trust_ratio import Adapt, LambOptions
from fastlocal.optim.base import TrustRatioOptimizer, check_choice, check_shared, scalar_lr
from fastlocal.optim.loading import ParamGroup
from fastlocal.optim.pieces import is_sharded, pieces, sum_over_pieces


class LAMB(TrustRatioOptimizer):
    """Adam whose step is scaled, tensor by tensor, by the norm of the weights over the norm of their update.

    A step of one tensor: m and v as in Adam; u = m̂/(√v̂ + eps) + weight_decay·p; p ← p − lr·(‖p‖/‖u‖)·u,
    where a ratio with a zero norm in it is 1.

    Args:
        params: parameters, or parameter groups.
        lr: learning rate, a float or a 1-element tensor.
        betas: decay rates of the first and second moment.
        eps: added to √v̂.
        weight_decay: λ.
        bias_correction: True divides the moments by 1 − β^t; "step" leaves them and scales the step by
            √(1 − β2^t)/(1 − β1^t), which the trust ratio then does not see; False does neither.
        grad_averaging: False adds the whole gradient to the first moment instead of (1 − β1) of it.
        max_grad_norm: divides this group's gradients by max(1, ‖G‖/max_grad_norm), ‖G‖ being the norm over
            every group's gradients; None does not.
        trust_clip: (low, high) bounds of the trust ratio; None for none.
        decay: "update" adds λp to the update, "l2" to the gradient; "decoupled" shrinks p by 1 − lr·λ first.
        adapt: which tensors get a trust ratio: "decayed" those in groups with weight_decay ≠ 0, "matrices"
            those of two and more dimensions, or "all".
        maximize: ascends.
        foreach: True is the portable implementation, False the single-tensor reference.
        fused: True is the Triton kernel, for float32, bfloat16 and float16 parameters on CUDA. With neither
            `foreach` nor `fused`, CUDA parameters are stepped by Triton and all others by the portable one.
            DTensor parameters are stepped by plain PyTorch, with one small all-reduce a group. With True in every
            group GradScaler leaves unscaling and skipping to the step, which reads nothing back to the host.
        capturable: True permits a step inside a CUDA graph capture; pass lr as a CUDA tensor to change it
            later.
        master_weights: keeps a float32 copy of bfloat16 and float16 parameters in the state, as "master", and
            steps that: the parameter is its rounding, and steps too small for the parameter's dtype add up.
            Elements of the parameter that something else has written to since the last step are taken over.

    Raises:
        ValueError: an option is out of its range.
        TypeError: a parameter is not a real floating-point tensor.
        RuntimeError: `foreach` and `fused` are both True. `step` raises it for sparse gradients, and for `fused=True`
            where there is no CUDA.

    Examples:
        >>> import torch
        >>> weights = torch.nn.Parameter(torch.tensor([3.0, 4.0]))  # norm 5
        >>> optimizer = LAMB([weights], lr=0.1, weight_decay=0.0, eps=0.0, adapt="all")
        >>> weights.grad = torch.tensor([0.25, -0.25])  # Adam's first step is the sign, here of norm √2
        >>> optimizer.step()
        >>> [round(value, 4) for value in weights.tolist()]  # 3 and 4 minus and plus 0.1 times 5/√2
        [2.6464, 4.3536]

    References:
        You et al., Large Batch Optimization for Deep Learning: Training BERT in 76 minutes, arXiv:1904.00962.
    """

    _moments = ("exp_avg", "exp_avg_sq")
    _mark = "betas"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        bias_correction: bool | Literal["step"] = True,
        grad_averaging: bool = True,
        max_grad_norm: float | None = None,
        trust_clip: tuple[float, float] | None = None,
        decay: Literal["update", "l2", "decoupled"] = "update",
        adapt: Adapt = "decayed",
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        master_weights: bool = False,
    ):
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "grad_averaging": grad_averaging,
            "max_grad_norm": max_grad_norm,
            "trust_clip": trust_clip,
            "decay": decay,
            "adapt": adapt,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
            "capturable": capturable,
            "master_weights": master_weights,
        }
        super().__init__(params, defaults)

    def _check_group(self, group: ParamGroup) -> None:
        check_shared(group)
        for name in ("betas", "trust_clip"):
            pair = group[name]
            if not (isinstance(pair, (tuple, list)) and len(pair) == 2) and (pair is not None or name == "betas"):
                raise ValueError(f"{name} must be two numbers, got {pair!r}")
        for i, beta in enumerate(group["betas"]):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"Invalid beta parameter at index {i}: {beta}, it must be in [0, 1)")
        norm, clip = group["max_grad_norm"], group["trust_clip"]
        if norm is not None and not norm > 0.0:
            raise ValueError(f"max_grad_norm must be positive or None, got {norm}")
        if clip is not None and not 0.0 <= clip[0] <= clip[1]:
            raise ValueError(f"trust_clip must be (low, high) with 0 <= low <= high, got {clip}")
        check_choice(group, "bias_correction", True, False, "step")
        check_choice(group, "grad_averaging", True, False)
        check_choice(group, "decay", "update", "l2", "decoupled")

    def _translate_group(self, group: ParamGroup) -> None:
        for name in ("bias_correction", "grad_averaging"):
            if group.get(name) in (0, 1):  # apex keeps integers
                group[name] = bool(group[name])
        if group.get("max_grad_norm") == 0:  # off, in apex and DeepSpeed
            group["max_grad_norm"] = None
        if "max_coeff" in group:  # DeepSpeed bounds the ratio, and corrects the bias of the step
            group["trust_clip"] = (group.pop("min_coeff"), group.pop("max_coeff"))
            group["bias_correction"] = "step" if group.get("bias_correction", True) else False
            group["adapt"] = "all"
        if isinstance(group.get("trust_clip"), bool):  # timm bounds the ratio by 1
            group["trust_clip"] = (0.0, 1.0) if group["trust_clip"] else None
        for name in ("decoupled_decay", "weight_decouple"):  # timm's word, and pytorch_optimizer's
            if name in group:
                group["decay"] = "decoupled" if group.pop(name) else "update"
        if "always_adapt" in group:
            group["adapt"] = "all" if group.pop("always_adapt") else "decayed"

    def _step_groups(
        self,
        groups: list[tuple[ParamGroup, list[Tensor], list[Tensor]]],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        norm = None  # of one group's gradients, found on the way
        if len(groups) > 1 and any(group["max_grad_norm"] is not None for group, _, _ in groups):
            norm = self._grad_norm(groups)
        memory = self._tables.setdefault("memory", {})  # of all groups, which are stepped one after another
        for index, (group, params, grads) in enumerate(groups):
            names = ("exp_avg", "exp_avg_sq", "step")
            exp_avgs, exp_avg_sqs, steps = self._columns.gather(index, params, names, self._init_state)
            masters = self._masters(index, group, params)
            sum_ = sum_over_pieces(params, grads)
            if sum_ is not None:
                params, grads, exp_avgs, exp_avg_sqs, masters = pieces(params, grads, exp_avgs, exp_avg_sqs, masters)
            ops.lamb_(
                params,
                grads,
                exp_avgs,
                exp_avg_sqs,
                steps,
                _options(group),
                masters=masters,
                norm=norm,
                grad_scale=grad_scale,
                found_inf=found_inf,
                impl=self._impl(group),
                tables=self._tables.setdefault(index, {"memory": memory}),
                sum_=sum_,
            )

    def _grad_norm(self, groups: list[tuple[ParamGroup, list[Tensor], list[Tensor]]]) -> Tensor:
        """‖G‖ of whole gradients and of pieces together."""
        whole = [grad for _, params, grads in groups if not is_sharded(params[0]) for grad in grads]
        cut = [grad for _, params, grads in groups if is_sharded(params[0]) for grad in grads]
        norms = []
        if whole:
            impl: Implementation = self._impl(groups[0][0])
            if any(self._impl(group) != impl for group, _, _ in groups):
                impl = "auto"
            norms.append(ops.grad_norm(whole, impl=impl, tables=self._tables.setdefault("norm", {})))
        if cut:
            norms.append(ops.grad_norm(*pieces(cut), sum_=sum_over_pieces(cut, cut)))
        return norms[0] if len(norms) == 1 else ops.grad_norm(norms, impl="reference")

    def _own(self, param: Tensor, saved: ParamGroup, foreign: bool) -> ParamGroup:
        owned = super()._own(param, saved, foreign)
        if owned and "step" not in owned:
            raise ValueError("state_dict has moments but no 'step' for them, which their bias is corrected by")
        return owned

    def _init_state(self, param: Tensor) -> dict[str, Any]:
        state = self.state[param]
        if not state.keys() >= {"step", "exp_avg", "exp_avg_sq"}:
            state.setdefault("step", self._new_step(param))
            state.setdefault("exp_avg", self._new_moment(param))
            state.setdefault("exp_avg_sq", self._new_moment(param))
        return state


def _options(group: ParamGroup) -> LambOptions:
    return LambOptions(
        lr=scalar_lr(group),
        betas=group["betas"],
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        bias_correction=group["bias_correction"],
        grad_averaging=group["grad_averaging"],
        max_grad_norm=group["max_grad_norm"],
        trust_clip=group["trust_clip"],
        decay=group["decay"],
        adapt=group["adapt"],
        maximize=group["maximize"],
    )
