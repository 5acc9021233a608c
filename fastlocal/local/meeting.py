"""Where processes meet: each says where it stands before they exchange tensors, so that a difference is an error.

Tensors of another length, or another collective, would hang the group or corrupt it in silence.
"""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from fastlocal.comm import Group

_PURPOSES = (
    *("begin a round", "close a round", "average gradients", "compare settings", "go on from a loaded state"),
    *("compare gradients", "end a sync"),
)
BEGIN, CLOSE, GRADIENTS, COMPARE, LOADED, FIRST_GRADIENTS, LAND = range(len(_PURPOSES))
_FIRST = 32
"""Numbers in the first message of every meeting, whatever it is for: those of up to eight rows fit. A process that is
elsewhere is told so; a message of another length would end it."""
_SHOWN = 6
"""How many differences an error lists."""


class DisagreementError(RuntimeError):
    """The processes of a group were set up differently, or are not at the same step."""


class Header(NamedTuple):
    """What a process says when they meet; the first nine numbers must be everybody's."""

    rounds: int
    local_steps: int
    steps_in_round: int
    rates: float = 0.0  # sum of the learning rates that the outer step reads
    order_of_rates: int = 0  # a checksum of them, parameter by parameter
    slow_lr: float = 0.0
    slow_momentum: float = 0.0
    resting: int = 0  # a checksum of the parameters that were frozen throughout the round; 0 if none was
    elements: int = 0  # of the buffers, which are exchanged too
    interval: int = 0  # which rank 0 has chosen
    message_bytes: int = 0  # of what rank 0 sends after this
    reads_drift: int = 0  # 1 where somebody wants to know it
    flags: tuple[bool, ...] = ()  # one a row: whether it counts
    weights: tuple[float, ...] = ()  # one a row


_COMPARED = (
    *("round", "local step", "step in the round", "sum of learning rates", "learning rates by parameter"),
    *("slow_lr", "slow_momentum", "frozen parameters", "elements of buffers"),
)


def meet(group: Group, purpose: int, own: Header) -> list[Header]:
    """Everybody's header, in the group's order.

    Raises:
        DisagreementError: on every process, if they are not at the same point.
        LostRankError: one has not come in time.
    """
    numbers, rows = own[:-2], len(own.flags)
    kinds = Header.__annotations__.values()
    table = []
    mine = [*map(float, numbers), *map(float, own.flags), *own.weights]
    for said in gather(group, purpose, own.local_steps, mine):
        flags, weights = said[len(numbers) : len(numbers) + rows], said[len(numbers) + rows :]
        read: list[Any] = [kind(number) for kind, number in zip(kinds, said[: len(numbers)], strict=False)]
        table.append(Header(*read, flags=tuple(map(bool, flags)), weights=tuple(weights)))
    _require_same(group, _COMPARED, table)
    return table


def gather(group: Group, purpose: int, local_steps: int, numbers: list[float]) -> list[list[float]]:
    """Everybody's numbers, once all have said that they meet for the same, with as many.

    Raises:
        DisagreementError: on every process, if they do not.
        LostRankError: one has not come in time.
    """
    group.arrive(_PURPOSES[purpose], local_steps)
    head = [group.number, purpose, len(numbers)]
    own = [*map(float, head), *numbers]
    first, rest = own[:_FIRST], own[_FIRST:]
    table = group.gather(first + [0.0] * (_FIRST - len(first)))
    _require_same(group, ("wrapper", "purpose", "length of the message"), table)
    if rest:
        table = [said + more for said, more in zip(table, group.gather(rest), strict=True)]
    return [said[len(head) : len(own)] for said in table]


def _require_same(group: Group, names: Sequence[str], table: Sequence[Sequence[Any]]) -> None:
    """Raise DisagreementError unless the first of everybody's numbers, which have names, are the same."""
    differences = [
        f"rank {rank} is at {what} {_shown(what, theirs)}, rank {group.ranks[0]} at {_shown(what, first)}"
        for rank, said in zip(group.ranks[1:], table[1:], strict=True)
        for what, theirs, first in zip(names, said, table[0], strict=False)
        if theirs != first
    ]
    if differences:
        raise DisagreementError(
            f"the processes are not at the same point: {_listed(differences)}. All must build and call their "
            "wrappers in one order, take equally many steps with the same learning rates, and call sync() together"
        )


def compare(
    group: Group, settings: dict[str, Any], tensors: list[tuple], local_steps: int, purpose: int = COMPARE
) -> None:
    """Raise unless every process has the same settings, and tensors of the same names, shapes, strides and dtypes.

    Args:
        group: the processes.
        settings: name -> value, anything that can be pickled and compared.
        tensors: a description of each tensor that will be exchanged.
        local_steps: for the error, should a process be missing.
        purpose: COMPARE or LOADED.

    Raises:
        DisagreementError: on every process, naming the ranks that differ and in what.
    """
    gather(group, purpose, local_steps, [])
    digest = hashlib.sha256(repr(tensors).encode()).hexdigest()
    everybody = group.gather_objects((settings, digest))
    first, first_digest = everybody[0]
    differences = [
        f"rank {rank} has {name} {theirs.get(name)!r}, rank {group.ranks[0]} has {first.get(name)!r}"
        for rank, (theirs, _) in zip(group.ranks, everybody, strict=True)
        for name in first | theirs
        if theirs.get(name) != first.get(name) and repr(theirs.get(name)) != repr(first.get(name))  # NaN is NaN
    ]
    if any(other != first_digest for _, other in everybody):
        tables = group.gather_objects(tensors)
        for rank, table in zip(group.ranks, tables, strict=True):
            pairs = [(table[i : i + 1], tables[0][i : i + 1]) for i in range(max(len(table), len(tables[0])))]
            wrong = next(((theirs, ours) for theirs, ours in pairs if theirs != ours), None)
            if wrong:
                differences.append(
                    f"rank {rank} has the tensor {_described(wrong[0])}, rank {group.ranks[0]} {_described(wrong[1])}"
                )
    if differences:
        raise DisagreementError(f"the processes were set up differently: {_listed(differences)}")


def _described(rows: list[tuple]) -> str:
    return " ".join(map(str, rows[0])) if rows else "none"


def _shown(what: str, value: float) -> str:
    if what in ("frozen parameters", "learning rates by parameter"):
        return f"with checksum {value:.0f}" if value else "none"
    return repr(_PURPOSES[int(value)]) if what == "purpose" else f"{value:g}"


def _listed(differences: list[str]) -> str:
    more = len(differences) - _SHOWN
    return "; ".join(differences[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")
