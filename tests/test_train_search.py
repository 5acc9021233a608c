"""The search: real runs on a few images, the same trials when stopped, and never the test images."""

import json
import tomllib

import optuna
import pytest
from rich.console import Console

from fastlocal.train.cli import main
from fastlocal.train.errors import UsageError
from fastlocal.train.search import load, search

BASE = "[base]\nsynthetic_images = 60\nbatch_size = 16\nworkers = 2\ninterval = 2\nepochs = 1\n"
TPE = (
    BASE + "[space]\nlr = {low = 1e-3, high = 0.1, log = true}\nmomentum = [0.5, 0.9]\nwarmup_steps = {low=0, high=3}"
)


def written(tmp_path, text):
    path = tmp_path / "find.toml"
    path.write_text(text)
    return path


def trials(root):
    study = optuna.load_study(study_name="find", storage=f"sqlite:///{root}/trials.db")
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


def test_a_folder_keeps_one_search_and_values_that_do_not_go_together_are_refused_or_left_out(tmp_path, capsys):
    text = "sampler = 'grid'\n" + BASE + "[space]\nlr = [0.01]\n"
    root = tmp_path / "out"
    assert main(["search", str(written(tmp_path, text)), "--out", str(root)]) == 0
    other = text.replace("epochs = 1", "epochs = 2").replace("[0.01]", "[0.02]")
    assert main(["search", str(written(tmp_path, other)), "--out", str(root)]) == 2
    assert "holds a search with another base, space" in " ".join(capsys.readouterr().err.split())
    clash = BASE + "policy = 'val-loss'\nmin_interval = 1\n[space]\nmin_interval = [2, 3]\n"
    assert main(["search", str(written(tmp_path, "sampler = 'grid'\n" + clash)), "--out", str(tmp_path / "g")]) == 2
    assert "--interval must lie between --min-interval 3" in " ".join(capsys.readouterr().err.split())
    clash = clash.replace("[2, 3]", "{low = 2, high = 3}")
    search(
        load(written(tmp_path, "trials = 4\n" + clash)), tmp_path / "t", Console(quiet=True), data_dir=None, threads=1
    )
    states = [trial.state.name for trial in trials(tmp_path / "t")[0].trials]
    assert sorted(set(states)) == ["COMPLETE", "PRUNED"]


def test_a_search_that_was_stopped_makes_the_trials_it_would_have_made(tmp_path):
    path, console = written(tmp_path, TPE), Console(quiet=True)
    search(load(path, trials=3), tmp_path / "straight", console, data_dir=None, threads=None)
    search(load(path, trials=1), tmp_path / "stopped", console, data_dir=None, threads=None)
    study, _ = trials(tmp_path / "stopped")
    study.sampler = optuna.samplers.TPESampler(seed=1)
    killed = study.ask(load(path).space)  # never told: as left behind by a kill
    search(load(path, trials=3), tmp_path / "stopped", console, data_dir=None, threads=None)
    straight, stopped = trials(tmp_path / "straight")[1], trials(tmp_path / "stopped")[1]
    assert len(straight) == len(stopped) == 3
    assert stopped[0] == straight[0]
    assert stopped[1] == killed.params


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BASE, "it searches nothing"),
        (BASE + "[space]\nlr = 3", r"\[space\]: lr must be a list or"),
        (BASE + "[space]\nlr = {low = 0.1, high = 0.01}", "lr must have low < high"),
        (BASE + "[space]\nrate = [1]", "there is no field rate"),
        (BASE + "[space]\nseed = [1]", "seed has no place here"),
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
