"""The report: figures by hand, what is missing, and the page as a browser shows it."""

import base64
import dataclasses
import json
import math
import os
import re
import shutil
import struct
import subprocess
from pathlib import Path

import matplotlib
import pytest

from fastlocal.train import cells, curves, kinds, plan_report, plots, report, study_file, tuned
from fastlocal.train.cli import main
from fastlocal.train.collect import collect
from fastlocal.train.errors import UsageError
from fastlocal.train.groups import Group, Run, Spread
from fastlocal.train.plan import Link, Plan
from fastlocal.train.record import Record

ROOT = Path(__file__).parent.parent

TOML = """
title = "Two grids"
seeds = [0, 1, 2]
[base]
dataset = "cifar100"
epochs = 4
[grid]
workers = [2, 4]
interval = [8, 16]
[[cells]]
name = "adaptive"
workers = 2
policy = "val-loss"
[[original]]
where = { workers = 2, interval = 8, policy = "fixed" }
test_accuracy = 50.5
communication_reduction = 0.8
note = "Its best of many."
"""


RE_SPLIT = {"source": "re-split", "sha256": "e1cd"}


def finish(place, accuracy, images=RE_SPLIT, best_val=None):
    """The files that a finished run leaves, with figures chosen here; none about its images as older versions."""
    place.folder.mkdir(parents=True)
    config = place.config.as_dict()
    (place.folder / "config.json").write_text(json.dumps(config))
    records = [
        {"epoch": epoch, "train_loss": 4 / epoch, "val_loss": 4.2 / epoch, "val_accuracy": accuracy * epoch / 4}
        for epoch in range(1, 5)
    ]
    (place.folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    summary = {
        "test_accuracy": accuracy,
        "best_val_accuracy": accuracy + 1 if best_val is None else best_val,
        "communication_reduction": 0.875,
        "bytes_on_wire": 64_000_000 // place.config.interval,
        "train_seconds": 60.0,
        "local_steps": 400,
        "interval_trace": [[0, 16], [200, 32]] if place.config.policy == "val-loss" else [[0, place.config.interval]],
        "config": config,
        "versions": {"torch": "2"},
    }
    if images:
        summary |= {"images": images, "resolved": place.config.resolved()}
    (place.folder / "summary.json").write_text(json.dumps(summary))


def diverge(place):
    """The files that a run leaves which diverged."""
    place.folder.mkdir(parents=True)
    (place.folder / "config.json").write_text(json.dumps(place.config.as_dict()))
    (place.folder / "failed.json").write_text('{"message": "the loss is <nan>"}')


def begun(out, text=TOML, epochs=None):
    """A study's folder, and its cells in it by group and seed."""
    out.mkdir(parents=True)
    path = out / "grids.toml"
    path.write_text(text)
    read = study_file.load(path, epochs=epochs)
    cells.begin(read, out)
    places = cells.places(read, out, data_dir=None, threads=None, device=None, retry=False)
    return {(cell.group, cell.config.seed): place for cell, place in zip(read.cells, places, strict=True)}


def rows(page):
    """The cells of each row of the page's tables, by the first."""
    found = (re.findall(r"<td[^>]*>(.*?)</td>", line) for line in page.split("<tr>"))
    return {row[0]: row[1:] for row in found if row}


@pytest.fixture
def root(tmp_path):
    out = tmp_path / "study"
    places = begun(out)
    accuracies = {"k2-j8": (50.0, 52.0, 54.0), "k2-j16": (49.0,), "k4-j8": (48.0, 48.5), "adaptive": (51.0, 53.0)}
    for (group, seed), place in places.items():
        values = accuracies.get(group, ())
        if seed < len(values):
            finish(place, values[seed])
    diverge(places["k4-j16", 0])
    return out


RATES = """
seeds = [0]
[base]
dataset = "cifar100"
epochs = 4
interval = 16
lr = 0.01
[[cells]]
name = "k2"
workers = 2
lr = [0.01, 0.04]
[[cells]]
name = "k4"
workers = 4
lr = [0.01, 0.04, 0.08]
[[cells]]
name = "k4-other"
workers = 4
interval = 8
"""


@pytest.fixture
def tuned_root(tmp_path):
    """Test and best validation accuracies, which disagree on the best rate of four workers."""
    places = begun(tmp_path / "rates", RATES)
    reached = {"k2-lr0.01": (40, 41), "k2-lr0.04": (38, 39), "k4-lr0.01": (30, 31), "k4-lr0.04": (36, 35)}
    reached |= {"k4-lr0.08": (35, 37), "k4-other": (33, 33)}
    for (group, _), place in places.items():
        finish(place, reached[group][0], best_val=reached[group][1])
    return tmp_path / "rates"


def test_validation_chooses_the_rate_of_each_setting_and_the_test_images_have_no_say(tuned_root):
    groups = collect(tuned_root).groups
    found = {search.name: search for search in tuned.searches(groups)}
    assert list(found) == ["k2", "k4"]
    assert [tuned.rate(group) for group in found["k4"].groups] == [0.01, 0.04, 0.08]
    assert {name: tuned.rate(search.chosen) for name, search in found.items()} == {"k2": 0.01, "k4": 0.08}


def test_the_page_shows_the_fixed_rate_and_the_chosen_one(tuned_root):
    text = report.write(tuned_root).read_text()
    table = text[text.index('<table id="rates">') :]
    assert re.findall(r"<th>([\d.]+)</th>", table[: table.index("</tr>")]) == ["0.01", "0.04", "0.08"]
    assert rows(table)["k2"] == ["<b>40.00</b>", "38.00", ""]
    assert rows(table)["k4"] == ["30.00", "36.00", "<b>35.00</b>"]
    assert '<table id="rates">' not in report._render(collect(tuned_root / "k4-other-s0"), {})


def test_a_rate_at_which_seeds_diverged_is_not_chosen_where_another_is_and_says_how_many_ended(tmp_path):
    text = '[base]\ndataset = "cifar100"\nepochs = 4\n[grid]\nworkers = [2, 4]\nlr = [0.01, 0.04, 0.08]\n'
    places = begun(tmp_path / "rates", "seeds = [0, 1, 2]\n" + text)
    reached = {  # by workers and rate: the accuracy of each seed that ended
        **{"k2-lr0.01": (40, 41, 42), "k2-lr0.04": (38, 38, 38), "k2-lr0.08": (50,)},
        **{"k4-lr0.01": (30, 32), "k4-lr0.04": (33,), "k4-lr0.08": ()},
    }
    for (group, seed), place in places.items():
        if seed < len(reached[group]):
            finish(place, reached[group][seed])
        else:
            diverge(place)
    collection = collect(tmp_path / "rates")
    found = {search.name: tuned.rate(search.chosen) for search in tuned.searches(collection.groups)}
    assert found == {"k2": 0.01, "k4": 0.04}  # of two rates with diverged seeds the better one
    html = report.write(tmp_path / "rates").read_text()
    table = html[html.index('<table id="rates">') :]
    k2 = ["<b>41.00 ± 1.00</b>", "38.00 ± 0.00", "50.00 (1 of 3 seeds)"]
    k4 = ["31.00 ± 1.41 (2 of 3 seeds)", "<b>33.00 (1 of 3 seeds)</b>", ""]
    assert {name: row for name, row in rows(table[: table.index("</table>")]).items() if row} == {"k2": k2, "k4": k4}
    assert "the others diverged: such a rate is chosen only where there is no other." in html


def test_a_seed_that_diverged_in_one_folder_and_ended_in_another_has_ended(tmp_path, tuned_root):
    read = study_file.load(tuned_root / "grids.toml")
    again = cells.places(read, tmp_path / "again", data_dir=None, threads=None, device=None, retry=False)
    for place in again:
        diverge(place)
    assert [group.diverged for group in collect(tmp_path).groups] == [set()] * 6
    assert "the others diverged" not in report.write(tmp_path).read_text()


def test_a_plot_over_workers_has_a_line_at_the_fixed_rate_and_one_at_the_chosen(tuned_root):
    families = plots._by_rate("workers", plots._families("workers", "interval", collect(tuned_root).groups))
    named = {name: [group.name for group in members] for name, members in families.items()}
    assert named == {
        "local-sgd J = 16, rate 0.01": ["k2-lr0.01", "k4-lr0.01"],
        "local-sgd J = 16, rate 0.04": ["k2-lr0.04", "k4-lr0.04"],
        "local-sgd J = 16, rate by validation": ["k2-lr0.01", "k4-lr0.08"],
        "local-sgd J = 8": ["k4-other"],
    }
    assert "accuracy-workers.png" in plots.draw_all(collect(tuned_root).groups)


def test_a_plot_shows_what_makes_a_line_and_synchronous_training_beside_the_workers(tmp_path):
    places = begun(
        tmp_path / "both", RATES + '[[cells]]\nname = "sync"\nmethod = "sync"\nworkers = 1\nbatch_size = 32\n'
    )
    for place in places.values():
        finish(place, 40.0)
    groups = collect(tmp_path / "both").groups
    shown = {x: list(plots._that_vary(x, plots._families(x, lines, groups))) for x, lines in
             (("workers", "interval"), ("interval", "workers"), ("batch_size", "optimizer"))}  # fmt: skip
    assert shown == {"workers": ["local-sgd J = 16", "sync"], "interval": ["local-sgd K = 4"], "batch_size": []}


def test_a_hundred_groups_have_a_colour_and_marker_of_their_own():
    pairs = {tuple(plots._style(index).values()) for index in range(100)}
    assert len(pairs) == 100


def test_a_hundred_curves_have_a_colour_and_dash_pattern_of_their_own():
    pairs = {tuple(plots._line_style(index).values()) for index in range(100)}
    assert len(pairs) == 100


@pytest.mark.parametrize(("labels", "columns"), [(["k2-j4"] * 10, 1), (["k2-j4"] * 11, 2), (["x" * 21] * 11, 1)])
def test_a_long_legend_of_short_names_has_two_columns(labels, columns):
    assert plots._columns(labels) == columns


def test_groups_have_the_mean_and_sample_deviation_of_their_seeds_and_no_cell_is_lost(root):
    collection = collect(root)
    groups = {group.name: group.spread("test_accuracy") for group in collection.groups}
    assert list(groups) == ["k2-j8", "k2-j16", "k4-j8", "adaptive"]
    assert groups["k2-j8"] == Spread(52.0, 2.0)
    assert groups["k2-j16"] == Spread(49.0, None)
    states = {cell.name: cell.state for cell in collection.unfinished}
    assert states["k4-j16-s0"] == "diverged"
    assert states["k4-j16-s1"] == states["k2-j16-s1"] == states["adaptive-s2"] == "missing"
    assert sum(len(group.runs) for group in collection.groups) + len(states) == 15


def test_the_page_holds_figures_plots_and_what_is_missing_and_asks_nothing_of_the_network(root, capsys):
    assert main(["report", str(root)]) == 0
    assert str(root / "report" / "index.html") in capsys.readouterr().out.replace("\n", "")
    page = (root / "report" / "index.html").read_text()
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    assert not re.search(r"https?://|<script|<link|url\(", page)
    figures = rows(page[: page.index("<h2>Plots")])
    # test, original, difference, epochs, seeds, best validation, saved, the original's, bytes, time
    assert figures["k2-j8"] == [
        *("52.00 ± 2.00", "50.50<sup>1</sup>", "+1.50", "4", "3", "53.00 ± 2.00"),
        *("87.5", "80.0", "8.0 MB", "60 s"),
    ]
    assert [figures["k2-j16"][index] for index in (0, 1, 3, 4)] == ["49.00", "", "4", "1"]
    assert "<sup>1</sup> Its best of many." in page
    assert "CIFAR-100, re-split. 8 finished runs" in page
    assert "the loss is &lt;nan&gt;" in page
    images = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    files = sorted(path.name for path in (root / "report").glob("*.png"))
    assert files == [
        *("accuracy-bytes.png", "accuracy-interval.png", "accuracy-workers.png", "accuracy.png"),
        *("interval.png", "train-loss.png", "val-loss.png"),
    ]
    assert {base64.b64decode(image) for image in images} == {(root / "report" / name).read_bytes() for name in files}


def test_bytes_that_differ_between_the_seeds_are_shown_with_their_deviation(root, axes_of):
    sent = {0: (6_000_000, 0.85), 1: (8_000_000, 0.75)}  # the two finished seeds of the adaptive cell
    for seed, (num_bytes, saved) in sent.items():
        path = root / f"adaptive-s{seed}" / "summary.json"
        changed = {"bytes_on_wire": num_bytes, "communication_reduction": saved, "train_seconds": 60.0 + 20 * seed}
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    text = report.write(root).read_text()
    figures = rows(text[: text.index("<h2>Plots")])
    # Of two numbers the sample deviation is their distance over √2: 2 MB, 10 points.
    assert figures["adaptive"][-4:] == ["80.0 ± 7.1", "", "7.0 ± 1.4 MB", "70 s"]
    assert figures["k2-j8"][-4:] == ["87.5", "80.0", "8.0 MB", "60 s"]
    assert "bytes without one where all seeds sent the same; the training time is the mean." in text
    groups = [group for group in collect(root).groups if group.name in ("adaptive", "k2-j8")]
    axes = axes_of(plots._pareto, groups)
    horizontal = [container[2][0].get_segments()[0][:, 0].tolist() for container in axes.containers]
    assert horizontal == [[8.0, 8.0], [pytest.approx(7 - 2**0.5), pytest.approx(7 + 2**0.5)]]
    assert axes.get_xlim()[1] == pytest.approx(1.3 * (7 + 2**0.5))


def test_the_originals_figures_stay_beside_a_run_that_another_study_has_too(tmp_path):
    for name, original in (("a", ""), ("b", "[[original]]\ntest_accuracy = 49.0\n")):
        text = "[base]\ndataset = 'cifar100'\nepochs = 4\n[[cells]]\nname = 'x'\nworkers = 2\n" + original
        for place in begun(tmp_path / name, text).values():
            finish(place, 50.0)
    (group,) = collect(tmp_path).groups
    assert group.original == {"test_accuracy": 49.0}


def test_a_default_and_the_same_value_spelled_out_are_one_setting_beside_the_originals_figures(tmp_path):
    text = "seeds = [{}]\n[base]\ndataset = 'cifar100'\nepochs = 4\n[[cells]]\nname = '{}'\nworkers = 2\n{}\n"
    original = "[[original]]\ntest_accuracy = 49.0\n"
    for name, seed, rest in (("default", 0, original), ("given", 1, "lr = 0.02")):  # 0.01 a worker
        for place in begun(tmp_path / name, text.format(seed, name, rest)).values():
            finish(place, 50.0 + 2 * seed)
    (group,) = collect(tmp_path).groups
    assert group.spread("test_accuracy") == Spread(51.0, 2**0.5)
    assert group.original == {"test_accuracy": 49.0}


@pytest.mark.parametrize("name", ["a$\\frac$b", "_pilot", os.fsdecode(b"run-\xff")])
def test_folders_may_have_any_name(tmp_path, name):
    text = "[base]\ndataset = 'cifar100'\nepochs = 4\n[[cells]]\nworkers = 2\n"
    (place,) = begun(tmp_path / "study", text).values()
    finish(place, 50.0)
    place.folder.rename(tmp_path / name)
    shutil.rmtree(tmp_path / "study")
    assert "50.00" in report.write(tmp_path).read_text()


@pytest.mark.parametrize(
    ("images", "label"),
    [
        ({"source": "official", "sha256": "1"}, "CIFAR-100, official split"),
        ({"source": "other", "sha256": "2"}, "CIFAR-100, not the official files"),
        (None, "CIFAR-100, split not recorded"),
    ],
)
def test_the_page_says_which_split_was_recorded_and_which_values_were_used(tmp_path, images, label):
    finish(begun(tmp_path / "study")["k2-j8", 0], 50.0, images)
    assert main(["report", str(tmp_path / "study")]) == 0
    page = (tmp_path / "study" / "report" / "index.html").read_text()
    assert f"<p>{label}. 1 finished run" in page
    told = re.search("All runs: (.*?)</p>", page).group(1)
    if images:
        assert "lr 0.02," in told
        assert "weight_decay 0.001," in told
    else:
        assert "lr default (its value was not recorded)," in told
        assert "weight_decay default (its value was not recorded)," in told
    assert "synthetic_images" not in told
    assert "min_interval" not in told


def test_seeds_on_other_images_are_not_averaged(tmp_path):
    places = begun(tmp_path / "study")
    finish(places["k2-j8", 0], 50.0)
    finish(places["k2-j8", 1], 60.0, {"source": "official", "sha256": "1"})
    groups = {group.name: group.spread("test_accuracy") for group in collect(tmp_path / "study").groups}
    assert groups == {
        "k2-j8, CIFAR-100, re-split": Spread(50.0, None),
        "k2-j8, CIFAR-100, official split": Spread(60.0, None),
    }


def test_a_run_older_than_a_setting_had_its_default(tmp_path):
    places = begun(tmp_path / "study")
    for seed, accuracy in ((0, 50.0), (1, 54.0)):
        finish(places["k2-j8", seed], accuracy)
    for name in ("config.json", "summary.json"):
        path = places["k2-j8", 1].folder / name
        saved = json.loads(path.read_text())
        del (saved if name == "config.json" else saved["config"])["wire_dtype"]
        path.write_text(json.dumps(saved))
    (group,) = collect(tmp_path / "study").groups
    assert (group.name, group.spread("test_accuracy")) == ("k2-j8", Spread(52.0, 8**0.5))


def test_another_budget_is_a_group_of_its_own_and_is_not_compared_with_the_originals_figures(tmp_path):
    for name, epochs, accuracy in (("whole", None, 50.0), ("short", 2, 30.0), ("long", 8, 60.0)):
        finish(begun(tmp_path / "all" / name, epochs=epochs)["k2-j8", 0], accuracy)
    assert main(["report", str(tmp_path / "all")]) == 0
    page = (tmp_path / "all" / "report" / "index.html").read_text()
    figures = rows(page[: page.index("<h2>Plots")])
    assert set(figures) == {"k2-j8, epochs 4", "k2-j8, epochs 2", "k2-j8, epochs 8"}
    assert figures["k2-j8, epochs 4"][:5] == ["50.00", "50.50<sup>1</sup>", "−0.50", "4", "1"]
    assert figures["k2-j8, epochs 2"][:5] == ["30.00", "50.50 at 4 epochs<sup>1</sup>", "", "2", "1"]
    assert figures["k2-j8, epochs 8"][7] == "80.0 at 4 epochs"
    assert "budget: 2, 4, 8 epochs" in page
    assert "<h1>Two grids (8 epochs instead of 4), Two grids (2 epochs instead of 4), Two grids</h1>" in page
    assert "Where a run had another number of epochs than the original's cell, no difference is given." in page


def test_an_older_study_at_a_budget_of_its_own_is_not_compared_either(tmp_path):
    place = begun(tmp_path / "study", epochs=2)["k2-j8", 0]
    finish(place, 30.0)
    path = tmp_path / "study" / "study.json"
    saved = json.loads(path.read_text())
    saved["cells"] = [{k: v for k, v in cell.items() if k not in ("file_epochs", "note")} for cell in saved["cells"]]
    path.write_text(json.dumps(saved))
    assert main(["report", str(tmp_path / "study")]) == 0
    page = (tmp_path / "study" / "report" / "index.html").read_text()
    assert rows(page)["k2-j8"][0] != "30.00"  # the last table: settings
    assert rows(page[: page.index("<h2>Plots")])["k2-j8"][:3] == ["30.00", "50.50 at other epochs", ""]
    assert "<h1>Two grids (2 epochs instead of its own)</h1>" in page


def test_studies_of_one_title_and_precision_are_named_once(tmp_path):
    for name, precision in (("a", None), ("b", None), ("c", "fp32")):
        folder = tmp_path / "all" / name
        finish(begun(folder)["k2-j8", 0], 30.0)
        saved = json.loads((folder / "study.json").read_text())
        (folder / "study.json").write_text(json.dumps(saved | {"precision": precision}))
    assert main(["report", str(tmp_path / "all")]) == 0
    assert "<h1>Two grids, Two grids (fp32)</h1>" in (tmp_path / "all" / "report" / "index.html").read_text()


def test_a_training_time_reads_as_people_say_it():
    assert [report.duration(seconds) for seconds in (59.4, 119.4, 150, 3599, 8790)] == [
        *("59 s", "119 s", "2 min", "1 h 0 min", "2 h 26 min"),
    ]


@pytest.fixture
def axes_of(monkeypatch):
    """The axes of a drawing, which the library would close into a PNG."""

    def drawn(draw, *arguments):
        seen = []
        finish = plots._finish
        with monkeypatch.context() as patch:
            patch.setattr(plots, "_finish", lambda figure, axes: seen.append(axes) or finish(figure, axes))
            assert draw(*arguments).startswith(b"\x89PNG")
        return seen[0]

    return drawn


def shown(ticks, limits):
    return [float(tick) for tick in ticks if limits[0] <= tick <= limits[1]]


def test_a_run_of_one_epoch_is_a_visible_point_at_a_whole_epoch(axes_of):
    def axes(epochs):
        records = [{"epoch": epoch, "val_loss": 4.0} for epoch in range(1, epochs + 1)]
        return axes_of(
            plots._curves, [Group("one", [Run("one", {}, {}, records)])], "loss", plots._column("val_loss")
        )

    (one, many) = (axes(1), axes(40))
    assert one.lines[0].get_marker() == "."
    assert shown(one.get_xticks(), one.get_xlim()) == [1]
    assert many.lines[0].get_marker() == "None"


@pytest.mark.parametrize(
    ("megabytes", "ticks"),
    [
        ([0, 3.2, 5], [0, 1, 2, 3, 4, 5, 6]),
        ([13, 26, 52], [0, 5, 10, 20, 50]),
        ([0, 90, 2607], [0, 10, 100, 1000]),
    ],
)
def test_the_bytes_of_any_study_lie_within_the_axis_and_between_ticks_that_can_be_read(axes_of, megabytes, ticks):
    runs = [Run("run", {}, {"test_accuracy": 40.0, "bytes_on_wire": sent * 1e6}, []) for sent in megabytes]
    axes = axes_of(plots._pareto, [Group(f"{run.summary['bytes_on_wire']}", [run]) for run in runs])
    assert axes.get_xlim()[1] == pytest.approx(1.3 * megabytes[-1])
    assert axes.get_xlim()[0] < 0
    assert shown(axes.get_xticks(), axes.get_xlim()) == ticks


NAMES = [
    "adaptive-k2-val-loss-original-lr0.01-warmup-cosine-momentum-0.9-wd0.001-b64, epochs 150",
    "_" + "0123456789" * 12,
    "SLOWMO-K8-J32-LR0.01-WARMUP-COSINE-MOMENTUM-0.9-WD0.001-B64",
]


@pytest.mark.parametrize("count", [1, 12])
@pytest.mark.parametrize("kind", ["pareto", "curves"])
def test_long_names_are_whole_in_the_legend_beside_their_handles_and_below_the_axes(axes_of, kind, count):
    summary = {"test_accuracy": 40.0, "bytes_on_wire": 1e6}
    runs = [Run(f"{name}{number}", {}, summary, [{"epoch": 1, "val_loss": 4.0}])
            for number in range(count) for name in NAMES]  # fmt: skip
    groups = [Group(run.name, [run]) for run in runs]
    arguments = (groups,) if kind == "pareto" else (groups, "loss", plots._column("val_loss"))
    axes = axes_of(getattr(plots, f"_{kind}"), *arguments)
    axes.figure.draw_without_rendering()
    (legend,) = axes.figure.legends
    box, whole, drawing = legend.get_window_extent(), axes.figure.bbox, axes.get_window_extent()
    assert whole.x0 <= box.x0 < box.x1 <= whole.x1
    assert whole.y0 <= box.y0 < box.y1 < drawing.y0
    assert drawing.height > axes.figure.dpi * 2.5
    assert ["".join(text.get_text().split()) for text in legend.get_texts()] == [
        "".join(run.name.split()) for run in runs
    ]


def test_a_name_in_letters_that_the_font_lacks_is_drawn_without_a_warning():
    groups = [Group("日本", [Run("日本-s0", {}, {"test_accuracy": 40.0, "bytes_on_wire": 1e6}, [])])]
    assert plots._pareto(groups).startswith(b"\x89PNG")


def test_a_folder_without_runs_is_refused(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert f"there is no run below {tmp_path}" in capsys.readouterr().err.replace("\n", "")


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_a_browser_shows_a_figure_and_decodes_every_plot_and_a_phone_need_not_scroll_the_page(root, tmp_path):
    assert main(["report", str(root)]) == 0
    page = (root / "report" / "index.html").read_text()
    # A script of the test's own reads back what the browser made of the page, in a frame as wide as a phone.
    (tmp_path / "page.html").write_text(re.sub(r"<meta http-equiv.*?>", "", page))
    (tmp_path / "probe.html").write_text("""<body><iframe id=f width=390 height=800 src="page.html"></iframe><script>
        f.onload = () => {
          const page = f.contentDocument, row = page.querySelectorAll("#results tr")[1];
          document.body.textContent = JSON.stringify({
            figure: row.cells[1].innerText, width: page.documentElement.scrollWidth,
            plots: [...page.images].map(image => [image.naturalWidth, image.naturalHeight]),
          }) }</script>""")
    browser = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    browser += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", "--dump-dom"]
    done = subprocess.run(
        [*browser, (tmp_path / "probe.html").as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    match = re.search(r"\{.*\}", done.stdout)
    assert match, done.stdout[-2000:] + done.stderr[-2000:]
    seen = json.loads(match.group())
    assert seen["figure"] == "52.00 ± 2.00"
    assert seen["width"] <= 390
    sizes = [struct.unpack(">II", path.read_bytes()[16:24]) for path in (root / "report").glob("*.png")]
    assert sorted(map(tuple, seen["plots"])) == sorted(sizes)


def test_of_two_groups_of_one_rate_the_better_one_stands_in_the_table(tmp_path, capsys):
    out = tmp_path / "rates"
    text = '[base]\ndataset = "cifar100"\nepochs = 4\nworkers = 2\n[[cells]]\nname = "{}"\n'
    cells = ("a", text.format("default"), (50.0,)), ("b", text.format("half") + "lr = [0.02, 0.05]\n", (40.0, 30.0))
    for name, content, accuracies in cells:  # of one rate, 0.01 a worker, but not of the same images
        for place, accuracy in zip(begun(out / name, content).values(), accuracies, strict=True):
            finish(place, accuracy, {"source": "other", "sha256": name})
    assert main(["report", str(out)]) == 0
    html = (out / "report" / "index.html").read_text()
    table = html[html.index('<table id="rates">') :]
    assert rows(table[: table.index("</table>")])["default"] == ["<b>50.00</b>", "30.00"]


def test_the_rate_is_taken_out_of_a_name_wherever_it_stands(tmp_path):
    out = tmp_path / "rates"
    places = begun(out, '[base]\ndataset = "cifar100"\nepochs = 4\n[grid]\nlr = [0.01, 0.1]\nworkers = [1, 2]\n')
    for number, place in enumerate(places.values()):
        finish(place, 40.0 + number)
    assert [search.name for search in tuned.searches(collect(out).groups)] == ["k1", "k2"]


@pytest.mark.parametrize(
    ("rates", "sources"),
    [((0.02, 0.02), ("other", "other")), ((0.02, 0.1), ("official", "re-split"))],
    ids=["one rate", "other images"],
)
def test_two_groups_of_one_rate_or_of_other_images_are_no_search(tmp_path, rates, sources):
    text = '[base]\ndataset = "cifar100"\nepochs = 4\n[[cells]]\nname = "x"\nlr = {}\n'
    for name, rate, source in zip("ab", rates, sources, strict=True):
        (place,) = begun(tmp_path / name, text.format(rate)).values()
        finish(place, 40.0, {"source": source, "sha256": name})
    groups = collect(tmp_path).groups
    assert len(groups) == 2
    assert tuned.searches(groups) == []


def test_rates_that_were_only_validated_are_shown_by_validation(tmp_path):
    out = tmp_path / "rates"
    places = begun(out, '[base]\ndataset = "cifar100"\nepochs = 4\n[grid]\nlr = [0.01, 0.1]\n')
    for place, best in zip(places.values(), (31.0, 33.0), strict=True):
        finish(place, 0.0, best_val=best)
        summary = json.loads((place.folder / "summary.json").read_text())
        (place.folder / "summary.json").write_text(json.dumps(summary | {"test_accuracy": None}))
    report.write(out)
    html = (out / "report" / "index.html").read_text()
    assert "best validation accuracy (%) at rate" in html
    assert "<b>33.00</b>" in html


def test_a_line_connects_runs_that_are_alike_but_for_what_it_is_over(tmp_path):
    text = '[base]\ndataset = "cifar100"\nepochs = 4\nmethod = "sync"\nworkers = 1\n'
    for number, (batch, decay) in enumerate([(64, 0.001), (32, 0.001), (16, 0.5), (8, 0.5)]):
        text += f'[[cells]]\nname = "c{number}"\nbatch_size = {batch}\nweight_decay = {decay}\n'
    places = begun(tmp_path / "lines", text)
    for place in places.values():
        finish(place, 40.0)
    groups = collect(tmp_path / "lines").groups
    families = plots._families("batch_size", "optimizer", groups)
    assert [[group.name for group in family] for family in families.values()] == [["c0", "c1"], ["c2", "c3"]]
    assert list(families) == ["sync sgd: c0", "sync sgd: c2"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("study.json", '{"cells": []}', "study.json is no study's"),
        ("records.jsonl", "{}\n", "records.jsonl, line 1, is no record of an epoch"),
        ("summary.json", '{"config": {}, "communication_reduction": 1}', "summary.json is no summary of a run"),
    ],
)
def test_a_file_of_another_shape_is_named(tmp_path, capsys, name, content, said):
    (place, *_) = begun(tmp_path / "study").values()
    finish(place, 40.0)
    (place.folder / name).write_text(content)
    assert main(["report", str(tmp_path / "study")]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "path"),
    [("summary.json", path) for path in [*kinds.SUMMARY, "config.epochs", "config.schedule", "resolved?.lr"]]
    + [("records.jsonl", path) for path in kinds.RECORD]
    + [
        ("study.json", path)
        for path in [*kinds.STUDY_FILE, *(f"cells.{key}" for key in kinds.CELL), "cells.config.lr"]
    ]
    + [("config.json", path) for path in ("seed", "optimizer")],
)
def test_a_key_that_is_missing_or_of_another_kind_is_named_with_its_file(tmp_path, file, path):
    (place, other, *_) = begun(tmp_path / "study").values()
    finish(place, 40.0)
    diverge(other)
    folder = {"study.json": place.folder.parent, "config.json": other.folder}.get(file, place.folder)
    text = (folder / file).read_text()
    content = json.loads(text.splitlines()[0] if file == "records.jsonl" else text)
    *outer, key = path.replace("?", "").split(".")
    holder = content
    for name in outer:
        holder = holder[name][0] if name == "cells" else holder[name]
    for value in (True, math.nan):
        holder[key] = value
        (folder / file).write_text(json.dumps(content))
        with pytest.raises(UsageError, match=rf"{file}\b.* {key} must be "):
            collect(tmp_path)
    del holder[key]
    (folder / file).write_text(json.dumps(content))
    if path.endswith("?"):
        assert collect(tmp_path).groups
        return
    with pytest.raises(UsageError, match=rf"{file}\b.* has no {key}(;|$)"):
        collect(tmp_path)


@pytest.mark.parametrize("path", sorted((ROOT / "bench" / "results").rglob("*.jsonl")), ids=lambda path: path.stem)
def test_every_run_that_was_recorded_by_any_version_can_be_reported(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    runs = [row for row in rows if {"config", "interval_trace"} <= row.keys()]
    assert [kinds.wrong(run, kinds.SUMMARY) for run in runs] == [None] * len(runs)


@pytest.mark.parametrize("summary", [None, '{"loss": 1}', "no JSON"])
def test_the_files_of_another_tool_are_no_cell(tmp_path, summary):
    (place, *_) = begun(tmp_path / "study").values()
    finish(place, 40.0)
    (tmp_path / "study" / "model").mkdir()
    (tmp_path / "study" / "model" / "config.json").write_text('{"hidden_size": 768}')
    if summary is not None:
        (tmp_path / "study" / "model" / "summary.json").write_text(summary)
    assert not [cell for cell in collect(tmp_path / "study").unfinished if cell.name == "model"]


def test_a_run_without_a_summary_has_started_or_broken_and_its_damaged_config_is_named(tmp_path):
    place, *_ = begun(tmp_path / "study").values()
    finish(place, 50.0)
    (place.folder / "summary.json").unlink()
    (cell,) = [cell for cell in collect(tmp_path).unfinished if cell.name.endswith(place.name)]
    assert (cell.state, cell.message) == ("started", "4 of 4 epochs")
    place.log.write_text("process started\nerror: the disk is gone\n")
    (cell,) = [cell for cell in collect(tmp_path).unfinished if cell.name.endswith(place.name)]
    assert (cell.state, cell.message) == ("broken", "4 of 4 epochs: the disk is gone")
    (place.folder / "config.json").write_text("{")
    with pytest.raises(UsageError, match=r"config.json"):
        collect(tmp_path)


def test_a_config_of_another_tool_need_not_be_json(tmp_path):
    (place, *_) = begun(tmp_path / "study").values()
    finish(place, 40.0)
    (tmp_path / "study" / "model").mkdir()
    (tmp_path / "study" / "model" / "config.json").write_text("// not JSON")
    assert len(collect(tmp_path).groups) == 1


@pytest.mark.parametrize("content", ['{"study": "clinical"}', "// not JSON"])
def test_the_study_of_another_tool_is_none_and_a_damaged_one_of_ours_is_named(tmp_path, content):
    (place, *_) = begun(tmp_path / "study").values()
    finish(place, 40.0)
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "study.json").write_text(content)
    assert len(collect(tmp_path).groups) == 1
    (folder / ".lock").touch()  # whoever makes a study holds its folder
    with pytest.raises(UsageError, match=r"other/study\.json"):
        collect(tmp_path)


def test_plots_are_drawn_whatever_a_persons_own_settings_are(tmp_path):
    for place in begun(tmp_path / "study").values():
        finish(place, 40.0)
    groups = collect(tmp_path / "study").groups
    records = [Record(epoch, 5, 1, 100, 200, 4, None, 0, 0.1, 2.0, 3.0, 9.0, 1.0, 0.1) for epoch in (1, 2)]

    def drawn():
        curves.write_curves(tmp_path / "curves.png", records, [[0, 4]])
        plan_report.plot(Plan(1e9, 8, 0.1, Link(1.0)), tmp_path / "plan.png")
        return plots.draw_all(groups), (tmp_path / "curves.png").read_bytes(), (tmp_path / "plan.png").read_bytes()

    expected = drawn()
    with matplotlib.rc_context({"text.usetex": True, "lines.linewidth": 9, "figure.facecolor": "red"}):
        assert drawn() == expected
        assert matplotlib.rcParams["lines.linewidth"] == 9


def test_runs_behind_links_count_once_and_links_may_lead_back(tmp_path):
    for place in begun(tmp_path / "elsewhere" / "study").values():
        finish(place, 40.0)
    shown = tmp_path / "shown"
    shown.mkdir()
    for name in ("first", "second"):
        (shown / name).symlink_to(tmp_path / "elsewhere" / "study")
    (tmp_path / "elsewhere" / "study" / "back").symlink_to(shown)
    assert [len(group.runs) for group in collect(shown).groups] == [3] * 5


def test_a_run_made_again_with_another_result_is_named(tmp_path):
    place, *_ = begun(tmp_path / "study").values()
    finish(place, 40.0)
    for name, accuracy in (("same", 40.0), ("other", 41.0)):
        finish(
            dataclasses.replace(place, config=dataclasses.replace(place.config, out=tmp_path / "study" / name)),
            accuracy,
        )
    found = collect(tmp_path / "study")
    assert sum(len(group.runs) for group in found.groups) == 1
    assert [cell.name for cell in found.unfinished if cell.state == "left out"] == ["other"]


def test_a_default_and_the_same_value_spelled_out_are_one_family_of_rates(tmp_path):
    text = (
        '[base]\ndataset = "cifar100"\nepochs = 4\nworkers = 2\n'
        '[[cells]]\nname = "a"\nlr = 0.02\n[[cells]]\nname = "b"\nlr = 0.1\nweight_decay = 1e-3\n'
    )
    for place in begun(tmp_path / "rates", text).values():
        finish(place, 40.0)
    (search,) = tuned.searches(collect(tmp_path / "rates").groups)
    assert sorted(map(tuned.rate, search.groups)) == [0.02, 0.1]


def test_rates_of_a_policy_with_a_default_that_follows_the_rate_are_one_family(tmp_path):
    text = '[base]\ndataset = "cifar100"\nepochs = 4\npolicy = "qsr"\n[[cells]]\nname = "a"\nlr = [0.1, 0.02]\n'
    places = begun(tmp_path / "rates", text)
    for place in places.values():
        finish(place, 40.0)
    assert len({place.config.resolved()["qsr_alpha"] for place in places.values()}) == 2
    (search,) = tuned.searches(collect(tmp_path / "rates").groups)
    assert [tuned.rate(group) for group in search.groups] == [0.02, 0.1]


def test_a_default_rate_that_older_runs_did_not_record_is_the_first(tmp_path):
    text = '[base]\ndataset = "cifar100"\nepochs = 4\n[[cells]]\nname = "a"\nlr = 0.1\n[[cells]]\nname = "b"\n'
    for place in begun(tmp_path / "rates", text).values():
        finish(place, 40.0, images=None)
    (search,) = tuned.searches(collect(tmp_path / "rates").groups)
    assert [group.name for group in search.groups] == ["b", "a"]


def test_runs_outside_of_studies_come_last(tmp_path):
    places = begun(tmp_path / "z")
    finish(places["k2-j8", 0], 40.0)
    (alone,) = begun(
        tmp_path / "a", "[base]\ndataset = 'cifar100'\nepochs = 4\n[[cells]]\nname = 'alone'\nworkers = 3\n"
    ).values()
    finish(alone, 30.0)
    (tmp_path / "a" / "study.json").unlink()
    assert [group.name for group in collect(tmp_path).groups] == ["k2-j8", "a/alone"]


def test_a_cell_of_another_version_does_not_hinder_a_report(tmp_path):
    place, *_ = begun(tmp_path / "study").values()
    finish(place, 40.0)
    path = tmp_path / "study" / "study.json"
    saved = json.loads(path.read_text())
    saved["cells"][-1]["config"]["policy"] = "of-another-version"
    path.write_text(json.dumps(saved))
    assert [group.name for group in collect(tmp_path).groups] == ["k2-j8"]
