"""On paper: what a training step costs on W workers over a link, and what syncing once an interval saves.

Seconds and bytes alone; what an interval costs in accuracy is not here. Standard library only.
"""

from dataclasses import dataclass, replace
from math import isfinite
from typing import Literal

from fastlocal.train.errors import UsageError

PlanMethod = Literal["sync", "local-sgd", "slowmo", "diloco", "streaming"]
WireDtype = Literal["fp32", "bf16", "fp8", "fp4"]
Overlap = Literal["none", "backward"]
Within = Literal["round", "step"]

BITS: dict[WireDtype, int] = {"fp32": 32, "bf16": 16, "fp8": 8, "fp4": 4}
BACKWARD_SHARE = 2 / 3
"""Of a step: the backward pass multiplies twice as much as the forward pass does."""

_LEAST = 1e-30
"""Of what is divided by: products of smaller numbers could become 0."""

TCP_SHARE = 1448 / 1538
"""Payload in what a link carries: 1,448 bytes of a TCP segment fill 1,538 of Ethernet, gap and preamble counted."""


@dataclass(frozen=True)
class Link:
    """What connects a worker (or a group of workers) with the others; sending and receiving do not share it.

    Args:
        gigabits_per_second: its rate, headers included.
        latency_seconds: from a sender to its neighbour.
        payload_share: of the rate, what is left to payload.
    """

    gigabits_per_second: float
    latency_seconds: float = 0.0
    payload_share: float = TCP_SHARE

    @property
    def bytes_per_second(self) -> float:
        """Of payload."""
        return self.gigabits_per_second * 1e9 / 8 * self.payload_share


@dataclass(frozen=True)
class Plan:
    """A training run to be estimated.

    Args:
        parameters: of the model.
        workers: W, all of them.
        step_seconds: computing of one local step.
        link: between workers, or between groups of workers.
        method: "sync" averages gradients in every step; "local-sgd", "slowmo" and "diloco" average parameters
            once a round, in equal time; "streaming" is DiLoCo that sends one of its fragments at a time while
            the workers go on.
        interval: local steps a round, J.
        wire_dtype: of what is sent.
        baseline_dtype: of gradients: in the synchronous training that is compared with, and within groups. They are
            what "sync" sends, so there it is `wire_dtype`.
        overlap: "backward" hides gradients' averaging behind the backward pass. Parameters are not known before
            the step is over, so it hides nothing of a round's sync.
        shared_link: all workers (or groups) send through one link together, instead of one each.
        group_size: workers of a group, inside which they talk over `inner_link`; 1 is a flat ring.
        inner_link: between the workers of a group.
        within: "round": the groups' workers are on their own too and take part in the round's sync; "step": they
            average gradients among themselves in every step, so that a group is one worker.
        fragments: of "streaming": parts that are sent at different times of the round.
        overlap_steps: local steps that what is sent may take to arrive before anybody waits, which is `overlap_steps`
            of the wrappers; None is 1 for "streaming" and 0 for the others.
    """

    parameters: float
    workers: int
    step_seconds: float
    link: Link
    method: PlanMethod = "local-sgd"
    interval: int = 16
    wire_dtype: WireDtype = "fp32"
    baseline_dtype: WireDtype = "fp32"
    overlap: Overlap = "none"
    shared_link: bool = False
    group_size: int = 1
    inner_link: Link | None = None
    within: Within = "round"
    fragments: int = 8
    overlap_steps: int | None = None

    @property
    def groups(self) -> int:
        """Rings on the outer link: workers over group_size."""
        return self.workers // self.group_size

    def synchronous(self) -> "Plan":
        """The data-parallel training that this plan is compared with."""
        return replace(self, method="sync", interval=1, wire_dtype=self.baseline_dtype)


@dataclass(frozen=True)
class Estimate:
    """What a plan comes to, a worker.

    Attributes:
        step_seconds: of a local step with its share of the syncs.
        communication_share: of that, the part in which nobody computes, 0 to 1.
        sync_seconds: of one whole averaging between all, overlapped or not.
        outer_bytes_per_step: sent over `link` by a worker, or by a group of workers, on the mean of a round.
        outer_bytes_per_day: likewise, in 86,400 s.
        synchronous_step_seconds: of the synchronous training.
        speedup: steps in the time of one synchronous step.
    """

    step_seconds: float
    communication_share: float
    sync_seconds: float
    outer_bytes_per_step: float
    outer_bytes_per_day: float
    synchronous_step_seconds: float
    speedup: float


def ring_seconds(num_bytes: float, members: int, link: Link, *, sharers: int = 1) -> float:
    """A ring all-reduce: 2(W − 1)/W · bytes/bandwidth + 2(W − 1) · latency.

    Args:
        num_bytes: of the payload, on each member.
        members: W, of the ring.
        link: of each member.
        sharers: members that send through one link at the same time.

    References:
        Patarasuk and Yuan, Bandwidth Optimal All-reduce Algorithms, 2009, sections 3 and 4
    """
    return ring_bytes(num_bytes, members) * sharers / link.bytes_per_second + 2 * (members - 1) * link.latency_seconds


def ring_bytes(num_bytes: float, members: int) -> float:
    """What each member of a ring sends in an all-reduce of `num_bytes`."""
    return 2 * (members - 1) / members * num_bytes


def sync_seconds(plan: Plan, num_bytes: float) -> float:
    """One averaging of `num_bytes` between all workers.

    In two levels: reduce-scatter within each group, a ring of groups for each shard, all of them over the group's
    one link, all-gather within. The two inner halves are together one inner ring all-reduce.

    References:
        Jia et al., Highly Scalable Deep Learning Training System, arXiv:1807.11205, section 4.2
    """
    sharers = plan.groups if plan.shared_link else 1
    return inner_seconds(plan, num_bytes) + ring_seconds(num_bytes, plan.groups, plan.link, sharers=sharers)


def inner_seconds(plan: Plan, num_bytes: float) -> float:
    """One averaging within a group; 0 for a flat ring."""
    if plan.group_size == 1:
        return 0.0
    assert plan.inner_link is not None
    return ring_seconds(num_bytes, plan.group_size, plan.inner_link)


def estimate(plan: Plan) -> Estimate:
    """What the plan comes to.

    Raises:
        UsageError: a value is out of its range or has no use.
    """
    check(plan)
    own, synchronous = _waiting(plan), _waiting(plan.synchronous())
    step_seconds, synchronous_seconds = plan.step_seconds + own, plan.step_seconds + synchronous
    num_bytes = plan.parameters * BITS[plan.wire_dtype] / 8
    per_step = ring_bytes(num_bytes, plan.groups) / _rounds_of(plan)
    estimated = Estimate(
        step_seconds=step_seconds,
        communication_share=own / step_seconds,
        sync_seconds=sync_seconds(plan, num_bytes),
        outer_bytes_per_step=per_step,
        outer_bytes_per_day=per_step / step_seconds * 86_400,
        synchronous_step_seconds=synchronous_seconds,
        speedup=synchronous_seconds / step_seconds,
    )
    if not all(map(isfinite, vars(estimated).values())):
        raise UsageError("the estimate is beyond what a float holds: lower --parameters, --workers or --latency-ms")
    return estimated


def _rounds_of(plan: Plan) -> int:
    return 1 if plan.method == "sync" else plan.interval


def _waiting(plan: Plan) -> float:
    """Seconds a local step in which a worker waits for others, on the mean of a round."""
    num_bytes = plan.parameters * BITS[plan.wire_dtype] / 8
    hidden = plan.step_seconds * BACKWARD_SHARE if plan.overlap == "backward" else 0.0
    if plan.method == "sync":
        return max(sync_seconds(plan, num_bytes) - hidden, 0.0)
    inner = 0.0
    if plan.within == "step":
        # Gradients, in the dtype that synchronous training sends; the round adds the ring of groups alone.
        inner = max(inner_seconds(plan, plan.parameters * BITS[plan.baseline_dtype] / 8) - hidden, 0.0)
    fragments = plan.fragments if plan.method == "streaming" else 1
    # What is still under way when the next messages are due holds them up: its budget ends there.
    steps = min(_overlap_steps(plan), plan.interval / fragments)
    late = max(_round_seconds(plan, num_bytes / fragments) - steps * plan.step_seconds, 0.0)
    return inner + late * fragments / plan.interval


def _overlap_steps(plan: Plan) -> int:
    return int(plan.method == "streaming") if plan.overlap_steps is None else plan.overlap_steps


def _round_seconds(plan: Plan, num_bytes: float) -> float:
    seconds = sync_seconds(plan, num_bytes)
    return seconds - inner_seconds(plan, num_bytes) if plan.within == "step" else seconds


def check(plan: Plan) -> None:
    """Raise UsageError, by the name of the flag, for a value that is out of its range or has no use."""
    for flag, value, least in (
        ("parameters", plan.parameters, 1),
        ("workers", plan.workers, 1),
        ("interval", plan.interval, 1),
        ("group-size", plan.group_size, 1),
        ("fragments", plan.fragments, 1),
        ("overlap-steps", _overlap_steps(plan), 0),
    ):
        if not least <= value <= 1e30:
            raise UsageError(f"--{flag} must be at least {least} and at most 1e30, got {value}")
    _check_positive("step-seconds", plan.step_seconds)
    _check_link("", plan.link)
    if plan.workers % plan.group_size:
        raise UsageError(f"--workers must be a multiple of --group-size {plan.group_size}, got {plan.workers}")
    if plan.inner_link is not None:
        _check_link("inner-", plan.inner_link)
    if plan.group_size > 1 and plan.inner_link is None:
        raise UsageError(f"--group-size {plan.group_size} needs --inner-gbps, the rate of the link within a group")
    if plan.group_size == 1 and plan.inner_link is not None:
        raise UsageError("--inner-gbps has no use without a --group-size above 1")
    if plan.group_size == 1 and plan.within == "step":
        raise UsageError("--within step has no use without a --group-size above 1")
    if plan.method == "sync" and plan.wire_dtype != plan.baseline_dtype:
        raise UsageError(
            f"--method sync sends gradients: --baseline-dtype must be --wire-dtype {plan.wire_dtype}, "
            f"got {plan.baseline_dtype}"
        )
    if plan.method == "streaming" and plan.fragments > plan.interval:
        raise UsageError(f"--fragments must be at most --interval {plan.interval}, got {plan.fragments}")


def _check_link(prefix: str, link: Link) -> None:
    _check_positive(f"{prefix}gbps", link.gigabits_per_second)
    if not 0 <= link.latency_seconds < float("inf"):
        raise UsageError(f"--{prefix}latency-ms must be at least 0 and finite, got {link.latency_seconds * 1e3:g}")
    if not _LEAST <= link.payload_share <= 1:
        raise UsageError(f"--payload-share must be from {_LEAST} to 1, got {link.payload_share}")


def _check_positive(flag: str, value: float) -> None:
    if not _LEAST <= value < float("inf"):
        raise UsageError(f"--{flag} must be at least {_LEAST} and finite, got {value}")
