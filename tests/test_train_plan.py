"""The planner: hand-computed times, a published row, and flags that are refused in one line."""

import ast
import json
import math
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from fastlocal.train.cli import main
from fastlocal.train.errors import UsageError
from fastlocal.train.plan import Link, Plan, estimate, ring_seconds

PLAN = Path(__file__).parent.parent / "fastlocal" / "train" / "plan.py"
GIGABYTE_A_SECOND = Link(8.0, 0.0, payload_share=1.0)


def make(**values):
    given = {"parameters": 250e6, "workers": 4, "step_seconds": 0.5, "link": GIGABYTE_A_SECOND, "interval": 10}
    return Plan(**(given | values))


def test_a_ring_moves_two_times_w_minus_one_over_w_of_the_payload():
    # 2·3/4 · 1 GB at 1 GB/s, and 2·3 messages of 10 ms
    assert ring_seconds(1e9, 4, Link(8.0, 0.01, 1.0)) == pytest.approx(1.5 + 0.06, rel=1e-12)
    assert ring_seconds(1e9, 1, GIGABYTE_A_SECOND) == 0
    # Half of the rate goes to headers.
    assert ring_seconds(1e9, 4, Link(8.0, 0.01, 0.5)) == pytest.approx(3.06, rel=1e-12)


def test_an_interval_shares_one_sync_among_its_steps():
    # 1 GB of float32: a sync takes 1.5 s. Synchronous: 0.5 + 1.5 a step; every ten steps: 0.5 + 0.15.
    result = estimate(make())
    assert result.sync_seconds == pytest.approx(1.5)
    assert result.step_seconds == pytest.approx(0.65)
    assert result.communication_share == pytest.approx(0.15 / 0.65)
    assert result.synchronous_step_seconds == pytest.approx(2.0)
    assert result.speedup == pytest.approx(2.0 / 0.65)
    assert result.outer_bytes_per_step == pytest.approx(1.5e9 / 10)
    assert result.outer_bytes_per_day == pytest.approx(1.5e8 / 0.65 * 86_400)


@pytest.mark.parametrize("method", ["local-sgd", "slowmo", "diloco"])
def test_the_outer_step_costs_no_time_on_the_wire(method):
    assert estimate(make(method=method)) == estimate(make())


def test_synchronous_training_is_as_fast_as_itself():
    result = estimate(make(method="sync", interval=1))
    assert result.speedup == 1
    assert result.outer_bytes_per_step == pytest.approx(1.5e9)
    assert estimate(make(method="sync", interval=10)) == result


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp8", "fp4"])
def test_the_command_gives_synchronous_training_one_cost_whatever_it_sends(dtype, capsys):
    # 250e6 parameters of 8·dtype bits, 2·3/4 of them at 1 GB/s; 0.5 s of computing.
    flags = "plan --parameters 250e6 --workers 4 --gbps 8 --payload-share 1 --step-seconds 0.5 --method sync --json"
    assert main([*flags.split(), "--wire-dtype", dtype]) == 0
    result = json.loads(capsys.readouterr().out)["estimate"]
    bits = {"fp32": 32, "bf16": 16, "fp8": 8, "fp4": 4}[dtype]
    assert result["step_seconds"] == pytest.approx(0.5 + 1.5 * 0.25 * bits / 8)
    assert result["synchronous_step_seconds"] == result["step_seconds"]
    assert result["speedup"] == 1


def test_the_backward_pass_hides_gradients_but_not_the_sync_of_a_round():
    # Two thirds of 0.5 s are backward: of 1.5 s in the ring, 1.1667 are waited for.
    result = estimate(make(overlap="backward"))
    assert result.synchronous_step_seconds == pytest.approx(0.5 + 1.5 - 1 / 3)
    assert result.step_seconds == pytest.approx(0.65)
    fast = estimate(make(method="sync", overlap="backward", link=Link(80.0, 0.0, 1.0)))
    assert fast.communication_share == 0  # 0.15 s lie within the backward pass


def test_a_shared_link_carries_what_all_workers_send():
    # 4 workers send 1.5 GB each through 1 GB/s.
    assert estimate(make(shared_link=True)).sync_seconds == pytest.approx(6.0)


def test_two_levels_use_the_slow_link_for_one_group_instead_of_every_worker():
    # 8 workers, 2 groups of 4. Within: 2·3/4·1 GB at 10 GB/s = 0.15 s. Between 2 groups: 2·1/2·1 GB at 1 GB/s = 1 s.
    two = make(workers=8, group_size=4, inner_link=Link(80.0, 0.0, 1.0))
    assert estimate(two).sync_seconds == pytest.approx(1.15)
    assert estimate(two).outer_bytes_per_step == pytest.approx(1e9 / 10)
    # Gradients within a group in every step (0.15 s), the ring of groups once a round (1 s over 10 steps).
    replicas = make(workers=8, group_size=4, inner_link=Link(80.0, 0.0, 1.0), within="step")
    assert estimate(replicas).step_seconds == pytest.approx(0.5 + 0.15 + 0.1)
    assert estimate(replicas).synchronous_step_seconds == pytest.approx(0.5 + 1.15)


def test_streaming_waits_only_for_what_a_fragment_needs_beyond_its_steps():
    # 5 fragments of 0.3 s each; one step of 0.5 s hides them all. With steps of 0.1 s, 0.2 s remain: 5·0.2/10.
    assert estimate(make(method="streaming", fragments=5)).communication_share == 0
    late = estimate(make(method="streaming", fragments=5, step_seconds=0.1))
    assert late.step_seconds == pytest.approx(0.1 + 0.1)
    # A fragment is due every 2 steps: a third step of overlap would be the next one's.
    most = estimate(make(method="streaming", fragments=5, step_seconds=0.1, overlap_steps=3))
    assert most.step_seconds == pytest.approx(0.1 + 5 * 0.1 / 10)
    # 4 of 0.375 s are due every 2.5 steps; each one of 5 sends its own 2·3 messages of 10 ms.
    odd = estimate(make(method="streaming", fragments=4, step_seconds=0.1, overlap_steps=3))
    assert odd.step_seconds == pytest.approx(0.1 + 4 * (0.375 - 0.25) / 10)
    delayed = make(method="streaming", fragments=5, step_seconds=0.1, link=Link(8.0, 0.01, 1.0))
    assert estimate(delayed).step_seconds == pytest.approx(0.1 + 5 * (0.3 + 0.06 - 0.1) / 10)


# Douillard et al., Streaming DiLoCo (arXiv:2501.18512), table 1: 10^9 parameters, 2 replicas, 1 Gb/s, interval 100;
# table 4: 0.1 s a step, 24 layers, so 8 fragments of three; bfloat16 gradients, FP4 outer gradients.
def test_a_sync_that_overlaps_waits_only_for_what_its_steps_do_not_cover():
    whole = estimate(make(method="slowmo"))
    assert whole.communication_share > 0
    assert estimate(make(method="slowmo", overlap_steps=0)) == whole
    step, sync = make().step_seconds, whole.sync_seconds
    late = estimate(make(method="slowmo", step_seconds=sync / 4, overlap_steps=3))
    assert late.step_seconds == pytest.approx(sync / 4 + sync / 4 / make().interval)
    assert late.sync_seconds == sync
    for steps in (4, 100):  # a sync that lasts as long as its steps; no more of them than the round has
        assert estimate(make(method="slowmo", step_seconds=sync / 4, overlap_steps=steps)).communication_share == 0
    short = estimate(make(method="slowmo", interval=2, step_seconds=sync / 4, overlap_steps=100))
    assert short.step_seconds == pytest.approx(sync / 2)
    assert estimate(make(overlap_steps=1)).step_seconds == pytest.approx(step + max(sync - step, 0) / make().interval)


# tokens: (hours without communication, data-parallel hours, streaming hours, data-parallel TB, streaming TB)
PUBLISHED = {
    25: (0.67, 109, 0.88, 441, 1.10),
    100: (2.7, 438, 3.5, 1767, 4.42),
    250: (6.75, 1097, 8.75, 4418, 11.05),
}
STEPS_PER_GIGATOKEN = 972  # 6.75 h of 0.1 s for 250·10^9 tokens, the most exact figure of the first column


def published_setting(**values):
    given = {"parameters": 1e9, "workers": 2, "step_seconds": 0.1, "link": Link(1.0, 0.0, 1.0), "interval": 100}
    return Plan(**(given | {"wire_dtype": "fp4", "baseline_dtype": "bf16", "method": "streaming"} | values))


@pytest.mark.parametrize("gigatokens", PUBLISHED)
def test_the_published_hours_of_streaming_diloco_are_within_two_percent(gigatokens):
    compute, parallel, streaming, _, _ = PUBLISHED[gigatokens]
    hours = gigatokens * STEPS_PER_GIGATOKEN / 3600
    assert hours * 0.1 == pytest.approx(compute, rel=0.01)
    result = estimate(published_setting())
    # 16 Gb and 0.1 s a step: 108.7, 434.7 and 1086.8 h. The first is the published 109 to its rounding; the others
    # are 0.8 and 0.9 % below theirs. The published column is not proportional to its steps (109·10 < 1097), though
    # both columns beside it are, so no one time a step gives all three to their rounding: 16.07 to 16.22 s for 25,
    # 16.24 to 16.26 s for 250. Ours is 16.1.
    assert hours * result.synchronous_step_seconds == pytest.approx(parallel, rel=0.01)
    if gigatokens == 25:
        assert round(hours * result.synchronous_step_seconds) == parallel
    # A fragment is 0.5 Gb: 0.5 s on the link, 0.1 s of it behind one step; 8 of 0.4 s in 100 steps are 0.032 s a
    # step: 0.891, 3.564 and 8.910 h, 1.3 to 1.8 % above. The published hours are 0.1296 s a step, 0.0296 s of them
    # waiting: their layer-by-layer simulation hides 0.13 s of a fragment where ours hides a step of 0.1 s.
    assert hours * result.step_seconds == pytest.approx(streaming, rel=0.02)
    assert hours * result.step_seconds > streaming


@pytest.mark.parametrize("gigatokens", PUBLISHED)
def test_the_published_traffic_is_400_times_less_and_in_another_unit(gigatokens):
    _, hours, _, parallel, streaming = PUBLISHED[gigatokens]
    result = estimate(published_setting())
    synchronous = estimate(published_setting().synchronous())
    assert synchronous.outer_bytes_per_step / result.outer_bytes_per_step == pytest.approx(400, rel=1e-12)
    assert parallel / streaming == pytest.approx(400, rel=0.003)
    # The published terabytes are 9.1 times ours, as if they were terabits of 1.136·10^9 parameters. As bytes they
    # could not have crossed the link: 441 TB take 980 h at 1 Gb/s, nine times the 109 h beside them.
    ours = synchronous.outer_bytes_per_step * gigatokens * STEPS_PER_GIGATOKEN / 1e12
    assert parallel / ours == pytest.approx(8 * 1.136, rel=0.002)
    assert parallel * 8e12 / 1e9 / 3600 > 8.9 * hours


def test_the_model_imports_no_torch_and_no_third_party():
    tree = ast.walk(ast.parse(PLAN.read_text()))
    imports = [node for node in tree if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert {getattr(node, "module", None) for node in imports} == {
        "dataclasses",
        "math",
        "typing",
        "fastlocal.train.errors",
    }


def test_the_command_prints_json_that_holds_the_estimate(capsys):
    flags = "plan --parameters 250e6 --workers 4 --gbps 8 --payload-share 1 --step-flops 2e12 --device-flops 1e13"
    assert main([*flags.split(), "--utilisation", "0.4", "--interval", "10", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["estimate"]["step_seconds"] == pytest.approx(0.65)
    by_interval = {row["interval"]: row["step_seconds"] for row in document["over_interval"]}
    assert by_interval[1] == pytest.approx(2.0)
    assert by_interval[4] == pytest.approx(0.5 + 1.5 / 4)
    by_workers = {row["workers"]: row["sync_seconds"] for row in document["over_workers"]}
    assert by_workers[10_000] == pytest.approx(2 * 9999 / 10_000)
    assert min(by_workers) == 8


def test_the_command_shows_a_table_and_writes_a_plot(tmp_path, capsys):
    path = tmp_path / "plan.png"
    flags = "plan --parameters 250e6 --workers 4 --gbps 8 --payload-share 1 --step-seconds 0.5 --interval 10"
    assert main([*flags.split(), "--plot", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "0.65" in shown
    assert "3.08" in shown  # 2 s over 0.65 s
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "labels"),
    [
        ([], ["interval (8 workers)", "workers (interval 16)"]),
        (["--method", "sync"], ["workers"]),
        # No interval of the panel holds so many fragments.
        (["--method", "streaming", "--fragments", "2000", "--interval", "4000"], ["workers (interval 4000)"]),
    ],
)
def test_the_plot_has_no_empty_panel_and_synchronous_training_has_no_interval(
    tmp_path, capsys, monkeypatch, flags, labels
):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    words = [word for pair in GOOD.items() for word in pair]
    assert main(["plan", *words, *flags, "--plot", str(tmp_path / "plan.png"), "--json"]) == 0
    (figure,) = drawn
    assert [axes.get_xlabel() for axes in figure.axes] == labels
    assert figure.axes[0].get_ylabel() == "seconds a step"
    assert all(len(line.get_xdata()) for axes in figure.axes for line in axes.lines)
    assert ("dashed" in figure.get_suptitle()) == ("sync" not in flags)
    interval = json.loads(capsys.readouterr().out)["plan"]["interval"]
    assert interval == (1 if "sync" in flags else int(labels[-1].strip(")").split()[-1]))


GOOD = {"--parameters": "1e9", "--workers": "8", "--step-seconds": "0.1"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gbps", "0"], "--gbps must be at least 1e-30 and finite, got 0.0"),
        (["--gbps", "nan"], "--gbps must be at least 1e-30 and finite, got nan"),
        (["--latency-ms", "-1"], "--latency-ms must be at least 0 and finite, got -1"),
        (["--payload-share", "1.5"], "--payload-share must be from 1e-30 to 1, got 1.5"),
        (["--interval", "0"], "--interval must be at least 1 and at most 1e30, got 0"),
        (["--workers", "0"], "--workers must be at least 1 and at most 1e30, got 0"),
        (["--parameters", "inf"], "--parameters must be at least 1 and at most 1e30, got inf"),
        (["--step-seconds", "-0.1"], "--step-seconds must be at least 1e-30 and finite, got -0.1"),
        (["--group-size", "3"], "--workers must be a multiple of --group-size 3, got 8"),
        (["--group-size", "4"], "--group-size 4 needs --inner-gbps"),
        (["--inner-gbps", "4"], "--inner-gbps has no use without a --group-size above 1"),
        (["--within", "step"], "--within step has no use without a --group-size above 1"),
        (["--group-size", "4", "--inner-gbps", "0"], "--inner-gbps must be at least 1e-30 and finite, got 0.0"),
        (["--method", "streaming", "--fragments", "99"], "--fragments must be at most --interval 16, got 99"),
        (
            ["--method", "sync", "--baseline-dtype", "bf16"],
            "--method sync sends gradients: --baseline-dtype must be --wire-dtype fp32, got bf16",
        ),
        (["--step-flops", "1e12"], "--step-seconds has no use together with --step-flops, --device-flops or"),
        (["--utilisation", "-1"], "--step-seconds has no use together with --step-flops, --device-flops or"),
        (["--method", "sync", "--interval", "7"], "--interval has no use without a --method that syncs once an"),
        (["--method", "sync", "--within", "step"], "--within has no use without a --method that syncs once an"),
        (["--fragments", "4"], "--fragments has no use without --method streaming"),
        (
            ["--method", "sync", "--overlap-steps", "2"],
            "--overlap-steps has no use without a --method that syncs once an interval",
        ),
        (["--inner-latency-ms", "-1"], "--inner-latency-ms has no use without --inner-gbps"),
        (["--wire-dtype", "fp5"], "fp5"),
        (["--plot", "/dev/null/plan.png"], "--plot /dev/null/plan.png cannot be written"),
    ],
)
def test_a_bad_value_ends_in_one_line_that_names_it(flags, message, capsys):
    given = GOOD | dict(zip(flags[::2], flags[1::2], strict=True))
    assert main(["plan", *(word for pair in given.items() for word in pair)]) == 2
    told = capsys.readouterr().err.strip()
    assert message in told
    assert "\n" not in told


@pytest.mark.parametrize(
    "flags",
    [
        "--parameters 3.5e8 --workers 8 --step-seconds 0.3 --overlap backward --gbps 200 --latency-ms 0.02",
        "--parameters 3.5e8 --workers 8 --step-seconds 0.3 --gbps 0.001 --method streaming --interval 1000",
    ],
)
def test_the_table_fits_a_narrow_terminal_whole(flags, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["plan", *flags.split()]) == 0
    shown = capsys.readouterr().out
    assert "…" not in shown
    assert "in messages" in shown


def test_digits_are_never_cut_on_a_narrow_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    assert main(["plan", "--parameters", "1e9", "--step-seconds", "0.1"]) == 0
    shown = capsys.readouterr().out
    assert "…" not in shown
    assert "local-sgd, interval 16           3.818       97.4 %" in shown


def test_what_a_float_does_not_hold_is_refused(capsys):
    flags = ["--parameters", "1e30", "--workers", "8", "--step-seconds", "1", "--latency-ms", "1e308", "--json"]
    assert main(["plan", *flags]) == 2
    assert "the estimate is beyond what a float holds" in capsys.readouterr().err


def test_a_flag_that_is_missing_is_not_said_to_lack_its_value(capsys):
    assert main(["plan"]) == 2
    assert capsys.readouterr().err == "error: --parameters is missing: see fastlocal plan --help\n"
    assert main(["plan", "--parameters"]) == 2
    assert "--parameters requires an argument" in capsys.readouterr().err
    assert main(["study"]) == 2
    assert capsys.readouterr().err == "error: FILE is missing: see fastlocal study --help\n"


def test_the_seconds_of_a_step_must_be_given(capsys):
    assert main(["plan", "--parameters", "1e9"]) == 2
    operations = ["plan", "--parameters", "1e9", "--step-flops", "2e12", "--device-flops", "1e13"]
    assert main([*operations, "--utilisation", "1.5"]) == 2
    assert "--utilisation must be in (0, 1], got 1.5" in capsys.readouterr().err
    huge = ["plan", "--parameters", "1e9", "--step-flops", "1e300", "--device-flops", "1e-300"]
    assert main(huge) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "--step-flops 1e+300 and --device-flops 1e-300 come to inf s a step: it must be at least 1e-30" in said
    with pytest.raises(UsageError, match="--step-seconds must be at least 1e-30 and finite, got nan"):
        estimate(make(step_seconds=math.nan))


def test_what_groups_add_to_a_sync_and_to_a_step_is_by_hand():
    two = {"workers": 8, "group_size": 4, "inner_link": Link(80.0, 0.0, 1.0)}
    assert estimate(make(**two, shared_link=True)).sync_seconds == pytest.approx(0.15 + 2 * 1.0)
    replicas = make(**two, within="step", method="streaming", fragments=5, step_seconds=0.1)
    assert estimate(replicas).step_seconds == pytest.approx(0.1 + 0.15 + 5 * (0.2 - 0.1) / 10)
    hidden = make(**two, within="step", overlap="backward", step_seconds=0.15, wire_dtype="bf16")
    assert estimate(hidden).step_seconds == pytest.approx(0.15 + (0.15 - 0.1) + 0.5 / 10)


def test_fragments_without_a_rest_no_delay_and_an_empty_payload_are_ends_of_their_ranges():
    assert estimate(make(method="streaming", fragments=10)).communication_share == 0
    late = make(method="streaming", fragments=5, overlap_steps=0, step_seconds=0.1)
    assert estimate(late).step_seconds == pytest.approx(0.1 + 5 * 0.3 / 10)
    with pytest.raises(UsageError, match=r"--payload-share must be from 1e-30 to 1, got 0.0"):
        estimate(make(link=Link(8.0, 0.0, 0.0)))
