"""What `fastlocal plan` is asked and what it shows: flags, table, JSON and plot. The formulas are in `plan`."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from fastlocal.train.errors import UsageError
from fastlocal.train.plan import (
    TCP_SHARE,
    Estimate,
    Link,
    Overlap,
    Plan,
    PlanMethod,
    WireDtype,
    Within,
    estimate,
)
from fastlocal.train.tables import print_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INTERVALS = (1, 4, 16, 64, 256, 1024)
WORKERS = (8, 32, 100, 320, 1000, 3200, 10_000)
RATES = (0.1, 1.0, 10.0, 100.0, 400.0)
"""Gb/s of the links that are compared."""


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """A question to the planner."""

    parameters: float
    """Parameters of the model, such as 1e9."""

    workers: int = 8
    """Workers, W."""

    gbps: float = 1.0
    """Rate of a worker's (or a group's) link to the others, in Gb/s, each way."""

    latency_ms: float = 0.0
    """Latency from one worker to the next, in milliseconds."""

    shared_link: bool = False
    """All workers (or groups) send through one such link together."""

    payload_share: float = TCP_SHARE
    """Share of the rate that is left to payload. Default: that of TCP over Ethernet."""

    step_seconds: float | None = None
    """Computing of a local step; or give --step-flops and --device-flops."""

    step_flops: float | None = None
    """Floating-point operations of a worker's local step."""

    device_flops: float | None = None
    """Peak operations a second of a worker."""

    utilisation: float | None = None
    """Share of the peak that training reaches. Default: 0.4."""

    method: PlanMethod = "local-sgd"
    """streaming: DiLoCo that sends a fragment at a time while the workers go on."""

    interval: int = 16
    """Local steps between two syncs."""

    wire_dtype: WireDtype = "fp32"
    """dtype of what --method sends."""

    baseline_dtype: WireDtype | None = None
    """dtype of gradients, in the synchronous training compared with and within groups. Default: --wire-dtype, but
    bf16 at least; with --method sync --wire-dtype itself."""

    overlap: Overlap = "none"
    """What overlaps with messages; backward: gradients are averaged while the backward pass goes on."""

    group_size: int = 1
    """Workers of a group that has a link of its own; 1 is a flat ring."""

    inner_gbps: float | None = None
    """Rate of the link within a group, in Gb/s of payload."""

    inner_latency_ms: float | None = None
    """Latency within a group, in milliseconds. Default: 0."""

    within: Within = "round"
    """When the workers of a group meet. step: they average gradients in every step, and only groups step alone."""

    fragments: int = 8
    """Parts into which streaming cuts the model, each sent at another time."""

    overlap_steps: int | None = None
    """Local steps that what is sent may take to arrive before anybody waits. Default: 1 for streaming, else 0."""

    json: bool = False
    """Print JSON instead of a table."""

    plot: Path | None = None
    """Write a PNG here: seconds a step over the interval and over the workers."""

    def resolve(self) -> Plan:
        """The plan asked for.

        Raises:
            UsageError: the seconds of a step are given twice or not at all, or a value is out of its range or has
                no use.
        """
        for name, needs, holds in (
            ("interval", "a --method that syncs once an interval", self.method != "sync"),
            ("within", "a --method that syncs once an interval", self.method != "sync"),
            ("fragments", "--method streaming", self.method == "streaming"),
            ("overlap_steps", "a --method that syncs once an interval", self.method != "sync"),
        ):
            # What cannot be told from a default is accepted.
            if getattr(self, name) != getattr(PlanConfig, name) and not holds:
                raise UsageError(f"--{name.replace('_', '-')} has no use without {needs}")
        return Plan(
            parameters=self.parameters,
            workers=self.workers,
            step_seconds=self._step_seconds(),
            link=Link(self.gbps, self.latency_ms / 1e3, self.payload_share),
            method=self.method,
            interval=1 if self.method == "sync" else self.interval,
            wire_dtype=self.wire_dtype,
            baseline_dtype=self.baseline_dtype or self._gradients_dtype(),
            overlap=self.overlap,
            shared_link=self.shared_link,
            group_size=self.group_size,
            inner_link=self._inner_link(),
            within=self.within,
            fragments=self.fragments,
            overlap_steps=self.overlap_steps,
        )

    def _inner_link(self) -> Link | None:
        if self.inner_gbps is None:
            if self.inner_latency_ms is not None:
                raise UsageError("--inner-latency-ms has no use without --inner-gbps")
            return None
        return Link(self.inner_gbps, (self.inner_latency_ms or 0.0) / 1e3, payload_share=1.0)

    def _gradients_dtype(self) -> WireDtype:
        return "bf16" if self.method != "sync" and self.wire_dtype in ("fp8", "fp4") else self.wire_dtype

    def _step_seconds(self) -> float:
        if self.step_seconds is not None:
            if (self.step_flops, self.device_flops, self.utilisation) != (None, None, None):
                raise UsageError(
                    "--step-seconds has no use together with --step-flops, --device-flops or --utilisation"
                )
            return self.step_seconds
        if self.step_flops is None or self.device_flops is None:
            raise UsageError("--step-seconds is missing; or give both --step-flops and --device-flops")
        for flag, value in (("step-flops", self.step_flops), ("device-flops", self.device_flops)):
            if not 0 < value < float("inf"):
                raise UsageError(f"--{flag} must be positive and finite, got {value}")
        utilisation = 0.4 if self.utilisation is None else self.utilisation
        if not 0 < utilisation <= 1:
            raise UsageError(f"--utilisation must be in (0, 1], got {utilisation}")
        seconds = self.step_flops / utilisation / self.device_flops
        if not 1e-30 <= seconds < float("inf"):
            raise UsageError(
                f"--step-flops {self.step_flops} and --device-flops {self.device_flops} come to {seconds} s a step: "
                "it must be at least 1e-30 and finite"
            )
        return seconds


def answer(config: PlanConfig, console: Console) -> None:
    """Show what was asked for, as a table or as JSON, and write the plot if there is to be one.

    Raises:
        UsageError: a value is out of its range, or the plot cannot be written.
    """
    plan = config.resolve()
    estimated = estimate(plan)
    by_interval, by_workers = over_intervals(plan), over_workers(plan)
    if config.plot is not None:
        plot(plan, config.plot)
    if config.json:
        document = {
            "plan": asdict(plan),
            "estimate": asdict(estimated),
            "over_interval": [{"interval": p.interval, **asdict(e)} for p, e in by_interval],
            "over_workers": [{"workers": p.workers, **asdict(e)} for p, e in by_workers],
        }
        console.print_json(data=document)
        return
    sender = "worker" if plan.group_size == 1 else "group"
    title = (
        f"{plan.parameters:.3g} parameters, {plan.workers:,} workers, {plan.link.gigabits_per_second:g} Gb/s "
        f"a {'shared link' if plan.shared_link else sender}, {plan.link.latency_seconds * 1e3:g} ms, "
        f"{plan.step_seconds:.3g} s a local step"
    )
    console.print(title, highlight=False)
    own = [] if plan.method == "sync" else [(f"{plan.method}, interval {plan.interval}", estimated)]
    rows = [("sync", estimate(plan.synchronous())), *own]
    print_whole(console, table("method", rows, sender))
    rows = [(f"{p.interval}", e) for p, e in by_interval]
    if rows:
        print_whole(console, table(f"{plan.method}: interval", rows, sender))
    print_whole(console, table(f"{plan.method}, workers", [(f"{p.workers:,}", e) for p, e in by_workers], sender))


def over_intervals(plan: Plan) -> list[tuple[Plan, Estimate]]:
    """The plan with other intervals; none for synchronous training, nor shorter ones than the fragments need."""
    if plan.method == "sync":
        return []
    least = plan.fragments if plan.method == "streaming" else 1
    plans = [replace(plan, interval=interval) for interval in INTERVALS if interval >= least]
    return [(other, estimate(other)) for other in plans]


def over_workers(plan: Plan) -> list[tuple[Plan, Estimate]]:
    """The plan with 8 to 10,000 workers, rounded to whole groups."""
    counts = sorted({max(1, round(count / plan.group_size)) * plan.group_size for count in WORKERS})
    plans = [replace(plan, workers=count) for count in counts]
    return [(other, estimate(other)) for other in plans]


def table(first: str, rows: list[tuple[str, Estimate]], sender: str) -> Table:
    """Estimates side by side, each under its name."""
    shown = Table(box=None, pad_edge=False)
    columns = ("seconds a step", "in messages", f"sent a {sender} a day", "speed-up over sync")
    shown.add_column(first, no_wrap=True)
    for name in columns:
        shown.add_column(name, justify="right")
    for name, row in rows:
        shown.add_row(
            name,
            f"{row.step_seconds:.4g}",
            f"{100 * row.communication_share:.1f} %",
            _bytes(row.outer_bytes_per_day),
            f"{row.speedup:.2f}",
        )
    return shown


def plot(plan: Plan, path: Path) -> None:
    """Seconds a step over the interval and over the workers, a line a rate; dashed: synchronous.

    Raises:
        UsageError: the file cannot be written.
    """
    from fastlocal.train.figures import plain_style

    with plain_style():
        try:
            _drawn(plan).savefig(path, format="png", dpi=110)
        except OSError as error:
            raise UsageError(f"--plot {path} cannot be written: {error.strerror}") from None


def _drawn(plan: Plan) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    by_interval = bool(over_intervals(plan))
    figure = Figure(figsize=(11 if by_interval else 6, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    *lefts, right = figure.subplots(1, 1 + by_interval, sharey=True, squeeze=False)[0]
    for index, rate in enumerate(RATES):
        other = replace(plan, link=replace(plan.link, gigabits_per_second=rate))
        colour, label = f"C{index}", f"{rate:g} Gb/s"
        steps = over_intervals(other)
        for left in lefts:
            left.plot([p.interval for p, _ in steps], [e.step_seconds for _, e in steps], ".-", c=colour, label=label)
            left.axhline(estimate(other).synchronous_step_seconds, c=colour, ls="--", lw=0.8)
        crowd = over_workers(other)
        counts = [p.workers for p, _ in crowd]
        right.plot(counts, [e.step_seconds for _, e in crowd], ".-", c=colour, label=label)
        if plan.method != "sync":
            right.plot(counts, [e.synchronous_step_seconds for _, e in crowd], "--", c=colour, lw=0.8)
    for left in lefts:
        left.set(xlabel=f"interval ({plan.workers:,} workers)")
    right.set(xlabel="workers" if plan.method == "sync" else f"workers (interval {plan.interval})")
    panels = (*lefts, right)
    panels[0].set(ylabel="seconds a step")
    for axes in panels:
        axes.set(xscale="log", yscale="log")
        axes.grid(alpha=0.3)
    right.legend()
    beside = "" if plan.method == "sync" else "; dashed: synchronous"
    figure.suptitle(f"{plan.method}, {plan.parameters:.3g} parameters{beside}")
    return figure


def _bytes(count: float) -> str:
    for unit, size in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count / 1e3:,.1f} kB"
