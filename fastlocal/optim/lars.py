"""LARS as a `torch.optim` optimizer."""

from typing import Any, Literal

from torch import Tensor
from torch.optim.optimizer import ParamsT

from fastlocal.ops import trust_ratio as ops
from fastlocal.ops.trust_ratio import Adapt, LarsOptions
from fastlocal.optim.base import TrustRatioOptimizer, check_choice, check_shared, scalar_lr
from fastlocal.optim.loading import ParamGroup
from fastlocal.optim.pieces import pieces, sum_over_pieces


class LARS(TrustRatioOptimizer):
    """SGD with momentum whose gradient is scaled, tensor by tensor, by the norm of the weights over its own.

    A step of one tensor: d = g + weight_decay·p; r = trust_coefficient·‖p‖/(‖g‖ + weight_decay·‖p‖ + eps), or
    1 where a norm is zero; buffer ← momentum·buffer + (1 − dampening)·r·d; p ← p − lr·buffer.

    Args:
        params: parameters, or parameter groups.
        lr: learning rate, a float or a 1-element tensor.
        momentum: μ.
        dampening: of every gradient but a tensor's first, as in torch.optim.SGD.
        weight_decay: λ. Tensors in groups without it take plain SGD steps, unless `adapt` says otherwise: with all
            defaults this is SGD with a rate of 1.
        nesterov: steps by r·d + μ·buffer.
        trust_coefficient: η.
        eps: added to the ratio's denominator.
        trust_clip: as LARC clips: steps by min(r, lr) in place of lr·r.
        norm: "sum" divides by ‖g‖ + λ‖p‖, "joint" by ‖g + λp‖.
        momentum_form: "torch" applies the learning rate to the buffer, as torch.optim.SGD does;
            "lr_in_buffer" puts it inside, as the paper does, so that a changed rate leaves the past as it
            was.
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
        >>> optimizer = LARS([weights], lr=1.0, momentum=0.0, trust_coefficient=0.1, eps=0.0, adapt="all")
        >>> weights.grad = torch.tensor([0.0, 200.0])  # its size does not matter: the step is 0.1 times 5 long
        >>> optimizer.step()
        >>> weights.tolist()
        [3.0, 3.5]

    References:
        You, Gitman and Ginsburg, Large Batch Training of Convolutional Networks, arXiv:1708.03888.
    """

    _moments = ("momentum_buffer",)
    _mark = "trust_coefficient"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        momentum: float = 0.9,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        trust_coefficient: float = 1e-3,
        eps: float = 1e-8,
        trust_clip: bool = False,
        norm: Literal["sum", "joint"] = "sum",
        momentum_form: Literal["torch", "lr_in_buffer"] = "torch",
        adapt: Adapt = "decayed",
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        master_weights: bool = False,
    ):
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "trust_coefficient": trust_coefficient,
            "eps": eps,
            "trust_clip": trust_clip,
            "norm": norm,
            "momentum_form": momentum_form,
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
        momentum, dampening = group["momentum"], group["dampening"]
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"momentum must be in [0, 1), got {momentum}")
        if not 0.0 <= dampening <= 1.0:
            raise ValueError(f"dampening must be in [0, 1], got {dampening}")
        if not group["trust_coefficient"] > 0.0:
            raise ValueError(f"trust_coefficient must be positive, got {group['trust_coefficient']}")
        if group["nesterov"] and (momentum == 0 or dampening != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")
        check_choice(group, "trust_clip", True, False)
        check_choice(group, "nesterov", True, False)
        check_choice(group, "norm", "sum", "joint")
        check_choice(group, "momentum_form", "torch", "lr_in_buffer")

    def _translate_group(self, group: ParamGroup) -> None:
        if "trust_coeff" in group:  # timm's spelling
            group["trust_coefficient"] = group.pop("trust_coeff")
        if "always_adapt" in group:
            group["adapt"] = "all" if group.pop("always_adapt") else "decayed"

    def _step_groups(
        self,
        groups: list[tuple[ParamGroup, list[Tensor], list[Tensor]]],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        for index, (group, params, grads) in enumerate(groups):
            buffers: list[Tensor | None] = [None] * len(params)
            steps: list[Tensor | None] = [None] * len(params)
            if group["momentum"] != 0:
                counted = group["dampening"] != 0
                names = ("momentum_buffer", "step") if counted else ("momentum_buffer",)
                find = self._init_counted_state if counted else self._init_state
                columns = self._columns.gather(index, params, names, find)
                buffers[:] = columns[0]
                if counted:
                    steps[:] = columns[1]
            masters = self._masters(index, group, params)
            sum_ = sum_over_pieces(params, grads)
            if sum_ is not None:
                params, grads, buffers, masters = pieces(params, grads, buffers, masters)
            ops.lars_(
                params,
                grads,
                buffers,
                steps,
                _options(group),
                masters=masters,
                grad_scale=grad_scale,
                found_inf=found_inf,
                impl=self._impl(group),
                tables=self._tables.setdefault(index, {}),
                sum_=sum_,
            )

    def _init_counted_state(self, param: Tensor) -> dict[str, Any]:
        state = self.state[param]
        if state.get("momentum_buffer") is None:  # set to None, one begins anew
            state["step"] = self._new_step(param)
        elif "step" not in state:  # it comes from torch.optim.SGD or from before dampening was set
            state["step"] = self._new_step(param, 1.0)
        return self._init_state(param)

    def _init_state(self, param: Tensor) -> dict[str, Any]:
        state = self.state[param]
        if state.get("momentum_buffer") is None:
            state["momentum_buffer"] = self._new_moment(param)
        return state


def _options(group: ParamGroup) -> LarsOptions:
    return LarsOptions(
        lr=scalar_lr(group),
        momentum=group["momentum"],
        dampening=group["dampening"],
        weight_decay=group["weight_decay"],
        nesterov=group["nesterov"],
        trust_coefficient=group["trust_coefficient"],
        eps=group["eps"],
        trust_clip=group["trust_clip"],
        norm=group["norm"],
        momentum_form=group["momentum_form"],
        adapt=group["adapt"],
        maximize=group["maximize"],
    )
