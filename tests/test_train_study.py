"""Study files: cells and errors; and a study killed on the way, gone on with, and left alone once done."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastlocal.train import search, study
from fastlocal.train.cli import main
from fastlocal.train.errors import UsageError

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples" / "studies").glob("*.toml"))

SMALL = """
[base]
synthetic_images = 400
batch_size = 16
workers = 2
interval = 4
epochs = 6
"""


def written(tmp_path, text):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_builds_all_its_configs(path):
    if path.stem.endswith("-search"):
        asked = search.load(path)
        assert math.prod(len(choice.choices) for choice in asked.space.values()) == asked.trials
        return
    cells = study.load(path).cells
    assert len({cell.name for cell in cells}) == len(cells)
    assert {cell.config.dataset for cell in cells} == {"cifar100"}
    assert {cell.config.epochs for cell in study.load(path, epochs=20).cells} == {20}


def test_the_examples_cover_the_grids_of_the_original():
    grids = {path.stem: study.load(path).cells for path in EXAMPLES if not path.stem.endswith("-search")}
    for name in ("local-sgd", "slowmo"):
        pairs = {(cell.config.workers, cell.config.interval) for cell in grids[name]}
        assert pairs == {(k, j) for k in (2, 4, 8) for j in (4, 8, 16, 32, 64)}
    rates = {(cell.config.optimizer, cell.config.batch_size): cell.config.lr for cell in grids["large-batch"]}
    assert len(rates) == 28
    assert rates["sgd", 4096] == pytest.approx(0.08)
    assert rates["adamw", 256] == pytest.approx(0.002)
    reported = {
        cell.group: cell.original["test_accuracy"] for cells in grids.values() for cell in cells if cell.original
    }
    assert set(reported.values()) == {55.24, 52.67, 50.96, 52.86, 53.82, 53.47}


def test_cells_are_named_after_what_they_set_and_lists_multiply(tmp_path):
    text = """
    seeds = [0, 3]
    [base]
    epochs = 10
    [grid]
    workers = [2, 4]
    interval = [8, 16]
    [[cells]]
    method = "slowmo"
    slow_momentum = [0.2, 0.5]
    [[cells]]
    name = "big"
    batch_size = [128, 512]
    lr_at_batch_64 = 0.01
    [[original]]
    where = { workers = 4, interval = 16 }
    test_accuracy = 50
    """
    cells = {cell.name: cell for cell in study.load(written(tmp_path, text)).cells}
    groups = ["k2-j8", "k2-j16", "k4-j8", "k4-j16"]
    groups += ["slowmo-slow-momentum-0.2", "slowmo-slow-momentum-0.5", "big-b128", "big-b512"]
    assert list(cells) == [f"{group}-s{seed}" for group in groups for seed in (0, 3)]
    assert cells["k4-j8-s3"].config.workers == 4
    assert cells["k4-j8-s3"].config.seed == 3
    assert cells["big-b512-s0"].config.lr == pytest.approx(0.01 * math.sqrt(8))
    # K and J of the default are 4 and 16, so the figure stands at all others too.
    assert [name for name, cell in cells.items() if not cell.original] == [
        f"{group}-s{seed}" for group in groups[:3] for seed in (0, 3)
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[grid]\nworkers = [2, 0]", r"mine.toml: \[grid\] \(k0\): --workers must be at least 1, got 0"),
        ("[grid]\nworkers = ['x']", r"\[grid\] \(x\): --workers must be a whole number, got 'x'"),
        ("[grid]\nworkers = [true]", r"--workers must be a whole number, got True"),
        ("[grid]\nnodes = [2]", r"\[grid\] \(nodes-2\): there is no field nodes; the fields are batch_size"),
        ("[grid]\nworkers = 2", r"\[grid\]: workers must be a list, got 2"),
        ("[grid]\nworkers = []", r"\[grid\]: workers is an empty list"),
        ("[[cells]]\nmethod = 'gossip'", r"cell 1 \(gossip\): --method must be sync, local-sgd, slowmo, diloco, got"),
        ("[[cells]]\nmethod = 'sync'\npolicy = 'qsr'", "--policy qsr has no use with it"),
        ("[[cells]]\nseed = 1", "cell 1: seed has no place here: list them in `seeds`"),
        ("[base]\nout = 'x'\n[grid]\nlr = [0.1]", r"\[base\]: out has no place here"),
        ("[[cells]]\nlr = 0.1\nlr_at_batch_64 = 0.1", "lr and lr_at_batch_64 say the same thing"),
        ("[[cells]]\nlr = 0.1\n[[cells]]\nlr = 0.1", "two cells have the name lr0.1-s0"),
        ("seeds = [0, 0]\n[[cells]]\nlr = 0.1", "seeds must be a list of different whole numbers"),
        ("[base]\nlr = 0.1", "it has no cells"),
        ("grids = 3", "there is no key grids; the keys are base, cells"),
        ("[grid]\nlr = [0.1]\n[[original]]\nwhere = {lr = 0.2}\ntest_accuracy = 1", "original 1: no cell is"),
        ("[grid]\nlr = [0.1]\n[[original]]\naccuracy = 1", "original 1: accuracy = 1: it may hold"),
        ("[grid", "is no TOML file"),
    ],
)
def test_a_wrong_study_is_one_line_that_names_the_file_and_the_cell(tmp_path, text, message):
    with pytest.raises(UsageError, match=message) as error:
        study.load(written(tmp_path, text))
    assert "mine.toml" in str(error.value)
    assert "\n" not in str(error.value)


def jobs_of(pid):
    """Processes whose parent is `pid`."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[1] == str(pid) and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def wait_until(holds, seconds=120):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes in /proc")
def test_a_killed_study_leaves_no_process_and_the_next_one_goes_on_and_records_what_diverged(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    path = written(tmp_path, SMALL + "[grid]\nmethod = ['slowmo']\n[[cells]]\nname = 'bad'\nlr = 1e6")
    out = tmp_path / "study"
    command = ["study", str(path), "--out", str(out), "--threads", "1"]
    process = subprocess.Popen([sys.executable, "-m", "fastlocal", *command], env=os.environ)
    wait_until((out / "slowmo-s0" / "checkpoint.pt").exists)
    (job,) = jobs_of(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_until(lambda: not Path(f"/proc/{job}").exists() or job not in jobs_of(1), 10)
    assert not (out / "slowmo-s0" / "summary.json").exists()

    assert main([*command, "--parallel", "2"]) == 0
    shown = capsys.readouterr().out
    assert "2 cells: 1 finished, 1 diverged" in shown
    assert "going on after epoch" in (out / "slowmo-s0.log").read_text()
    assert "diverged" in json.loads((out / "bad-s0" / "failed.json").read_text())["message"]
    summary = json.loads((out / "slowmo-s0" / "summary.json").read_text())
    assert summary["local_steps"] == 60

    times = {file: file.stat().st_mtime_ns for file in (out / "slowmo-s0").iterdir()}
    assert main(command) == 0
    assert {file: file.stat().st_mtime_ns for file in (out / "slowmo-s0").iterdir()} == times
    capsys.readouterr()
    assert main([*command, "--dry-run", "--only", "bad*"]) == 0
    assert "diverged" in capsys.readouterr().out
    assert main([*command, "--epochs", "3"]) == 2
    assert "--epochs 3 (it was 6)" in capsys.readouterr().err
    assert main([*command, "--only", "none"]) == 2
    assert "--only none is none of slowmo-s0, bad-s0" in capsys.readouterr().err
