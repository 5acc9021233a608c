"""What LARS and LAMB share as `torch.optim` optimizers: groups, state, checkpoints, the conventions.

No arithmetic here: every step goes through `fastlocal.ops`. Options live in the parameter groups, since
attributes of the optimizer are lost by deepcopy and pickle.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastlocal.ops.implementation import Implementation
from fastlocal.ops.trust_ratio import require_implementation
from fastlocal.ops.trust_ratio_checks import require_strided
from fastlocal.optim.columns import StateColumns
from fastlocal.optim.loading import LoadsOthers, ParamGroup
from fastlocal.optim.pieces import is_sharded


class TrustRatioOptimizer(LoadsOthers):
    """A `torch.optim.Optimizer` with state in at least float32 and a step that is one call of an op."""

    def __init__(self, params: Any, defaults: ParamGroup):
        self._tables: dict = {}
        self._checked: dict[int, Implementation] = {}  # of each group, what is known to step it
        self._columns = StateColumns()
        self._check_group(defaults)
        super().__init__(params, defaults)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # GradScaler then leaves unscaling and skipping to the step, through grad_scale and found_inf. As in
        # torch.optim that takes fused=True: Lightning, for one, will not clip what is not unscaled yet. Pieces of
        # tensors have to agree on an overflow, which GradScaler does not see to.
        groups = self.param_groups
        return all(group["fused"] for group in groups) or any(is_sharded(p) for g in groups for p in g["params"])

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._tables, self._checked = {}, {}
        self._columns = StateColumns()
        for group in self.param_groups:
            for name, value in self.defaults.items():
                if name != "differentiable":  # added by the base class; these steps never are
                    group.setdefault(name, value)

    def add_param_group(self, param_group: ParamGroup) -> None:
        """Adds parameters with options of their own, checked like the constructor's."""
        if isinstance(param_group, dict):
            self._check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        for param in self.param_groups[-1]["params"]:
            if param.requires_grad and not param.is_floating_point():
                self.param_groups.pop()
                raise TypeError(f"{type(self).__name__} steps real floating-point parameters, got {param.dtype}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step.

        Args:
            closure: recomputes the loss under enabled gradients; its result is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_capture()
        groups = []
        for group in self.param_groups:
            params = list(group["params"])
            grads = [p.grad for p in params]  # each look-up makes a Python object
            if len(found := [g for g in grads if g is not None]) < len(params):
                params = [p for p, g in zip(params, grads, strict=True) if g is not None]
            kinds = set(map(type, params))
            if len(kinds) > 1 and any(map(is_sharded, params)):
                pairs = list(zip(params, found, strict=True))
                for cut in (False, True):
                    these = [pair for pair in pairs if is_sharded(pair[0]) == cut]
                    if these:
                        groups.append((group, [p for p, _ in these], [g for _, g in these]))
            elif params:
                groups.append((group, params, found))
        if groups:
            compiling = torch.compiler.is_compiling()
            # The op refuses a group's own, when those before it are stepped.
            for index, (group, params, grads) in enumerate(groups):
                if index:
                    require_strided(grads)
                impl = self._impl(group)
                known = compiling or self._checked.get(index) == impl
                if not known and not is_sharded(params[0]):
                    require_implementation(impl, params)
                    self._checked[index] = impl
            if not compiling:
                self._columns.begin(self.state)
            scaling = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
            if compiling and (scaling[1] is not None or any(g["fused"] for g, _, _ in groups)):
                # Here a graph would break. The parts of it are compiled by themselves then, and torch takes a state
                # looked up in one of them for that of every parameter alike: each group would step the first's.
                torch.compiler.disable(self._step_groups)(groups, *scaling)  # pyright: ignore[reportCallIssue]
            else:
                self._step_groups(groups, *scaling)
            for _, params, _ in groups:
                if is_sharded(params[0]):  # only their pieces know that they were written to
                    torch.autograd.graph.increment_version(params)
        return loss

    def _check_capture(self) -> None:
        if torch.compiler.is_compiling() or not torch.cuda.is_initialized():
            return
        if torch.cuda.is_current_stream_capturing() and not all(g["capturable"] for g in self.param_groups):
            raise RuntimeError("a step inside a CUDA graph capture needs capturable=True in every group")

    def _masters(self, index: int, group: ParamGroup, params: list[Tensor]) -> list[Tensor | None] | None:
        """The float32 weights of the parameters that have some, created where they are missing."""
        if not group["master_weights"]:
            return None
        low = [_has_master(p) for p in params]
        low_params = [p for p, has in zip(params, low, strict=True) if has]
        masters = iter(self._columns.gather(("master", index), low_params, ("master",), self._init_master)[0])
        return [next(masters) if has else None for has in low]

    def _init_master(self, param: Tensor) -> dict[str, Any]:
        state = self.state[param]
        if state.get("master") is None:
            state["master"] = self._new_moment(param).copy_(param)
        return state

    @staticmethod
    def _impl(group: ParamGroup) -> Implementation:
        if group["fused"]:
            return "triton"
        if group["foreach"] is None:
            return "auto" if group["fused"] is None else "portable"
        return "portable" if group["foreach"] else "reference"

    @abstractmethod
    def _step_groups(
        self,
        groups: list[tuple[ParamGroup, list[Tensor], list[Tensor]]],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """Steps (group, params, grads) triples."""


def _has_master(param: Tensor) -> bool:
    return param.dtype in (torch.bfloat16, torch.float16)


def scalar_lr(group: ParamGroup) -> float | Tensor:
    """The learning rate; a 1-element tensor as a 0-dimensional one, which broadcasts with every shape."""
    lr = group["lr"]
    return lr.reshape(()) if isinstance(lr, Tensor) and lr.dim() else lr


def check_shared(group: ParamGroup) -> None:
    """Checks the options that both optimizers have. The first words of an error are those of torch.optim."""
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"Tensor lr must be 1-element, got the shape {tuple(lr.shape)}")
    if not lr >= 0.0:
        raise ValueError(f"Invalid learning rate: {lr}, lr must be at least 0")
    if not group["weight_decay"] >= 0.0:
        raise ValueError(f"Invalid weight_decay value: {group['weight_decay']}, it must be at least 0")
    if not group["eps"] >= 0.0:
        raise ValueError(f"Invalid epsilon value: {group['eps']}, eps must be at least 0")
    for name in ("master_weights", "maximize", "capturable"):
        check_choice(group, name, True, False)
    for name in ("foreach", "fused"):
        check_choice(group, name, True, False, None)
    check_choice(group, "adapt", "decayed", "all", "matrices")
    if group["foreach"] and group["fused"]:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")


def check_choice(group: ParamGroup, name: str, *allowed: object) -> None:
    """Raises ValueError unless the option is one of those allowed."""
    value = group[name]
    if not any(value is choice or (isinstance(value, str) and value == choice) for choice in allowed):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
