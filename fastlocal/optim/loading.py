"""State of LARS and LAMB: how it is made, and taken from a checkpoint of their own or of another library."""

from abc import abstractmethod
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastlocal.ops.implementation import choose

ParamGroup = dict[str, Any]

_OTHER_STEPS = ("amsgrad", "caution", "corrected_weight_decay", "adam", "rectify", "pre_norm")
"""Options of torch's, timm's and pytorch_optimizer's that change a step, and that no optimizer here has."""

_BY_PRODUCTS = {"weight_norm", "adam_norm", "trust_ratio"}
"""What LAMB of pytorch_optimizer and torch_optimizer leaves of its last step in the state, without a use for it."""


class LoadsOthers(Optimizer):
    """A `torch.optim.Optimizer` with state in at least float32 that loads what others with the same moments saved."""

    # What a checkpoint may hold besides "step", each shaped like its parameter.
    _moments: tuple[str, ...] = ()
    # The option that tells this class's checkpoints from the other's.
    _mark: str

    @abstractmethod
    def _check_group(self, group: ParamGroup) -> None:
        """Raises ValueError for an option out of its range."""

    def _translate_group(self, group: ParamGroup) -> None:
        """Renames another library's options in a loaded group, in place."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this class, or of an optimizer of torch.optim, timm, apex, pytorch_optimizer or
        DeepSpeed with the same moments.

        pytorch_optimizer's LAMB corrects the bias of the first moment alone, in the step, which none here does.
        Options that the checkpoint does not know keep their present values; so do foreach, fused and capturable if it
        is of another class, and fused=True has no kernels for where the parameters are now. State stays in at least
        float32, which the base class would cast to the parameter's dtype, and never shares memory with `state_dict`.

        Raises:
            ValueError: it does not fit, is of an optimizer with other state or with an option that makes other steps,
                such as `amsgrad`, or an option is out of its range; then nothing has changed.
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


def _have_kernels(params: list[Tensor]) -> bool:
    try:
        return all(choose("triton", p.device, p.dtype) for p in params)
    except RuntimeError:
        return False
