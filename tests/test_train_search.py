"""The search: real runs on a few images, the same trials when stopped, and never the test images."""

import json
import math
import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import optuna
import pytest
from optuna.storages import RDBStorage
from rich.console import Console
from sqlalchemy.pool import NullPool
from waiting import wait_until

from fastlocal.train import study_file
from fastlocal.train.cli import main
from fastlocal.train.config import Config
from fastlocal.train.errors import UsageError
from fastlocal.train.search import search
from fastlocal.train.search_file import load

ROOT = Path(__file__).parent.parent
BASE = "[base]\nsynthetic_images = 60\nbatch_size = 16\nworkers = 2\ninterval = 2\nepochs = 1\n"
TPE = (
    BASE + "[space]\nlr = {low = 1e-3, high = 0.1, log = true}\nmomentum = [0.5, 0.9]\nwarmup_steps = {low=0, high=3}"
)


def written(tmp_path, text):
    path = tmp_path / "find.toml"
    path.write_text(text)
    return path


def trials(root):
    storage = RDBStorage(f"sqlite:///{root}/trials.db", engine_kwargs={"poolclass": NullPool})
    study = optuna.load_study(study_name="find", storage=storage)
    return study, [trial.params for trial in study.trials if trial.state != optuna.trial.TrialState.FAIL]


def test_a_grid_is_searched_whole_and_a_diverged_trial_is_pruned(tmp_path, capsys):
    path = written(tmp_path, "sampler = 'grid'\ntrials = 9\n" + BASE + "[space]\nlr = [0.01, 1e9]\n")
    root = tmp_path / "out"
    assert main(["search", str(path), "--out", str(root)]) == 0
    study, params = trials(root)
    assert sorted(param["lr"] for param in params) == [0.01, 1e9]
    assert sorted(trial.state.name for trial in study.trials) == ["COMPLETE", "PRUNED"]
    assert "1 trials ended, 1 diverged" in capsys.readouterr().out
    summary = json.loads((root / "lr0.01" / "summary.json").read_text())
    assert summary["test_accuracy"] is None
    assert summary["test_loss"] is None
    best = json.loads((root / "best.json").read_text())
    assert best["params"] == {"lr": 0.01}
    assert best["best_val_accuracy"] == summary["best_val_accuracy"]
    assert tomllib.loads((root / "best.toml").read_text())["base"]["lr"] == 0.01
    (cell,) = study_file.load(root / "best.toml").cells
    assert (cell.name, cell.config.seed) == ("best-s0", 0)
    assert (root / "best.toml").read_text().startswith("# trial 0, the best of 1 that ended: best_val_accuracy ")
    config = Config(lr=0.01, synthetic_images=60, batch_size=16, workers=2, interval=2, epochs=1)
    assert cell.config == config
    assert config.test  # which the search did not do


def test_a_folder_keeps_one_search_and_values_that_do_not_go_together_are_refused_or_left_out(tmp_path, capsys):
    text = "sampler = 'grid'\n" + BASE + "[space]\nlr = [0.01]\n"
    root = tmp_path / "out"
    assert main(["search", str(written(tmp_path, text)), "--out", str(root)]) == 0
    other = text.replace("epochs = 1", "epochs = 2").replace("[0.01]", "[0.02]")
    assert main(["search", str(written(tmp_path, other)), "--out", str(root)]) == 2
    assert "holds a search with another base, space" in " ".join(capsys.readouterr().err.split())
    renamed = tmp_path / "other.toml"
    renamed.write_text(text)
    for more in ([], ["--dry-run"]):
        assert main(["search", str(renamed), "--out", str(root), *more]) == 2
        assert "holds the search find, not other: choose another --out" in " ".join(capsys.readouterr().err.split())
    clash = BASE + "policy = 'val-loss'\nmin_interval = 1\n[space]\nmin_interval = [2, 3]\n"
    assert main(["search", str(written(tmp_path, "sampler = 'grid'\n" + clash)), "--out", str(tmp_path / "g")]) == 2
    assert "--interval must lie between --min-interval 3" in " ".join(capsys.readouterr().err.split())
    clash = clash.replace("[2, 3]", "{low = 2, high = 3}")
    search(
        load(written(tmp_path, "trials = 3\n" + clash)), tmp_path / "t", Console(quiet=True), data_dir=None, threads=1
    )
    states = [trial.state.name for trial in trials(tmp_path / "t")[0].trials]
    assert sorted(set(states)) == ["COMPLETE", "PRUNED"]


def test_a_search_that_was_stopped_makes_the_trials_it_would_have_made(tmp_path):
    path, console = written(tmp_path, TPE), Console(quiet=True)
    search(load(path, trials=2), tmp_path / "straight", console, data_dir=None, threads=1)
    search(load(path, trials=1), tmp_path / "stopped", console, data_dir=None, threads=1)
    study, _ = trials(tmp_path / "stopped")
    study.sampler = optuna.samplers.TPESampler(seed=1)
    killed = study.ask(load(path).space)  # never told: as left behind by a kill
    search(load(path, trials=2), tmp_path / "stopped", console, data_dir=None, threads=1)
    straight, stopped = trials(tmp_path / "straight")[1], trials(tmp_path / "stopped")[1]
    assert len(straight) == 2
    assert stopped == straight
    assert stopped[1] == killed.params


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes in /proc")
def test_a_search_of_two_trials_at_a_time_is_killed_and_the_next_one_goes_on_with_both(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    long = "[base]\nsynthetic_images = 400\nbatch_size = 16\nworkers = 2\ninterval = 4\nepochs = 5\n"
    path = written(tmp_path, long + "[space]\nlr = {low = 1e-3, high = 0.1, log = true}\n")
    root = tmp_path / "out"
    command = ["search", str(path), "--out", str(root), "--trials", "2", "--parallel", "2"]
    process = subprocess.Popen([sys.executable, "-m", "fastlocal", *command], env=os.environ)
    wait_until(lambda: len(list(root.glob("*/checkpoint.pt"))) == 2)
    capsys.readouterr()
    assert main(command) == 2
    assert f"{root} is in use by process {process.pid} on " in capsys.readouterr().err.replace("\n", " ")
    process.send_signal(signal.SIGKILL)
    process.wait()
    interrupted = sorted(folder.parent.name for folder in root.glob("*/checkpoint.pt"))
    assert not list(root.glob("*/summary.json"))

    assert main(command) == 0
    study, params = trials(root)
    assert sorted(f"lr{param['lr']:g}" for param in params) == interrupted
    assert sorted(trial.state.name for trial in study.trials) == ["COMPLETE", "COMPLETE", "FAIL", "FAIL"]
    for name in interrupted:
        summary = json.loads((root / name / "summary.json").read_text())
        assert summary["test_accuracy"] is None
        assert "going on after epoch" in (root / f"{name}.log").read_text()
    shown = capsys.readouterr().out
    assert all(f"{name}: finished: best_val_accuracy " in shown for name in interrupted)
    done = {path: path.stat().st_mtime_ns for path in root.glob("*/*.json")}
    assert main(command) == 0  # nothing is left to do
    assert {path: path.stat().st_mtime_ns for path in root.glob("*/*.json")} == done
    capsys.readouterr()
    assert main(["search", str(path), "--out", str(root), "--trials", "1", "--dry-run"]) == 0
    assert "tpe: 2 trials are made, 1 were asked for, of 5 epochs each" in capsys.readouterr().out


def test_a_trial_that_breaks_ends_the_search_and_is_tried_again_by_the_next(tmp_path, capsys):
    few = BASE.replace("synthetic_images = 60", "synthetic_images = 30")
    text = "sampler = 'grid'\n" + few + "[space]\nlr = [0.01]\n"
    command = ["search", str(written(tmp_path, text)), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main(command) == 1
    told = capsys.readouterr().err.strip()
    assert told.startswith("error: lr0.01 did not end: ")
    assert "need at least 32 training images, there are 24" in told
    assert "\n" not in told
    capsys.readouterr()
    assert main([*command, "--dry-run"]) == 0
    assert "grid: 0 of 1 trials are made, of 1 epochs each" in capsys.readouterr().out
    study, params = trials(tmp_path / "out")
    assert params == [{"lr": 0.01}]
    assert study.trials[0].state.name == "RUNNING"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BASE, "it searches nothing"),
        (BASE + "[space]\nlr = 3", r"\[space\]: lr must be a list or"),
        (BASE + "[space]\nlr = {low = 0.1, high = 0.01}", "lr must have low < high"),
        (BASE + "[space]\nlr = {low = -1e308, high = 1e308}", "lr must have low < high"),
        (BASE + "[space]\nrate = [1]", "there is no field rate"),
        (BASE + "[space]\nseed = [1]", "seed has no place here"),
        (BASE + "[space]\ntest = [true]", "test has no place here: a search never looks at the test images"),
        (BASE + "[space]\nthreads = [1, 2]", "threads has no place here: it does not change what is trained"),
        ("sampler = 'grid'\n" + TPE, "the grid sampler needs a list for each field"),
        ("sampler = 'random'\n" + TPE, "sampler must be tpe or grid, got 'random'"),
        ("objective = 'test_accuracy'\n" + TPE, "objective must be best_val_accuracy or val_accuracy"),
        ("trials = 0\n" + TPE, "trials must be a whole number of at least 1, got 0"),
    ],
)
def test_a_wrong_search_is_one_line_that_names_the_file(tmp_path, text, message):
    with pytest.raises(UsageError, match=message) as error:
        load(written(tmp_path, text))
    assert "find.toml" in str(error.value)


def test_values_of_a_grid_that_would_share_a_folder_are_refused(tmp_path):
    text = "sampler = 'grid'\n" + BASE + "[space]\nlr = [0.1, 0.1000000003]\n"
    with pytest.raises(UsageError, match="have the same folder: give values that differ sooner"):
        load(written(tmp_path, text))


def test_the_best_trial_is_trained_again_with_its_own_seed(tmp_path):
    path = written(tmp_path, "sampler = 'grid'\nseed = 7\n" + BASE + "[space]\nlr = [0.01]\n")
    root = tmp_path / "out"
    assert main(["search", str(path), "--out", str(root)]) == 0
    (cell,) = study_file.load(root / "best.toml").cells
    assert cell.config.seed == 7


def test_a_seed_may_be_as_large_as_a_date(tmp_path):
    root = tmp_path / "out"
    text = "seed = 20261123\ntrials = 2\n" + BASE + "[space]\nlr = [0.01, 0.02]\n"
    assert main(["search", str(written(tmp_path, text)), "--out", str(root)]) == 0
    assert len(trials(root)[1]) == 2


def test_trials_whose_values_do_not_go_together_are_not_called_diverged(tmp_path, capsys):
    text = "trials = 2\n" + BASE + "[space]\nslow_momentum = {low = 0.1, high = 0.8}\n"
    assert main(["search", str(written(tmp_path, text)), "--out", str(tmp_path / "out")]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert said == (
        "error: [space] has no values that go together: --slow-momentum has no use without --method slowmo or diloco"
    )


@pytest.mark.parametrize("content", [b"", b"SQLite format 3\x00" + bytes(5000), b"no database"])
def test_a_damaged_database_is_one_line_and_its_runs_are_taken_up_once_it_is_deleted(tmp_path, capsys, content):
    path = written(tmp_path, "sampler = 'grid'\n" + BASE + "[space]\nlr = [0.01]\n")
    root = tmp_path / "out"
    assert main(["search", str(path), "--out", str(root)]) == 0
    ended = (root / "lr0.01" / "summary.json").read_bytes()
    (root / "trials.db").write_bytes(content)
    capsys.readouterr()
    if content:  # an empty file is an empty database
        for extra in ([], ["--dry-run"]):
            assert main(["search", str(path), "--out", str(root), *extra]) == 1
            said = capsys.readouterr().err
            assert said.startswith(f"error: {root}/trials.db cannot be used: ")
            assert said.rstrip().endswith("if it is damaged, delete it: runs that have ended are taken up again")
            assert said.count("\n") == 1
        (root / "trials.db").unlink()
    assert main(["search", str(path), "--out", str(root)]) == 0
    assert (root / "lr0.01" / "summary.json").read_bytes() == ended


@pytest.mark.parametrize(
    ("text", "given", "said"),
    [
        (BASE + "[space]\nepochs = [1, 2]\n", {"epochs": 3}, "--epochs 3 has no use"),
        (BASE + "[space]\nprecision = ['fp32', 'bf16']\n", {"precision": "fp32"}, "--precision fp32 has no use"),
        (BASE + "[space]\nlr = [0.1, 0.1]\n", {}, "lr must be different values"),
    ],
)
def test_a_search_that_says_something_twice_is_refused(tmp_path, text, given, said):
    with pytest.raises(UsageError, match=said):
        load(written(tmp_path, text), **given)


def test_a_search_takes_another_precision_than_its_files(tmp_path):
    text = BASE + "precision = 'bf16'\n[space]\nlr = [0.1]\n"
    assert load(written(tmp_path, text)).base["precision"] == "bf16"
    assert load(written(tmp_path, text), precision="fp32").base["precision"] == "fp32"


def test_the_best_trial_is_the_one_of_the_highest_accuracy_and_runs_that_ended_are_taken_up(tmp_path):
    text = "sampler = 'grid'\nobjective = 'val_accuracy'\n" + BASE + "[space]\nlr = [0.01, 0.02, 0.03, 0.04]\n"
    root, reached = tmp_path / "out", {0.01: 20.0, 0.02: 30.0, 0.03: 25.0, 0.04: None}
    for lr, accuracy in reached.items():  # runs that have ended are taken up
        config = Config(lr=lr, test=False, synthetic_images=60, batch_size=16, workers=2, interval=2, epochs=1)
        (root / f"lr{lr}").mkdir(parents=True)
        (root / f"lr{lr}" / "config.json").write_text(json.dumps(config.as_dict()))
        name, content = "summary.json", {"val_accuracy": accuracy, "best_val_accuracy": 40.0}
        if accuracy is None:
            name, content = "failed.json", {"message": "the loss is nan"}
        (root / f"lr{lr}" / name).write_text(json.dumps(content))
    search(load(written(tmp_path, text)), root, Console(quiet=True), data_dir=None, threads=1)
    made, _ = trials(root)
    assert [trial.state.name for trial in made.trials] == ["COMPLETE"] * 3 + ["PRUNED"]
    assert made.best_trial.params == {"lr": 0.02}  # what TPE takes for the best
    best = json.loads((root / "best.json").read_text())
    assert (best["params"], best["val_accuracy"]) == ({"lr": 0.02}, 30.0)
    for change in (("val_accuracy", "best_val_accuracy"), ("'grid'", "'tpe'")):
        with pytest.raises(UsageError, match="holds a search with another (objective|sampler): choose another --out"):
            search(
                load(written(tmp_path, text.replace(*change))), root, Console(quiet=True), data_dir=None, threads=1
            )


def test_a_run_whose_summary_lacks_what_is_searched_for_is_named(tmp_path, capsys):
    path = written(tmp_path, "sampler = 'grid'\n" + BASE + "[space]\nlr = [0.01]\n")
    config = Config(lr=0.01, test=False, synthetic_images=60, batch_size=16, workers=2, interval=2, epochs=1)
    folder = tmp_path / "out" / "lr0.01"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.as_dict()))
    (folder / "summary.json").write_text("{}")
    assert main(["search", str(path), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert f"{folder}/summary.json is no summary of a run: it has no best_val_accuracy; delete it" in said


@pytest.mark.parametrize("name", ["r?1", "p%20q", "a b#c", "ü\u00a0"])
def test_a_search_keeps_its_trials_in_its_own_folder_whatever_that_is_called(tmp_path, name):
    out = tmp_path / name
    text = f"trials = 1\n{BASE}checkpoint_seconds = inf\n[space]\nlr = [0.01]"
    assert main(["search", str(written(tmp_path, text)), "--out", str(out), "--threads", "1"]) == 0
    assert (out / "trials.db").stat().st_size
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["find.toml", name])
    assert tomllib.loads((out / "best.toml").read_text())["base"]["checkpoint_seconds"] == math.inf


@pytest.mark.parametrize(
    ("base", "space"),
    [
        ("policy = 'consensus'\nmin_interval = 2\n", "consensus_target = {low = 0.1, high = 0.2}"),
        ("schedule = 'warmup-cosine'\n", "lr_warmup_epochs = [3, 0]"),
        ("max_interval = 32\n", "policy = ['qsr', 'val-loss']"),
        ("slow_momentum = 0.7\n", "method = ['slowmo', 'diloco']"),
    ],
)
def test_a_base_that_is_a_run_with_values_of_the_space_alone_can_be_searched(tmp_path, base, space):
    read = load(written(tmp_path, BASE + base + "[space]\n" + space))
    assert read.example.epochs == 1
    assert read.example.synthetic_images == 60


def test_of_a_base_that_no_value_makes_a_run_its_own_error_is_said(tmp_path):
    text = BASE + "schedule = 'warmup-cosine'\n[space]\nlr = {low = 0.01, high = 0.1}"
    with pytest.raises(UsageError, match="--lr-warmup-epochs must be below --epochs 1"):
        load(written(tmp_path, text))


def test_a_combination_of_a_grid_that_is_no_run_is_named(tmp_path):
    text = "sampler = 'grid'\n" + BASE + "[space]\nmethod = ['local-sgd', 'sync']"
    with pytest.raises(UsageError, match=r"\[space\] \(sync\): --interval has no use without --method local-sgd"):
        load(written(tmp_path, text))
