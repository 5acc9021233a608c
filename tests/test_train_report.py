"""The report: figures by hand, what is missing, and the page as a browser shows it."""

import base64
import json
import re
import shutil
import struct
import subprocess

import pytest

from fastlocal.train import cells, study
from fastlocal.train.cli import main
from fastlocal.train.collect import Spread, collect

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
"""


def finish(place, accuracy):
    """The files that a finished run leaves, with figures chosen here."""
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
        "best_val_accuracy": accuracy + 1,
        "communication_reduction": 0.875,
        "bytes_on_wire": 64_000_000 // place.config.interval,
        "train_seconds": 60.0,
        "local_steps": 400,
        "interval_trace": [[0, 16], [200, 32]] if place.config.policy == "val-loss" else [[0, place.config.interval]],
        "config": config,
        "versions": {"torch": "2"},
    }
    (place.folder / "summary.json").write_text(json.dumps(summary))


@pytest.fixture
def root(tmp_path):
    path = tmp_path / "grids.toml"
    path.write_text(TOML)
    read = study.load(path)
    out = tmp_path / "study"
    cells.begin(read, out)
    places = cells.places(read, out, data_dir=None, threads=None, device=None, retry=False)
    accuracies = {"k2-j8": (50.0, 52.0, 54.0), "k2-j16": (49.0,), "k4-j8": (48.0, 48.5), "adaptive": (51.0, 53.0)}
    for place in places:
        values = accuracies.get(place.cell.group, ())
        if place.cell.config.seed < len(values):
            finish(place, values[place.cell.config.seed])
    failed = out / "k4-j16-s0"
    failed.mkdir()
    (failed / "config.json").write_text(json.dumps(places[9].config.as_dict()))
    (failed / "failed.json").write_text('{"message": "the loss is <nan>"}')
    return out


def test_groups_have_the_mean_and_sample_deviation_of_their_seeds_and_no_cell_is_lost(root):
    collection = collect(root)
    groups = {group.name: group.spread("test_accuracy") for group in collection.groups}
    assert list(groups) == ["k2-j8", "k2-j16", "k4-j8", "adaptive"]
    assert groups["k2-j8"] == Spread(52.0, 2.0, 3)
    assert groups["k2-j16"] == Spread(49.0, None, 1)
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
    cells_of = {
        row[0]: row[1:]
        for row in (re.findall(r"<td[^>]*>([^<]*)</td>", line) for line in page.split("<tr>"))
        if len(row) > 3
    }
    # seeds, test, original, difference, best validation, saved, the original's, bytes, time, epochs
    assert cells_of["k2-j8"] == [
        *("3 seeds", "52.00 ± 2.00", "50.50", "+1.50", "53.00 ± 2.00"),
        *("87.5", "80.0", "8.0 MB", "60 s", "4"),
    ]
    assert cells_of["k2-j16"][:2] == ["one seed", "49.00"]
    assert "CIFAR-100, re-split" in page
    assert "the loss is &lt;nan&gt;" in page
    images = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    files = sorted(path.name for path in (root / "report").glob("*.png"))
    assert files == [
        *("accuracy-bytes.png", "accuracy-interval.png", "accuracy-workers.png", "accuracy.png"),
        *("interval.png", "train-loss.png", "val-loss.png"),
    ]
    assert {base64.b64decode(image) for image in images} == {(root / "report" / name).read_bytes() for name in files}


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
            figure: row.cells[2].innerText, width: page.documentElement.scrollWidth,
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
