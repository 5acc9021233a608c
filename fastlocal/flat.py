"""Workers' parameters as rows of one flat buffer per device and dtype.

A parameter becomes a view of its worker's row and stays one: an optimizer, an autograd graph or a CUDA graph
that holds it sees every sync, and averaging K workers is one operation on a (K, n) tensor without packing.
A DTensor, whose storage belongs to whoever cut it (FSDP), stays where it is: its piece is copied into the row
before a sync and back after it.
This module moves no bytes between processes and does no arithmetic on parameters.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastlocal import comm
from fastlocal.buffers import stored_parts
from fastlocal.following import Following
from fastlocal.memory import extent, require_own_memory
from fastlocal.twin import require_initialised

ALIGNMENT = 16
"""Elements: every parameter starts at a multiple of it, so that kernels and libraries load 16 bytes at a time."""

Layout = list[tuple[str, str, list[tuple[str, list[int]]]]]
"""Per block the device type, the dtype, and each parameter's name and shape."""


@dataclass(frozen=True)
class Slot:
    """Where one parameter lies in every row of a block."""

    name: str
    shape: torch.Size
    stride: tuple[int, ...]  # dense, in the parameter's own memory format
    start: int  # column of the first element, a multiple of ALIGNMENT
    stop: int  # column after the last one and its padding


@dataclass(frozen=True)
class Block:
    """The parameters of one device and dtype: `rows` has the shape (k, n), one row a worker.

    DTensors that are cut alike have a block of their own, with their pieces in its rows, and `owner` one of them.
    """

    rows: Tensor
    slots: list[Slot]
    owner: Tensor | None

    def view(self, worker: int, slot: Slot) -> Tensor:
        """One worker's parameter, as a view of its row."""
        offset = self.rows.storage_offset() + worker * self.rows.stride(0) + slot.start
        return self.rows.as_strided(slot.shape, slot.stride, offset)

    def own(self, worker: int, slot: Slot) -> Tensor:
        """That view with a storage of its own over the same memory.

        What saves models (torch.save, safetensors, accelerate) tells tensors apart by their storages: of parameters
        in one storage it keeps the first, or each with all the others.
        """
        view = self.view(worker, slot)
        if view.is_meta or view.numel() == 0:
            return view
        start = int(view.storage_offset()) * view.element_size()
        storage = view.untyped_storage()[start : start + extent(view)]
        return torch.empty(0, dtype=view.dtype, device=view.device).set_(storage, 0, slot.shape, slot.stride)

    def holds(self, parameter: Tensor, worker: int, slot: Slot) -> bool:
        """Whether the parameter is still that view; where nothing is stored, only its strides tell."""
        offset = worker * self.rows.stride(0) + slot.start
        address = self.rows.data_ptr() + offset * self.rows.element_size()
        return parameter.stride() == slot.stride and (parameter.numel() == 0 or parameter.data_ptr() == address)


class Rows:
    """The trainable parameters of k equal modules, moved into flat buffers, one row a module.

    The set of tensors is fixed here: those that require a gradient now. Their values and memory formats stay.

    Args:
        modules: the workers; their parameters have the same names, shapes, dtypes and devices.

    Attributes:
        num_bytes: of one worker's trainable parameters, padding not counted; of DTensors all pieces.
        num_elements: likewise.
        following: what is loaded into the first worker alone before training begins is for all.

    Raises:
        ValueError: there is nothing to train, a parameter is complex, uninitialised or no plain tensor, one shares
            memory with another or a buffer, or the modules differ.
    """

    def __init__(self, modules: Sequence[nn.Module], names: Sequence[str] | None = None) -> None:
        self.modules = list(modules)
        for module in self.modules:
            require_initialised(module)
        self.parameters = [
            {n: p for n, p in m.named_parameters() if (p.requires_grad if names is None else n in names)}
            for m in self.modules
        ]
        if not self.parameters[0]:
            raise ValueError("the model has no parameter that requires a gradient: there is nothing to average")
        # In a copy of rows nothing is tied any more, whatever a forward pass left in buffers.
        require_own_memory(self.parameters[0], self.modules[0] if names is None else None)
        for worker, parameters in enumerate(self.parameters[1:], start=1):
            _require_equal(self.parameters[0], parameters, worker)
        self.blocks = _allocate(self.parameters[0], len(self.modules))
        self.num_elements = sum(p.numel() for p in self.parameters[0].values())
        self.num_bytes = sum(p.numel() * p.element_size() for p in self.parameters[0].values())
        with torch.no_grad():
            for block, slot, worker, parameter in self._places():
                block.view(worker, slot).copy_(comm.held_here(parameter))
                if block.owner is None:
                    parameter.data = block.own(worker, slot)
        self._begun: set[str] = set()  # names of the parameters that some optimizer has begun to step
        self.following = Following(self.modules, [block.rows[1:] for block in self.blocks])

    def __len__(self) -> int:
        return len(self.modules)

    def stepped_by(self, optimizer: torch.optim.Optimizer) -> set[str]:
        """The names of the parameters that an optimizer steps."""
        stepped = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        return {name for name, parameter in self.parameters[0].items() if parameter in stepped}

    def stepped_columns(self, block: Block, optimizer: torch.optim.Optimizer) -> Tensor:
        """What the first row of a block has of the parameters that an optimizer steps, one after the other."""
        stepped, row = self.stepped_by(optimizer), block.rows[0]
        if all(slot.name in stepped for slot in block.slots):
            return row
        return torch.cat([row[:0], *(row[slot.start : slot.stop] for slot in block.slots if slot.name in stepped)])

    def begin(self, optimizer: torch.optim.Optimizer) -> set[str]:
        """Note that an optimizer steps its parameters; returns the names of all that no other one has stepped yet."""
        own = self.stepped_by(optimizer)
        begin = self.parameters[0].keys() - (self._begun - own)
        self._begun |= own
        return begin

    def others_have_begun(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether parameters have been stepped that are not this optimizer's."""
        return not self._begun <= self.stepped_by(optimizer)

    def frozen(self) -> dict[str, list[Tensor]]:
        """The parameters that have no row, as nobody trains them, by name, in each worker; of DTensors the pieces, of
        tensors that are several in one the parts, of expanded ones what is stored. Left out are sparse ones, those
        on the meta device, and an expanded one beside its copies, which are not.
        """
        first, *others = (
            dict(
                part
                for name, parameter in module.named_parameters()
                if name not in self.parameters[0]
                for part in stored_parts(name, comm.held_here(parameter.detach()))
            )
            for module in self.modules
        )
        return {
            name: [part, *(own[name] for own in others)]
            for name, part in first.items()
            if all(name in own and own[name].shape == part.shape for own in others)
        }

    @property
    def layout(self) -> Layout:
        """What a checkpoint must match."""
        return [
            (b.rows.device.type, str(b.rows.dtype), [(slot.name, list(slot.shape)) for slot in b.slots])
            for b in self.blocks
        ]

    def require_layout(self, saved: Layout) -> None:
        """Raise ValueError unless a saved layout has the same parameters in the same order, on whatever device."""
        try:
            then = [(name, dtype, list(shape)) for _, dtype, slots in saved for name, shape in slots]
        except (TypeError, ValueError):
            raise ValueError(f"the saved layout must list blocks of parameters, got {str(saved)[:60]}") from None
        now = [(name, dtype, list(shape)) for _, dtype, slots in self.layout for name, shape in slots]
        for old, new in itertools.zip_longest(then, now):
            if old != new:
                raise ValueError(f"the state is of another model: it has the parameter {old}, here it is {new}")

    @torch.no_grad()
    def pull(self) -> None:
        """Copy the pieces of DTensors into the rows; other parameters are there already."""
        for view, parameter in self._pieces():
            view.copy_(comm.held_here(parameter))

    @torch.no_grad()
    def push(self) -> None:
        """Copy the rows back into the pieces of DTensors, and let autograd know that all parameters have changed."""
        for view, parameter in self._pieces():
            comm.held_here(parameter).copy_(view)
        for parameters in self.parameters:
            torch.autograd.graph.increment_version(parameters.values())

    def _places(self) -> Iterator[tuple[Block, Slot, int, nn.Parameter]]:
        """Every parameter of every worker, with its block, slot and worker's number."""
        for block in self.blocks:
            for slot in block.slots:
                for worker, parameters in enumerate(self.parameters):
                    yield block, slot, worker, parameters[slot.name]

    def _pieces(self) -> Iterator[tuple[Tensor, nn.Parameter]]:
        """Every DTensor, behind the view of its piece's row."""
        for block, slot, worker, parameter in self._places():
            if block.owner is not None:
                yield block.view(worker, slot), parameter

    def owners(self) -> list[Tensor]:
        """One DTensor for each way of cutting them; none if all parameters are plain."""
        return [block.owner for block in self.blocks if block.owner is not None]

    def check(self) -> None:
        """Raise RuntimeError if a parameter has left its row, or a new one has become trainable."""
        for worker, (module, known) in enumerate(zip(self.modules, self.parameters, strict=True)):
            present = dict(module.named_parameters())
            for name, parameter in known.items():
                if present.get(name) is not parameter:
                    reason = (
                        "was replaced by another one, which no optimizer steps: load state dicts without assign=True"
                    )
                    if name not in present:
                        reason = "is gone: prune or parametrise the model before it is handed to fastlocal"
                    elif comm.is_sharded(parameter):
                        reason = "is not in pieces now: call model.reshard() after a forward pass without a backward"
                    raise RuntimeError(f"parameter {name!r} of worker {worker} {reason}")
            new = [name for name, p in present.items() if p.requires_grad and name not in known]
            if new:
                raise RuntimeError(
                    f"parameter {new[0]!r} of worker {worker} became trainable after its optimizer was built and "
                    "would not be averaged: unfreeze it first, then build the optimizer"
                )
        for block, slot, worker, parameter in self._places():
            if block.owner is None and not block.holds(parameter, worker, slot):
                raise RuntimeError(
                    f"parameter {slot.name!r} of worker {worker} no longer lies in its row (the model was moved, "
                    "cast, re-assigned, shared with a spawned process, or prepared by accelerate, Lightning or the "
                    "like): do that before it is handed to fastlocal; several optimizers of one model take the same "
                    "Workers"
                )

    def __getstate__(self) -> dict[str, Any]:
        # Copies of views are no views: __setstate__ lays the rows out again, frozen meanwhile or not.
        return {
            "modules": self.modules,
            "names": list(self.parameters[0]),
            "begun": sorted(self._begun),
            "as_made": self.following.lasts(),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        Rows.__init__(self, state["modules"], state["names"])
        self._begun = set(state.get("begun", ()))
        if not state.get("as_made"):
            self.following.end()


def _require_equal(first: dict[str, nn.Parameter], other: dict[str, nn.Parameter], worker: int) -> None:
    if first.keys() != other.keys():
        name = sorted(first.keys() ^ other.keys())[0]
        raise ValueError(f"worker {worker} has other trainable parameters than worker 0: {name!r} is in one only")
    for name, parameter in first.items():
        twin = other[name]
        if (parameter.shape, parameter.dtype, parameter.device) != (twin.shape, twin.dtype, twin.device):
            raise ValueError(
                f"parameter {name!r} is {tuple(twin.shape)} {twin.dtype} on {twin.device} in worker {worker}, but "
                f"{tuple(parameter.shape)} {parameter.dtype} on {parameter.device} in worker 0"
            )


def _allocate(parameters: dict[str, nn.Parameter], num_workers: int) -> list[Block]:
    kinds: dict[tuple, list[Slot]] = {}
    for name, parameter in parameters.items():
        if parameter.is_complex():
            raise ValueError(f"parameter {name!r} is complex ({parameter.dtype}): only real parameters are averaged")
        here = comm.held_here(parameter.detach())
        slots = kinds.setdefault((parameter.device, parameter.dtype, comm.cut_of(parameter)), [])
        start = slots[-1].stop if slots else 0
        stop = start + -(-here.numel() // ALIGNMENT) * ALIGNMENT
        stride = torch.empty_like(here, device="meta").stride()
        slots.append(Slot(name, here.shape, stride, start, stop))
    blocks = []
    for (device, dtype, cut), slots in kinds.items():
        rows = torch.zeros(num_workers, slots[-1].stop, dtype=dtype, device=device)
        blocks.append(Block(rows, slots, None if cut is None else parameters[slots[0].name]))
    return blocks
