"""Study files: cells and errors; and a study killed on the way, gone on with, and left alone once done."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from waiting import wait_until

from fastlocal.policy import Stats
from fastlocal.train import build, cells, cli, pool, search_file, study_file
from fastlocal.train.cli import main
from fastlocal.train.collect import collect
from fastlocal.train.errors import UsageError
from fastlocal.train.schedule import learning_rate

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
        asked = search_file.load(path)
        assert math.prod(len(choice.choices) for choice in asked.space.values()) == asked.trials
        return
    cells = study_file.load(path).cells
    assert len({cell.name for cell in cells}) == len(cells)
    assert {cell.config.dataset for cell in cells} == {"cifar100"}
    assert {cell.config.epochs for cell in study_file.load(path, epochs=20).cells} == {20}


def test_the_examples_cover_the_grids_of_the_original():
    grids = {path.stem: study_file.load(path).cells for path in EXAMPLES if not path.stem.endswith("-search")}
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


def test_the_headline_sets_the_originals_figures_beside_its_own_cells_alone():
    cells = {cell.group: cell for cell in study_file.load(ROOT / "examples" / "studies" / "headline.toml").cells}
    reported = {name: cell.original["test_accuracy"] for name, cell in cells.items() if cell.original}
    assert reported == {
        "sync-k1": 55.24,
        "local-sgd-k2-j32-lr0.01": 52.86,
        "slowmo-k2-j32-lr0.01": 53.82,
        "adaptive-k2-val-loss-original-lr0.01": 53.47,
        **dict.fromkeys(
            (
                *("lars-b1024-lr4", "lars-b1024-lr8", "lars-b1024-lr16", "lars-b1024-lr32"),
                *("lamb-b1024-lr0.005", "lamb-b1024-lr0.01", "lamb-b1024-wd1"),
            ),
            50.96,
        ),
    }
    assert {name for name, cell in cells.items() if "communication_reduction" in cell.original} == {
        "adaptive-k2-val-loss-original-lr0.01"
    }
    assert "neither its batch nor its rate" in cells["lars-b1024-lr4"].note


@pytest.mark.parametrize("path", [path for path in EXAMPLES if not path.stem.endswith("-search")], ids=str)
def test_every_cell_of_an_example_can_be_planned_at_a_small_budget_and_listed(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for cell, whole in zip(study_file.load(path, epochs=6).cells, study_file.load(path).cells, strict=True):
        config = cell.config
        assert (config.epochs, cell.file_epochs) == (6, whole.config.epochs)
        assert whole.config.epochs == (30 if config.model == "resnet18" else 150)
        steps = 40_000 // config.workers // config.batch_size
        assert steps > 0
        interval = build.policy(config, 6 * steps).next_interval(Stats(lr=config.learning_rate))
        assert 1 <= interval <= max(config.interval, config.max_interval)
        rates = [
            learning_rate(config.schedule, config.learning_rate, step, 6 * steps, config.lr_warmup_epochs * steps)
            for step in range(6 * steps)
        ]
        assert 0 < max(rates) <= config.learning_rate
    count = len(study_file.load(path).cells)
    assert main(["study", str(path), "--epochs", "6", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert f"{count} cells: {count} new" in shown
    assert f"0 of {6 * count} epochs are done" in shown
    assert "not ready: data/cifar-100-python/train is missing" in shown
    assert not list(tmp_path.iterdir())


def test_the_originals_figures_find_cells_by_the_values_that_their_defaults_become(tmp_path):
    text = "[grid]\nworkers = [2, 4]\n[[original]]\nwhere = { lr = 0.02 }\ntest_accuracy = 50\nnote = 'one seed'"
    cells = study_file.load(written(tmp_path, text)).cells
    assert [(cell.original, cell.note) for cell in cells] == [({"test_accuracy": 50}, "one seed"), ({}, "")]


def test_threads_are_shared_out_of_the_processors_that_may_be_used(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5, 6, 7, 9}, raising=False)
    assert cli._shared_threads(None, 2, None) == 2
    assert cli._shared_threads(None, 8, None) == 1
    assert cli._shared_threads(3, 2, None) == 3
    assert cli._shared_threads(None, 1, None) is None


def test_threads_that_a_file_asks_for_are_not_shared_out(tmp_path):
    read = study_file.load(written(tmp_path, "[grid]\nlr = [0.1]\n[base]\nthreads = 2"))
    for asked, share, threads in ((None, 1, 2), (3, 1, 3)):
        (place,) = cells.places(
            read, tmp_path, data_dir=None, threads=asked, default_threads=share, device=None, retry=False
        )
        assert place.config.threads == threads


def test_a_study_may_be_started_in_a_folder_with_modules_of_any_name(tmp_path, monkeypatch):
    (tmp_path / "queue.py").write_text("")
    monkeypatch.chdir(tmp_path)
    few = (
        "[base]\nsynthetic_images = 60\nbatch_size = 16\nworkers = 1\nmethod = 'sync'\nepochs = 1\n[grid]\nlr = [0.1]"
    )
    assert main(["study", str(written(tmp_path, few)), "--out", "out", "--threads", "1"]) == 0


def test_only_the_cells_that_are_asked_for_are_looked_at(tmp_path, capsys):
    few = "[base]\nsynthetic_images = 60\n[[cells]]\nname = 'a'\nlr = 0.1\n[[cells]]\nname = 'b'\nlr = 0.2"
    (tmp_path / "a-s0").mkdir()
    (tmp_path / "a-s0" / "config.json").write_text('{"method": "sync"}')
    command = ["study", str(written(tmp_path, few)), "--out", str(tmp_path), "--dry-run", "--only"]
    assert main([*command, "b*"]) == 0
    assert "1 cell:" in (output := capsys.readouterr().out), output
    assert main([*command, "a*"]) == 2
    assert "a-s0 holds another run" in " ".join(capsys.readouterr().err.split())
    assert main([*command, "b*", "--only", "a*"]) == 2
    assert "a-s0 holds another run" in " ".join(capsys.readouterr().err.split())
    assert main([*command, "b*", "--only", "c*"]) == 2
    assert "--only c* is none of a-s0, b-s0" in " ".join(capsys.readouterr().err.split())
    assert main(["study", str(tmp_path / "mine.toml"), "--out", str(tmp_path / "mine.toml"), "--dry-run"]) == 2
    assert "mine.toml cannot be used: it is a file" in " ".join(capsys.readouterr().err.split())


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
    cells = {cell.name: cell for cell in study_file.load(written(tmp_path, text)).cells}
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
        (
            "[base]\nwokers = 2\n[grid]\ninterval = [2, 4]",
            r"\[base\]: there is no field wokers; did you mean workers\?",
        ),
        ("[base]\nworkers = 'x'\n[grid]\ninterval = [2, 4]", r"\[base\]: --workers must be a whole number, got 'x'"),
        (
            "[grid]\nintervall = [2]",
            r"\[grid\] \(intervall-2\): there is no field intervall; did you mean interval\?",
        ),
        ("[[cells]]\nmethod = 'sync'\ninterval = 8", "--interval has no use without --method local-sgd"),
        ("[grid]\nworkers = 2", r"\[grid\]: workers must be a list, got 2"),
        ("[grid]\nworkers = []", r"\[grid\]: workers is an empty list"),
        ("[[cells]]\nmethod = 'gossip'", r"cell 1 \(gossip\): --method must be sync, local-sgd, slowmo, diloco, got"),
        ("[[cells]]\nmethod = 'sync'\npolicy = 'qsr'", "--policy qsr has no use with it"),
        ("[[cells]]\nseed = 1", "cell 1: seed has no place here: give a study its `seeds`"),
        ("[base]\nout = 'x'\n[grid]\nlr = [0.1]", r"\[base\]: out has no place here"),
        ("[[cells]]\nlr = 0.1\nlr_at_batch_64 = 0.1", "lr and lr_at_batch_64 say the same thing"),
        ("[[cells]]\nlr = 0.1\n[[cells]]\nlr = 0.1", "two cells have the name lr0.1-s0"),
        ("seeds = [0, 0]\n[[cells]]\nlr = 0.1", "seeds must be a list of different whole numbers"),
        ("[base]\nlr = 0.1", "it has no cells"),
        ("grids = 3", "there is no key grids; the keys are base, cells"),
        ("[grid]\nlr = [0.1]\n[[original]]\nwhere = {lr = 0.2}\ntest_accuracy = 1", "original 1: no cell is"),
        ("[grid]\nlr = [0.1]\n[[original]]\naccuracy = 1", "original 1: accuracy = 1: it may hold"),
        (
            "seeds = [0, 1]\n[grid]\nlr = [0.1]\n[[original]]\nwhere = {seed = 1}\ntest_accuracy = 1",
            "original 1: where: seed has no place here",
        ),
        ("name = '..'\n[grid]\nlr = [0.1]", "name must be a string that can be a folder's name, got '..'"),
        (
            "[[cells]]\nname = ['a', 'b']",
            "cell 1: name must be a string that can be a folder's name, got \\['a', 'b'\\]",
        ),
        ("[grid", "is no TOML file"),
        ("workers = " + 5000 * "1", "is no TOML file: Exceeds the limit"),
        ("workers = " + 20_000 * "[", "is no TOML file: maximum recursion depth exceeded"),
    ],
)
def test_a_wrong_study_is_one_line_that_names_the_file_and_the_cell(tmp_path, text, message):
    with pytest.raises(UsageError, match=message) as error:
        study_file.load(written(tmp_path, text))
    assert "mine.toml" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_list_of_fields_leaves_out_what_a_file_may_not_set(tmp_path):
    with pytest.raises(UsageError, match="the fields are") as error:
        study_file.load(written(tmp_path, "[base]\nnodes = 2"))
    listed = str(error.value).partition("the fields are ")[2].split(", ")
    assert {"workers", "device", "lr"} <= set(listed)
    assert not {"seed", "out", "resume", "download"} & set(listed)


def test_a_warm_up_as_long_as_a_smaller_budget_is_refused_by_both_numbers():
    path = ROOT / "examples" / "studies" / "large-batch.toml"
    with pytest.raises(UsageError, match="--lr-warmup-epochs must be below --epochs 5 .*, got 5"):
        study_file.load(path, epochs=5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data-dir", "nowhere"], "nowhere/cifar-100-python/train is missing"),
        (["--device", "gpu"], "--device must be auto, cpu, cuda or cuda:1 ..., got gpu"),
    ],
)
@pytest.mark.parametrize(("command", "file"), [("study", "recipe.toml"), ("search", "baseline-search.toml")])
def test_what_no_run_could_do_without_is_looked_for_before_any_is_started(
    tmp_path, monkeypatch, capsys, command, file, flags, message
):
    monkeypatch.chdir(tmp_path)
    path = str(ROOT / "examples" / "studies" / file)
    assert main([command, path, *flags]) == 2
    told = capsys.readouterr().err.strip()
    assert told.startswith(f"error: {message}")
    assert "\n" not in told
    assert main([command, path, *flags, "--dry-run"]) == 0
    assert f"not ready: {message}" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_under_torchrun_a_study_and_a_search_say_what_to_use_instead(tmp_path, monkeypatch, capsys):
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    for command in ("study", "search"):
        assert main([command, str(tmp_path / "mine.toml")]) == 2
        assert "run it without torchrun, and use --parallel" in capsys.readouterr().err


def test_a_cell_that_broke_is_remembered_with_its_reason_and_tried_again(tmp_path, capsys):
    text = "[base]\nworkers = 2\nbatch_size = 16\nepochs = 1\nsynthetic_images = 30\n[grid]\ninterval = [2]"
    out, log = tmp_path / "study", tmp_path / "study" / "j2-s0.log"
    command = ["study", str(written(tmp_path, text)), "--out", str(out), "--threads", "1"]
    read = study_file.load(tmp_path / "mine.toml")
    cells.begin(read, out)
    broke = "process started\nerror: the disk is gone\n"
    for content, state, message in (
        (broke, "broken", "the disk is gone"),
        (f"{broke}process started\n", "new", ""),  # the next one was stopped before it said anything
        (f"{broke}process started\nerror: it is still gone\n", "broken", "it is still gone"),
    ):
        log.write_text(content)
        (place,) = cells.places(read, out, data_dir=None, threads=1, device=None, retry=False)
        assert (place.state, place.message) == (state, message)
        (cell,) = collect(out).unfinished
        assert (cell.state, cell.message) == ((state, message) if message else ("missing", "never started"))
    assert main([*command, "--dry-run"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "j2-s0 broken 0/1 it is still gone 1 cell: 1 broken" in shown
    assert main(command) == 1
    reason = "2 workers with batches of 16 need at least 32 training images, there are 24"
    assert f"1 of 1 cells did not end (j2-s0: {reason})" in capsys.readouterr().err
    assert log.read_text().endswith(f"still gone\nprocess started\nerror: {reason}\n")


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
    capsys.readouterr()
    assert main(command) == 2
    told = capsys.readouterr().err.strip()
    assert told.startswith(f"error: {out} is in use by process {process.pid} on ")
    assert "\n" not in told
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_until(lambda: not Path(f"/proc/{job}").exists() or job not in jobs_of(1), 10)
    assert not (out / "slowmo-s0" / "summary.json").exists()

    assert main([*command, "--parallel", "2"]) == 0
    shown = capsys.readouterr().out
    assert "2 cells: 1 finished, 1 diverged" in shown
    assert (out / ".lock").read_text().startswith(f"{os.getpid()} on ")  # the system let the killed one's go
    assert "going on after epoch" in (out / "slowmo-s0.log").read_text()
    assert "diverged" in json.loads((out / "bad-s0" / "failed.json").read_text())["message"]
    summary = json.loads((out / "slowmo-s0" / "summary.json").read_text())
    assert summary["local_steps"] == 60

    times = {file: file.stat().st_mtime_ns for file in (out / "slowmo-s0").iterdir()}
    assert main(command) == 0
    assert {file: file.stat().st_mtime_ns for file in (out / "slowmo-s0").iterdir()} == times
    assert summary["resolved"] == {"lr": 0.02, "weight_decay": 0.001, "slow_lr": 1.0, "slow_momentum": 0.5}
    assert summary["images"]["source"] == "synthetic"
    capsys.readouterr()
    assert main([*command, "--dry-run", "--only", "bad*"]) == 0
    assert "diverged" in capsys.readouterr().out
    assert main([*command, "--epochs", "3"]) == 2
    assert "--epochs 3 (it was 6)" in capsys.readouterr().err
    assert main([*command, "--only", "none"]) == 2
    assert "--only none is none of slowmo-s0, bad-s0" in capsys.readouterr().err


def test_cells_that_are_the_same_run_are_refused_by_their_names(tmp_path):
    text = SMALL + "[[cells]]\nname = 'b'\nlr = 0.02\n[[cells]]\nname = 'd'\nlr = 0.02\n"
    with pytest.raises(UsageError, match="b-s0 and d-s0 are the same run: leave one of them out"):
        study_file.load(written(tmp_path, text))
    text = SMALL.replace("epochs = 6", "") + "[grid]\nepochs = [1, 3]\n"
    assert len(study_file.load(written(tmp_path, text)).cells) == 2
    with pytest.raises(UsageError, match="epochs-1-s0 and epochs-3-s0 are the same run at --epochs 2"):
        study_file.load(written(tmp_path, text), epochs=2)


@pytest.mark.parametrize(
    "same",
    [
        "lr = 0.02",  # 0.01 a worker
        "weight_decay = 0.001",
        "slow_lr = 1.0",
        "slow_momentum = 0.5",
        "threads = 1",
        "device = 'cpu'",
        "checkpoint_seconds = 5.0",
    ],
)
def test_cells_that_come_to_the_same_run_are_refused_whatever_their_file_spells_out(tmp_path, same):
    cells = f"[[cells]]\nname = 'a'\nmethod = 'slowmo'\n[[cells]]\nname = 'b'\nmethod = 'slowmo'\n{same}\n"
    with pytest.raises(UsageError, match="the cells a-s0 and b-s0 are the same run: leave one of them out"):
        study_file.load(written(tmp_path, SMALL + cells))


@pytest.mark.parametrize("other", ["lr = 0.03", "slow_momentum = 0.4", "data_dir = 'elsewhere'", "test = false"])
def test_cells_that_come_to_another_run_are_two(tmp_path, other):
    cells = f"[[cells]]\nname = 'a'\nmethod = 'slowmo'\n[[cells]]\nname = 'b'\nmethod = 'slowmo'\n{other}\n"
    assert len(study_file.load(written(tmp_path, SMALL + cells)).cells) == 2


def test_a_study_in_another_precision_has_a_folder_of_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path, SMALL + "[grid]\nlr = [0.02]\nprecision = ['bf16', 'fp32']\n")
    with pytest.raises(UsageError, match=r"-bf16-s0 and \S+-fp32-s0 are the same run at --epochs 2 --precision bf16"):
        study_file.load(path, epochs=2, precision="bf16")
    path = written(tmp_path, SMALL + "precision = 'bf16'\n[grid]\nlr = [0.02]\n")
    assert [cell.config.precision for cell in study_file.load(path).cells] == ["bf16"]
    assert [cell.config.precision for cell in study_file.load(path, precision="fp32").cells] == ["fp32"]
    assert main(["study", str(path), "--epochs", "1", "--precision", "fp32"]) == 0
    folder = tmp_path / "runs" / "study" / f"{path.stem}-1-epochs-fp32"
    assert json.loads((folder / "lr0.02-s0" / "config.json").read_text())["precision"] == "fp32"
    assert json.loads((folder / "study.json").read_text())["precision"] == "fp32"
    capsys.readouterr()
    shutil.rmtree(folder / "lr0.02-s0")
    assert main(["study", str(path), "--epochs", "1", "--out", str(folder)]) == 2
    assert "holds the study with precision fp32, not None" in capsys.readouterr().err


def test_a_log_that_cannot_be_written_is_named_and_so_is_a_name_that_is_too_long(tmp_path, capsys):
    out = tmp_path / "out"
    path = written(tmp_path, SMALL + "[grid]\nlr = [0.02]\n")
    (out / "lr0.02-s0.log").mkdir(parents=True)
    assert main(["study", str(path), "--out", str(out)]) == 1
    assert capsys.readouterr().err.strip() == f"error: {out}/lr0.02-s0.log cannot be written: Is a directory"
    long = written(tmp_path, SMALL + f"[[cells]]\nname = '{'a' * 250}'\n")
    with pytest.raises(UsageError, match="a cell's name must have at most 240 bytes, got a"):
        study_file.load(long)


def test_a_cells_name_is_measured_in_bytes(tmp_path):
    with pytest.raises(UsageError, match="a cell's name must have at most 240 bytes"):
        study_file.load(written(tmp_path, SMALL + f"[[cells]]\nname = '{'é' * 130}'\n"))


def test_a_slash_is_refused_in_a_cells_name_and_replaced_in_one_made_of_values(tmp_path):
    with pytest.raises(UsageError, match="name must be a string that can be a folder's name, got 'a/b'"):
        study_file.load(written(tmp_path, SMALL + "[[cells]]\nname = 'a/b'\n"))
    (cell,) = study_file.load(written(tmp_path, SMALL + "[grid]\ndata_dir = ['a/b']\n")).cells
    assert cell.name == "a_b-s0"


def test_a_cell_has_the_figures_and_notes_of_all_that_reported_it(tmp_path):
    text = "[grid]\nworkers = [2]\n"
    text += "[[original]]\ntest_accuracy = 50\nnote = 'One.'\n[[original]]\nbest_val_accuracy = 51\nnote = 'Two.'\n"
    (cell,) = study_file.load(written(tmp_path, text)).cells
    assert cell.original == {"test_accuracy": 50, "best_val_accuracy": 51}
    assert cell.note == "One. Two."


def test_a_cell_whose_process_is_killed_is_remembered_as_such(tmp_path, monkeypatch):
    text = "[base]\nworkers = 2\nbatch_size = 16\nepochs = 1\nsynthetic_images = 60\n[grid]\ninterval = [2]"
    out = tmp_path / "study"
    read = study_file.load(written(tmp_path, text))
    cells.begin(read, out)
    (place,) = cells.places(read, out, data_dir=None, threads=1, device=None, retry=False)
    monkeypatch.setattr(sys, "executable", "/bin/false")  # ends before it can say anything
    pool.run_all([place], 1, lambda ended: None)
    assert (place.state, place.message) == ("broken", f"exit code 1, see {place.log}")
    (again,) = cells.places(read, out, data_dir=None, threads=1, device=None, retry=False)
    assert (again.state, again.message) == ("broken", f"exit code 1, see {place.log}")


def test_cells_that_are_not_asked_for_are_left_out_where_other_epochs_or_precision_make_them_no_run(tmp_path):
    cells = "[[cells]]\nname = 'plain'\nlr = 0.07\n"
    cells += "[[cells]]\nname = 'warm'\nschedule = 'warmup-cosine'\nlr_warmup_epochs = 3\n"
    path = written(
        tmp_path, SMALL.replace("epochs = 6", "epochs = 4") + "[grid]\nprecision = ['bf16', 'fp32']\n" + cells
    )
    assert len(study_file.load(path).cells) == 4
    with pytest.raises(UsageError, match="warm-s0: --lr-warmup-epochs must be below --epochs 2"):
        study_file.load(path, epochs=2)
    path.write_text(path.read_text() + "[[original]]\nwhere = {schedule = 'warmup-cosine'}\ntest_accuracy = 50\n")
    read = study_file.load(path, epochs=2, only=["plain*"])
    assert [cell.name for cell in read.cells] == ["bf16-s0", "fp32-s0", "plain-s0"]
    assert {cell.config.epochs for cell in read.cells} == {2}


def test_a_cells_name_that_no_file_can_have_here_is_one_line(tmp_path, monkeypatch):
    path = written(tmp_path, SMALL + "[[cells]]\nname = '日本'\n")
    under_c = SimpleNamespace(fsencode=lambda name: name.encode("ascii"))  # as under LC_ALL=C
    monkeypatch.setattr(study_file, "os", under_c)
    with pytest.raises(UsageError, match=r"a cell's name must be one that files can have here .*, got 日本-s0"):
        study_file.load(path)
