"""Device tables that let one launch serve any number of tensors, built once and kept while the addresses
stay.

A step only reads the addresses of its tensors and compares them with those of the step before. Tables are
grouped in buckets of one dtype and alignment, each of which is one launch a kernel.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import triton.language as tl
from torch import Tensor

from fastlocal.kernels.trust_ratio_common import CHUNK

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass
class Bucket:
    """Tensors that one launch can serve."""

    dtypes: tuple[torch.dtype, ...]  # of the first rows: weights, gradients
    aligned: bool  # every address is a multiple of 16
    pointers: Tensor  # (rows, num_tensors) int64
    sizes: Tensor  # (num_tensors,) int64, elements
    chunks: Tensor  # (num_chunks, 2) int32: tensor, chunk within the tensor
    first_chunk: Tensor  # (num_tensors + 1,) int32
    adapts: Tensor  # (num_tensors,) int32
    num_tensors: int
    num_chunks: int
    scratch: dict[str, Tensor] = field(default_factory=dict)
    # Tensors laid out unlike their neighbours are worked on as copies.
    copies_in: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # (copy, original)
    copies_out: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # (original, copy)

    def float_scratch(self, name: str, *shape: int) -> Tensor:
        """An uninitialised float32 buffer, the same one at every step."""
        if name not in self.scratch:
            self.scratch[name] = torch.empty(shape, dtype=torch.float32, device=self.pointers.device)
        return self.scratch[name]


@dataclass
class _Tables:
    key: list[object]
    buckets: list[Bucket]


def buckets(
    cache: dict,
    name: str,
    rows: Sequence[Sequence[Tensor]],
    written: Sequence[int],
    adapts: tuple[object, Callable[[Tensor], bool]] | None = None,
    steps: Sequence[Tensor] | None = None,
) -> list[Bucket]:
    """The buckets of these tensors, from the cache while no address has changed.

    Args:
        cache: where they are kept, under `name`.
        name: what they are for.
        rows: rows[r][t] is tensor t's weight, gradient, moment, ...: all of one shape.
        written: the rows that the kernels write.
        adapts: which weights have a trust ratio, and a key that changes when the answers do.
        steps: one scalar a tensor, the table's last row.
    """
    every = [t for row in rows for t in row]
    key: list[object] = [t.data_ptr() for t in every]
    # A new gradient may lie where the last one did and be laid out otherwise.
    key += [t.stride() for t in rows[min(1, len(rows) - 1)] if not t.is_contiguous()]
    key += [None if adapts is None else adapts[0], len(every)]
    if steps is not None:
        key += [s.data_ptr() for s in steps]
    tables = cache.get(name)
    if tables is None or tables.key != key:
        flags = [True if adapts is None else adapts[1](t) for t in rows[0]]
        tables = cache[name] = _Tables(key, _build(rows, written, flags, steps))
    return tables.buckets


def _is_dense(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(tensor)


def _same_layout(a: Tensor, b: Tensor) -> bool:
    return a.stride() == b.stride() or (a.is_contiguous() and b.is_contiguous())


def _build(
    rows: Sequence[Sequence[Tensor]],
    written: Sequence[int],
    adapts: Sequence[bool],
    steps: Sequence[Tensor] | None,
) -> list[Bucket]:
    members: dict[tuple, list[tuple[list[Tensor], int]]] = {}
    copies: dict[tuple, tuple[list, list]] = {}
    for index, tensors in enumerate(zip(*rows, strict=True)):
        # The state decides the layout: it is dense, and outlives gradients and copies.
        model = tensors[2] if len(tensors) > 2 else tensors[0]
        strides = model.stride() if _is_dense(model) else torch.empty(model.shape, device="meta").stride()
        laid_out, copies_in, copies_out = [], [], []
        for row, tensor in enumerate(tensors):
            if _is_dense(tensor) and (tensor.stride() == strides or _same_layout(tensor, model)):
                laid_out.append(tensor)
                continue
            copy = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device)
            laid_out.append(copy)
            copies_in.append((copy, tensor))
            if row in written:
                copies_out.append((tensor, copy))
        aligned = all(t.data_ptr() % 16 == 0 for t in laid_out)
        kind = (tuple(t.dtype for t in laid_out[:2]), aligned)
        members.setdefault(kind, []).append((laid_out, index))
        into, back = copies.setdefault(kind, ([], []))
        into += copies_in
        back += copies_out
    return [_bucket(kind, found, copies[kind], adapts, steps) for kind, found in members.items()]


def _bucket(
    kind: tuple,
    members: list[tuple[list[Tensor], int]],
    copies: tuple[list, list],
    adapts: Sequence[bool],
    steps: Sequence[Tensor] | None,
) -> Bucket:
    device = members[0][0][0].device
    laid_out = [tensors for tensors, _ in members]
    addresses = [[t.data_ptr() for t in row] for row in zip(*laid_out, strict=True)]
    if steps is not None:
        addresses.append([steps[index].data_ptr() for _, index in members])
    sizes = torch.tensor([tensors[0].numel() for tensors, _ in members])
    counts = (sizes + CHUNK - 1) // CHUNK
    first_chunk = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    owner = torch.repeat_interleave(torch.arange(len(members)), counts)
    within = torch.arange(len(owner)) - first_chunk[owner]
    flags = [adapts[index] for _, index in members]
    return Bucket(
        dtypes=kind[0],
        aligned=kind[1],
        pointers=_upload(torch.tensor(addresses, dtype=torch.int64), device),
        sizes=_upload(sizes, device),
        chunks=_upload(torch.stack([owner, within], dim=1).to(torch.int32), device),
        first_chunk=_upload(first_chunk.to(torch.int32), device),
        adapts=_upload(torch.tensor(flags, dtype=torch.int32), device),
        num_tensors=len(members),
        num_chunks=len(owner),
        copies_in=copies[0],
        copies_out=copies[1],
    )


def _upload(table: Tensor, device: torch.device) -> Tensor:
    # From pageable memory the copy would wait for the device.
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table
