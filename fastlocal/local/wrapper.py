"""An optimizer around another one, which stays the only owner of its parameter groups and state."""

from typing import Any

import torch


class Wrapper(torch.optim.Optimizer):
    """Is an Optimizer (hooks, schedulers, profiling) whose `param_groups` and `state` are the inner one's.

    Args:
        inner: the optimizer to wrap.

    Raises:
        TypeError: inner is no optimizer, or is wrapped already.
    """

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        if not isinstance(inner, torch.optim.Optimizer) or isinstance(inner, Wrapper):
            raise TypeError(
                f"inner must be a torch.optim optimizer that is not wrapped yet, got {type(inner).__name__}"
            )
        # Optimizer.__init__ makes a list of groups and a state of its own; both go when `inner` is set.
        super().__init__(inner.param_groups, inner.defaults)
        self.__dict__.pop("_own_param_groups")
        self.__dict__.pop("_own_state")
        self.inner = inner

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimizer's parameter groups; never a second list that could go stale."""
        return self.inner.param_groups if self._is_built else self.__dict__["_own_param_groups"]

    @param_groups.setter
    def param_groups(  # pyright: ignore[reportIncompatibleVariableOverride]
        self, groups: list[dict[str, Any]]
    ) -> None:
        if self._is_built:
            self.inner.param_groups = groups
        else:
            self.__dict__["_own_param_groups"] = groups

    @property
    def state(self) -> Any:
        """The inner optimizer's state."""
        return self.inner.state if self._is_built else self.__dict__["_own_state"]

    @state.setter
    def state(self, state: Any) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        if self._is_built:
            self.inner.state = state
        else:
            self.__dict__["_own_state"] = state

    @property
    def _is_built(self) -> bool:
        return hasattr(self, "inner")  # an attribute of whom this stands in for, perhaps

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the inner optimizer."""
        if self._is_built:
            self.inner.add_param_group(param_group)
        else:
            super().add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch.optim.Optimizer.zero_grad."""
        self.inner.zero_grad(set_to_none)
