"""K copies of a model in one process, the parameters of each a row of one flat buffer."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fastlocal import comm
from fastlocal.buffers import are_equal, collect, is_unit_vector, merged, obstacle
from fastlocal.flat import Rows
from fastlocal.twin import copy_of, require_initialised, twin_of


class Workers:
    """K copies of a model in one process, their parameters the rows of one flat buffer.

    Worker 0 is `model` itself, so after a sync `model` holds the averaged parameters. The others have copies of its
    parameters' attributes and gradient hooks too.

    Args:
        model: the module to copy, already on its device and in its dtype and memory format.
        num_workers: K, at least 1.

    Raises:
        TypeError: `model` is no module or has an attribute that cannot be copied, or num_workers is no whole number.
        ValueError: num_workers is below 1, or the model has nothing to train, a parameter that is uninitialised, no
            plain tensor, complex, shares memory or has a hook that runs after its gradient was accumulated, a
            function around a part of itself or a hook around another part, or is scripted. A hook around a module
            that it lies in is taken to watch it only: one that computes with it would use the first worker's.

    Examples:
        >>> workers = Workers(nn.Linear(2, 1, bias=False), 3)
        >>> with torch.no_grad():
        ...     for value, worker in enumerate(workers):
        ...         _ = worker.weight.fill_(value)
        >>> workers.mean().weight.tolist()
        [[1.0, 1.0]]
    """

    def __init__(self, model: nn.Module, num_workers: int) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
        if not isinstance(num_workers, int) or isinstance(num_workers, bool):
            raise TypeError(f"num_workers must be an int, got {num_workers!r}")
        if num_workers < 1:
            raise ValueError(f"num_workers must be at least 1, got {num_workers}")
        require_initialised(model)
        self.rows = Rows([model, *(twin_of(model) for _ in range(num_workers - 1))])

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.rows.modules)

    def __getitem__(self, worker: int) -> nn.Module:
        return self.rows.modules[worker]

    def parameters(self) -> Iterator[nn.Parameter]:
        """All workers' parameters, worker by worker, as an optimizer takes them."""
        return (parameter for _, parameter in self.named_parameters())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All workers' parameters; the name starts with the worker's number: "0.conv.weight"."""
        for worker, module in enumerate(self):
            for name, parameter in module.named_parameters():
                yield f"{worker}.{name}", parameter

    def train(self, mode: bool = True) -> "Workers":
        """Put every worker into training mode, as nn.Module.train."""
        for module in self:
            module.train(mode)
        return self

    def eval(self) -> "Workers":
        """Put every worker into evaluation mode, as nn.Module.eval."""
        return self.train(False)

    @torch.no_grad()
    def mean(self) -> nn.Module:
        """A new model that holds the mean of all workers as they stand now, each counted alike.

        Parameters and floating-point buffers are averaged, integer buffers take the maximum; what cannot be averaged,
        such as sparse ones, those of several shapes, frozen integers or the unit vectors of spectral_norm, is worker
        0's.

        Raises:
            RuntimeError: a parameter no longer lies in its row.
        """
        self.rows.check()
        model = copy_of(self[0])
        averaged = dict(model.named_parameters())
        for block in self.rows.blocks:
            means = block.rows[0]
            if not block.rows.eq(means).all():  # else their mean would be off by a rounding
                means = block.rows.mean(dim=0, dtype=torch.promote_types(block.rows.dtype, torch.float32))
            for slot in block.slots:
                averaged[slot.name].copy_(means.as_strided(slot.shape, slot.stride, slot.start))
        for name, buffers in collect(self.rows.modules, "keep").items():
            alike = is_unit_vector(model, name) or are_equal(buffers)
            model.get_buffer(name).copy_(merged(buffers, "broadcast" if alike else "average"))
        for name, twins in self.rows.frozen().items():
            # Not the parts of a parameter: the mean of a scale is none of what it scales.
            if (
                name in averaged
                and twins[0].is_floating_point()
                and obstacle(twins[0]) is None
                and not are_equal(twins)
            ):
                comm.held_here(averaged[name]).copy_(merged(twins, "average"))
        return model

    def state_dict(self) -> dict[str, Any]:
        """Every worker's module state, in order."""
        return {"workers": [module.state_dict() for module in self]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what state_dict() returned, into the same storage; what does not fit changes no worker.

        Raises:
            ValueError: it is of something else, or holds another number of workers.
            RuntimeError: a module's state does not fit, as nn.Module.load_state_dict says.
        """
        if "workers" not in state_dict:
            raise ValueError(
                f"the state is not one of Workers, which has the key 'workers': got {list(state_dict)[:3]}"
            )
        states = state_dict["workers"]
        if len(states) != len(self):
            raise ValueError(f"the state has {len(states)} workers, there are {len(self)}")
        before: list[dict[str, Any]] = []
        try:
            for module, state in zip(self, states, strict=True):
                before.append(copy.deepcopy(module.state_dict()))
                module.load_state_dict(state)
        except Exception:  # a module keeps what it loaded before it found what does not fit
            for module, own in zip(self, before, strict=False):
                module.load_state_dict(own)
            raise
