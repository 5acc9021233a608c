"""Device tables that let one launch serve any number of tensors, built once and kept while the addresses
stay.

A step only reads the addresses of its tensors and compares them with those of the step before; if only
gradients have moved, it writes their new addresses and nothing else. Tables are grouped in buckets of one
dtype and alignment, each of which is one launch a kernel.
"""

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from operator import attrgetter

import torch
import triton.language as tl
from torch import Tensor

from fastlocal.kernels.device import is_capturing
from fastlocal.kernels.trust_ratio_common import CHUNK
from fastlocal.kernels.trust_ratio_queue import queue_of
from fastlocal.kernels.trust_ratio_upload import Staging

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
    members: list[int]  # which of the tensors these are
    num_tensors: int
    num_chunks: int
    chunk_counts: Tensor  # (num_tensors,) int64, on the host
    staging: Staging
    scratch: dict[str, Tensor] = field(default_factory=dict)
    # Tensors laid out unlike their neighbours are worked on as copies.
    copies_in: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # (copy, original)
    copies_out: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # (original, copy)
    on_host: list[Tensor] = field(default_factory=list)  # what the tables are copied from, by a graph at every replay

    def float_scratch(self, name: str, *shape: int) -> Tensor:
        """An uninitialised float32 buffer, the same one at every step."""
        if name not in self.scratch:
            self.scratch[name] = torch.empty(shape, dtype=torch.float32, device=self.pointers.device)
        return self.scratch[name]

    def queue(self, lag: int) -> tuple[Tensor, Tensor]:
        """The queue of a step in one launch, and its counters."""
        device, name = self.pointers.device, f"queue {lag}"
        if name not in self.scratch:
            self.scratch[name] = self.staging.upload(device, queue_of(self.chunk_counts, lag), self.on_host)
        if "counters" not in self.scratch:
            self.scratch["counters"] = torch.empty(1 + 2 * self.num_tensors, dtype=torch.int32, device=device)
        return self.scratch[name], self.scratch["counters"]


@dataclass
class _Key:
    """What tables depend on."""

    kind: tuple
    addresses: list[int]  # of everything but gradients
    dims: list[int]  # of weights
    layouts: list[tuple[int, tuple[int, ...]]]  # the strides of weights that are not contiguous
    dtypes: list[torch.dtype]  # of gradients
    sizes: list[int]  # of gradients
    strides: list[tuple[int, tuple[int, ...]]]  # of gradients that are not contiguous
    gradients: list[int]

    def differs_in_gradients_alone(self, other: "_Key") -> bool:
        mine = self.addresses, self.dims, self.layouts, self.dtypes, self.sizes, self.strides, self.kind
        theirs = other.addresses, other.dims, other.layouts, other.dtypes, other.sizes, other.strides, other.kind
        return mine == theirs


@dataclass
class _Tables:
    key: _Key
    buckets: list[Bucket]
    in_graph: bool = False  # replays read them, so they stay as they are

    def __post_init__(self) -> None:
        self.num_bytes = sum(table.nbytes for bucket in self.buckets for table in bucket.on_host)

    def set_room_aside(self) -> None:
        """For the tables of the next capture."""
        self.buckets[0].staging.set_aside(self.num_bytes)

    def follow(self, key: _Key, row: int) -> bool:
        """Writes new addresses of gradients into the tables, or returns False where that is not enough."""
        if self.in_graph or is_capturing(self.buckets[0].pointers.device):
            return False
        moved = []
        for bucket in self.buckets:
            alone = len(self.buckets) == 1
            addresses = key.gradients if alone else list(map(key.gradients.__getitem__, bucket.members))
            # From a list, torch.tensor takes twice as long.
            table = torch.frombuffer(array("q", addresses), dtype=torch.int64)
            if bucket.copies_in or (bucket.aligned and bool((table % 16).any())):
                return False
            moved.append(table)
        for bucket, table in zip(self.buckets, moved, strict=True):
            pinned = table.pin_memory() if bucket.pointers.is_cuda else table
            bucket.pointers[row].copy_(pinned, non_blocking=True)
        self.key = key
        return True


# Called through `map`, a sixth faster than as methods.
_data_ptr = torch.Tensor.data_ptr
_numel = torch.Tensor.numel
_dim = torch.Tensor.dim
_is_contiguous = torch.Tensor.is_contiguous
_dtype = attrgetter("dtype")


def _strides(tensors: Sequence[Tensor]) -> list[tuple[int, tuple[int, ...]]]:
    if all(map(_is_contiguous, tensors)):
        return []
    return [(i, t.stride()) for i, t in enumerate(tensors) if not t.is_contiguous()]


def _gradient_row(rows: Sequence[Sequence[Tensor]]) -> int:
    return min(1, len(rows) - 1)


def _key(rows: Sequence[Sequence[Tensor]], flags: object, steps: Sequence[Tensor] | None) -> _Key:
    row = _gradient_row(rows)
    others = chain(*rows[:row], *rows[row + 1 :], () if steps is None else steps)
    lengths = [len(r) for r in rows], None if steps is None else len(steps)
    return _Key(
        kind=(flags, *lengths),
        addresses=list(map(_data_ptr, others)),
        # A weight may be transposed or viewed otherwise where it lies; new state may lie where the old was.
        dims=list(map(_dim, rows[0])),
        layouts=[_strides(own) for number, own in enumerate(rows) if number != row],
        # A new gradient may lie where the last one did, and be of another dtype or size, or laid out otherwise.
        dtypes=list(map(_dtype, chain(*rows[: row + 1]))),
        sizes=list(map(_numel, rows[row])),
        strides=_strides(rows[row]),
        gradients=list(map(_data_ptr, rows[row])),
    )


def kept_buckets(
    cache: dict,
    name: str,
    rows: Sequence[Sequence[Tensor]],
    flags: object,
    steps: Sequence[Tensor] | None = None,
) -> list[Bucket] | None:
    """The buckets in the cache, told where the gradients are; None if they are of other tensors."""
    tables: _Tables | None = cache.get(name)
    if tables is None:
        return None
    try:
        key = _key(rows, flags, steps)
    except RuntimeError:  # a sparse gradient has no address
        return None
    if not key.differs_in_gradients_alone(tables.key):
        return None
    row = _gradient_row(rows)
    if key.gradients != tables.key.gradients and not tables.follow(key, row):
        return None
    if is_capturing(tables.buckets[0].pointers.device):
        _keep_for_graph(cache, tables)
    else:
        tables.set_room_aside()
    return tables.buckets


def _keep_for_graph(cache: dict, tables: _Tables) -> None:
    """Replays read the tables, and copy those built in the capture from the host again."""
    if not tables.in_graph:
        tables.in_graph = True
        cache.setdefault("captured", []).append(tables)


def buckets(
    cache: dict,
    name: str,
    rows: Sequence[Sequence[Tensor]],
    written: Sequence[int],
    flags: object,
    adapts: Callable[[Tensor], bool],
    steps: Sequence[Tensor] | None = None,
) -> list[Bucket]:
    """The buckets of these tensors, from the cache while no address but a gradient's has changed.

    Args:
        cache: where they are kept, under `name`.
        name: what they are for.
        rows: rows[r][t] is tensor t's weight, gradient, moment, ...: all of one shape. A single row are
            gradients.
        written: the rows that the kernels write.
        flags: changes when the answers of `adapts` do.
        adapts: which weights have a trust ratio.
        steps: one scalar a tensor, the table's last row.
    """
    kept = kept_buckets(cache, name, rows, flags, steps)
    if kept is not None:
        return kept
    staging = cache.setdefault((name, "staging"), Staging())
    built = _build(rows, written, [adapts(t) for t in rows[0]], steps, staging)
    tables = _Tables(_key(rows, flags, steps), built)
    if is_capturing(rows[0][0].device):
        # On the device they hold nothing before the first replay: no other step may find them.
        _keep_for_graph(cache, tables)
    else:
        cache[name] = tables
        tables.set_room_aside()
    return built


def _check(tensors: Sequence[Tensor], step: Tensor | None) -> None:
    """Raises for what the kernels would read from the wrong place or as something else."""
    param, _, *state = tensors if len(tensors) > 1 else (tensors[0], tensors[0])
    for tensor in (*tensors[1:], *(() if step is None else (step,))):
        if tensor.device != param.device:
            raise RuntimeError(f"gradients and state must be on the parameter's {param.device}, got {tensor.device}")
    for tensor in (*state, *(() if step is None else (step,))):
        if tensor.dtype != torch.float32:
            raise TypeError(f"state must be float32 for impl='triton' (fused=True), got {tensor.dtype}")


def _is_dense(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(tensor)


def _same_layout(a: Tensor, b: Tensor) -> bool:
    return a.stride() == b.stride() or (a.is_contiguous() and b.is_contiguous())


def _build(
    rows: Sequence[Sequence[Tensor]],
    written: Sequence[int],
    adapts: Sequence[bool],
    steps: Sequence[Tensor] | None,
    staging: Staging,
) -> list[Bucket]:
    members: dict[tuple, list[tuple[list[Tensor], int]]] = {}
    copies: dict[tuple, tuple[list, list]] = {}
    for index, tensors in enumerate(zip(*rows, strict=True)):
        _check(tensors, None if steps is None else steps[index])
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
    return [_bucket(kind, found, copies[kind], adapts, steps, staging) for kind, found in members.items()]


def _bucket(
    kind: tuple,
    members: list[tuple[list[Tensor], int]],
    copies: tuple[list, list],
    adapts: Sequence[bool],
    steps: Sequence[Tensor] | None,
    staging: Staging,
) -> Bucket:
    device = members[0][0][0].device
    laid_out = [tensors for tensors, _ in members]
    addresses = [[t.data_ptr() for t in row] for row in zip(*laid_out, strict=True)]
    if steps is not None:
        addresses.append([steps[index].data_ptr() for _, index in members])
    sizes = torch.tensor([tensors[0].numel() for tensors, _ in members], device="cpu")
    counts = ((sizes + CHUNK - 1) // CHUNK).clamp(min=1)  # an empty tensor's step is counted too
    first_chunk = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    owner = torch.arange(len(members), device="cpu").repeat_interleave(counts)
    within = torch.arange(len(owner), device="cpu") - first_chunk[owner]
    flags = [adapts[index] for _, index in members]
    on_host: list[Tensor] = []
    upload = partial(staging.upload, device, on_host=on_host)
    return Bucket(
        dtypes=kind[0],
        aligned=kind[1],
        pointers=upload(torch.tensor(addresses, dtype=torch.int64, device="cpu")),
        sizes=upload(sizes),
        chunks=upload(torch.stack([owner, within], dim=1).to(torch.int32)),
        first_chunk=upload(first_chunk.to(torch.int32)),
        adapts=upload(torch.tensor(flags, dtype=torch.int32, device="cpu")),
        members=[index for _, index in members],
        num_tensors=len(members),
        num_chunks=len(owner),
        chunk_counts=counts,
        staging=staging,
        copies_in=copies[0],
        copies_out=copies[1],
        on_host=on_host,
    )
