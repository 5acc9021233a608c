"""What LARS and LAMB share as `torch.optim` optimizers: groups, state, checkpoints, the conventions.

No arithmetic here: every step goes through `fastlocal.ops`. Options live in the parameter groups, since
attributes of the optimizer are lost by deepcopy and pickle.
"""

from abc import abstractmethod
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastlocal.ops.implementation import Implementation, choose
from fastlocal.ops.trust_ratio import require_implementation
from fastlocal.ops.trust_ratio_checks import require_strided
from fastlocal.optim.columns import StateColumns
from fastlocal.optim.pieces import is_sharded

ParamGroup = dict[str, Any]

_OTHER_STEPS = ("amsgrad", "caution", "corrected_weight_decay")
"""Options of torch's and timm's that change a step, and that no optimizer here has."""

_BY_PRODUCTS = {"weight_norm", "adam_norm", "trust_ratio"}
"""What LAMB of pytorch_optimizer and torch_optimizer leaves of its last step in the state, without a use for it."""


class TrustRatioOptimizer(Optimizer):
    """A `torch.optim.Optimizer` with state in at least float32 and a step that is one call of an op."""

    def __init__(self, params: Any, defaults: ParamGroup):
        self._tables: dict = {}
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
        self._tables = {}
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
            for index, (group, params, grads) in enumerate(groups[1:], start=1):
                require_strided(grads)
                stepped = compiling or index in self._tables
                if not stepped and not is_sharded(params[0]):
                    require_implementation(self._impl(group), params)
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

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this class, or of a torch.optim, timm or apex optimizer with the same
        moments.

        Options that the checkpoint does not know keep their present values; so do foreach, fused and capturable if it
        is of another class, and fused=True has no kernels for where the parameters are now. State stays in at least
        float32, which the base class would cast to the parameter's dtype, and never shares memory with `state_dict`.

        Raises:
            ValueError: it does not fit, is of an optimizer with other state or with `amsgrad`, `caution` or
                `corrected_weight_decay`, or an option is out of its range; then nothing has changed.
            TypeError: a value in it is of the wrong kind; likewise.
        """
        before = dict(vars(self))
        seen: dict[str, Any] = {}

        def translate(_: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            current = self.param_groups
            groups, foreign_keys = [dict(g) for g in given["param_groups"]], set()
            state = {key: dict(v) if isinstance(v, dict) else v for key, v in given["state"].items()}
            for mine, group in zip(current, groups, strict=False):  # the base class reports a wrong number
                foreign = "adapt" not in group
                if not foreign and self._mark not in group:
                    raise ValueError(
                        f"state_dict is not one of {type(self).__name__}: its groups have no {self._mark}"
                    )
                foreign_keys.update(group["params"] if foreign else ())
                self._translate_group(group)
                if (name := next(filter(group.get, _OTHER_STEPS), None)) is not None:
                    raise ValueError(
                        f"state_dict was made with {name}={group[name]!r}, which {type(self).__name__} does not "
                        "have: its steps would be others; set it to False there to go on without"
                    )
                if "step" in group:  # apex and timm count in the group
                    count = torch.as_tensor(group.pop("step"), dtype=torch.float32, device="cpu")
                    for key in group["params"]:
                        if key in state:
                            state[key].setdefault("step", count)
                if foreign:
                    group.update((name, mine[name]) for name in ("foreach", "fused", "capturable"))
                elif group.get("fused") and not _have_kernels(mine["params"]):
                    group["fused"] = mine["fused"]
                for name, value in mine.items():
                    if name not in ("params", "param_names"):
                        group.setdefault(name, value)
            seen.update(state=state, param_groups=groups, foreign=foreign_keys)
            return {**given, "state": state, "param_groups": groups}

        def restore(_: Optimizer) -> None:
            keys = chain.from_iterable(g["params"] for g in seen["param_groups"])
            params = chain.from_iterable(g["params"] for g in self.param_groups)
            for key, param in zip(keys, params, strict=True):
                if key in seen["state"]:
                    self.state[param].update(self._own(param, seen["state"][key], key in seen["foreign"]))
            for group in self.param_groups:
                self._check_group(group)

        hooks = [
            self.register_load_state_dict_pre_hook(translate),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        ]
        loaded = False
        try:
            super().load_state_dict(state_dict)
            loaded = True
        except (AttributeError, KeyError, IndexError) as error:  # what the base class says of missing entries
            raise ValueError(f"state_dict is not one of an optimizer: {error!r}") from error
        finally:
            for hook in hooks:
                hook.remove()
            if not loaded:
                vars(self).update(before)  # the device tables too, which a CUDA graph may replay from

    def _own(self, param: Tensor, saved: dict[str, Any], foreign: bool) -> dict[str, Tensor]:
        """Copies of the saved state this class uses, in its own dtype, device and memory layout.

        State beside it, as optimizers around this one keep, is left as it is, but says that a foreign one steps
        otherwise.
        """
        owned = {}
        known = (*self._moments, "master")
        beside = [
            name
            for name, value in saved.items()
            if foreign and isinstance(value, Tensor) and name not in {"step", *_BY_PRODUCTS}
        ]
        theirs = [name for name in saved if name in (*known, *beside)]
        if set(theirs) - {"master"} not in (set(), set(self._moments)):
            mine = " and ".join(self._moments)
            raise ValueError(f"state_dict has {' and '.join(theirs)}, {type(self).__name__} goes on from {mine}")
        for name, value in saved.items():
            if name == "step":
                owned[name] = self._new_step(param, float(value))
                if not owned[name] >= 0:
                    raise ValueError(f"step must be at least 0, got {value}")
            elif name in self._moments or name == "master":
                if value is None and name in ("momentum_buffer", "master"):
                    continue  # torch.optim.SGD keeps None until there is one
                if not isinstance(value, Tensor):
                    raise TypeError(f"{name} must be a tensor, got {value!r}")
                if value.shape != param.shape:
                    shapes = f"{tuple(param.shape)}, got {tuple(value.shape)}"
                    raise ValueError(f"{name} must have its parameter's shape {shapes}")
                owned[name] = self._new_moment(param).copy_(value)
        return owned

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
    def _require_no_capture(param: Tensor) -> None:
        """Before any state is made: what is made in a capture has no value yet, and would stay after the error."""
        if param.is_cuda and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a step inside a CUDA graph capture needs its state made before, or every replay would begin it "
                "anew: take one step before the capture"
            )

    def _new_moment(self, param: Tensor) -> Tensor:
        self._require_no_capture(param)
        dtype = torch.promote_types(param.dtype, torch.float32)
        return torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)

    def _new_step(self, param: Tensor, count: float = 0.0) -> Tensor:
        self._require_no_capture(param)
        return torch.full((), count, dtype=torch.float32, device=param.device)  # no copy from the host

    @staticmethod
    def _impl(group: ParamGroup) -> Implementation:
        if group["fused"]:
            return "triton"
        if group["foreach"] is None:
            return "auto" if group["fused"] is None else "portable"
        return "portable" if group["foreach"] else "reference"

    # What a checkpoint may hold besides "step", each shaped like its parameter.
    _moments: tuple[str, ...] = ()
    # The option that tells this class's checkpoints from the other's.
    _mark: str

    @abstractmethod
    def _check_group(self, group: ParamGroup) -> None:
        """Raises ValueError for an option out of its range."""

    def _translate_group(self, group: ParamGroup) -> None:
        """Renames another library's options in a loaded group, in place."""

    @abstractmethod
    def _step_groups(
        self,
        groups: list[tuple[ParamGroup, list[Tensor], list[Tensor]]],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """Steps (group, params, grads) triples."""


def _have_kernels(params: list[Tensor]) -> bool:
    try:
        return all(choose("triton", p.device, p.dtype) for p in params)
    except RuntimeError:
        return False


def _has_master(param: Tensor) -> bool:
    return param.dtype in (torch.bfloat16, torch.float16)


def scalar_lr(group: ParamGroup) -> float | Tensor:
    """The learning rate; a 1-element tensor as a 0-dimensional one, which broadcasts with every shape."""
    lr = group["lr"]
    return lr.reshape(()) if isinstance(lr, Tensor) and lr.dim() else lr


def check_shared(group: ParamGroup) -> None:
    """Checks the options that both optimizers have."""
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    if not lr >= 0.0:
        raise ValueError(f"Invalid learning rate: {lr}")
    if not group["weight_decay"] >= 0.0:
        raise ValueError(f"Invalid weight_decay value: {group['weight_decay']}")
    if not group["eps"] >= 0.0:
        raise ValueError(f"Invalid epsilon value: {group['eps']}")
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
