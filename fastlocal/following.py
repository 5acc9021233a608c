"""Until training begins, the other workers follow the first: values loaded into it alone are for all.

Whoever wants workers that begin apart writes to the others, and then nothing is given to them.
"""

import itertools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastlocal import comm
from fastlocal.buffers import collect
from fastlocal.checksum import checksum


class Following:
    """Tells whether the other workers are as they were made, and gives them what the first one holds by then.

    Args:
        modules: the workers.
        rows: the other workers' trained parameters, in which writing through .data is seen too.
    """

    def __init__(self, modules: Sequence[nn.Module], rows: Sequence[Tensor]) -> None:
        self._modules = modules
        self._rows = [own for own in rows if not own.is_meta]
        # The other workers' parameters, how often they had been written to when made, and the checksums of the rows;
        # None when training has begun.
        self._made: tuple[list[list[tuple[nn.Parameter, int]]], list[int]] | None = self._written()

    def lasts(self) -> bool:
        """Whether training has not begun, and nobody has written to the other workers."""
        if self._made is None:
            return False
        (made, sums), (now, sums_now) = self._made, self._written()
        return _equal_pairs(made, now) and sums == sums_now

    def end(self) -> None:
        """Training does not begin with equal workers, or has begun: nothing is given any more."""
        self._made = None

    @torch.no_grad()
    def catch_up(self) -> None:
        """Give all workers the first one's parameters and buffers if it alone was written to since they were made.

        Gradients that the others have were computed elsewhere: they become zero.
        """
        if self.lasts():
            self._give_firsts()
            self._made = self._written()  # what is written to the first worker later on may be given too

    @torch.no_grad()
    def begin(self) -> None:
        """The same, for the last time."""
        if self.lasts():
            self._give_firsts()
        self.end()

    def _written(self) -> tuple[list[list[tuple[nn.Parameter, int]]], list[int]]:
        """What tells whether somebody has written to the other workers' parameters."""
        versions = [[(p, p._version) for p in module.parameters()] for module in self._modules[1:]]
        return versions, [int(checksum(own)) for own in self._rows]

    def _give_firsts(self) -> None:
        first, *others = (dict(module.named_parameters()) for module in self._modules)
        first = {name: p for name, p in first.items() if not p.is_meta and all(name in own for own in others)}
        if _alike([first, *others], first):
            return
        if not _alike(others, first):  # written to through .data, which no version counts
            return
        for own in others:
            for name, parameter in first.items():
                own[name].copy_(parameter)
            drop_gradients(own.values())
        for first_buffer, *buffers in collect(self._modules, "keep").values():
            for buffer in buffers:
                buffer.copy_(first_buffer)


def drop_gradients(parameters: Iterable[Tensor]) -> None:
    """Make the gradients zero that there are; an optimizer may count on being given some."""
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.zero_()


def _equal_pairs(made: Sequence[Sequence[tuple[Tensor, int]]], now: Sequence[Sequence[tuple[Tensor, int]]]) -> bool:
    """Whether these are the same tensors, written to as often."""
    pairs = [
        pair for own in zip(made, now, strict=True) for pair in itertools.zip_longest(*own, fillvalue=(None, -1))
    ]
    return all(old is new and before == after for (old, before), (new, after) in pairs)


def _alike(workers: Sequence[dict[str, nn.Parameter]], names: Iterable[str]) -> bool:
    """Whether all workers hold the same in these parameters."""
    first, *others = workers
    return all(_same(comm.held_here(first[name]), comm.held_here(own[name])) for name in names for own in others)


def _same(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors hold the same bytes: NaN does not equal itself, and some dtypes cannot be compared."""
    if is_traceable_wrapper_subclass(first):  # several tensors in one
        return all(_same(getattr(first, part), getattr(second, part)) for part in first.__tensor_flatten__()[0])
    if first.is_quantized:
        return torch.equal(first, second)
    first, second = (t.resolve_conj().resolve_neg().flatten().view(torch.uint8) for t in (first, second))
    return torch.equal(first, second)
