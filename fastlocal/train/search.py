"""`fastlocal search`: hyper-parameters by Optuna, judged on the validation images; never sees the test images."""

import itertools
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastlocal.train import report
from fastlocal.train.checkpoint import write_bytes
from fastlocal.train.config import NOT_PART_OF_A_RUN, Config
from fastlocal.train.display import Display
from fastlocal.train.errors import RunDivergedError, RunError, UsageError
from fastlocal.train.run import run
from fastlocal.train.study import folder_name, read_toml, table
from fastlocal.train.values import config_from, field_value

_KEYS = {"name", "sampler", "objective", "trials", "seed", "base", "space"}
_RANGE_KEYS = {"low", "high", "log"}


@dataclass(frozen=True)
class Search:
    """A search file, read."""

    name: str
    sampler: Literal["tpe", "grid"]
    objective: Literal["best_val_accuracy", "val_accuracy"]
    trials: int
    seed: int
    base: dict[str, Any]  # fields that stay
    space: dict[str, BaseDistribution]  # fields that are searched


def load(path: Path, *, trials: int | None = None, epochs: int | None = None) -> Search:
    """Read a search file.

    Args:
        path: the TOML file.
        trials: instead of the file's.
        epochs: instead of the file's, for each trial.

    Raises:
        UsageError: it cannot be read, or asks for something that cannot be; names the file.
    """
    content = read_toml(path)
    try:
        return _read(content, path.stem, trials, epochs)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def _read(content: dict[str, Any], stem: str, trials: int | None, epochs: int | None) -> Search:
    unknown = sorted(set(content) - _KEYS)
    if unknown:
        raise UsageError(f"there is no key {unknown[0]}; the keys are {', '.join(sorted(_KEYS))}")
    sampler, objective = content.get("sampler", "tpe"), content.get("objective", "best_val_accuracy")
    if sampler not in ("tpe", "grid"):
        raise UsageError(f"sampler must be tpe or grid, got {sampler!r}")
    if objective not in ("best_val_accuracy", "val_accuracy"):
        raise UsageError(f"objective must be best_val_accuracy or val_accuracy, got {objective!r}")
    space = {name: _distribution(name, value) for name, value in table(content, "space").items()}
    if not space:
        raise UsageError("it searches nothing: add a [space]")
    if sampler == "grid" and not all(isinstance(choice, CategoricalDistribution) for choice in space.values()):
        raise UsageError("the grid sampler needs a list for each field of [space]")
    count = content.get("trials", 20) if trials is None else trials
    seed = content.get("seed", 0)
    for name, value, least in (("trials", count, 1), ("seed", seed, 0)):
        if type(value) is not int or value < least:
            raise UsageError(f"{name} must be a whole number of at least {least}, got {value!r}")
    base = table(content, "base") | {"seed": seed, "test": False}
    if epochs is not None:
        base["epochs"] = epochs
    config_from(base)
    asked = Search(str(content.get("name", stem)), sampler, objective, count, seed, base, space)
    for params in _grid(asked) if sampler == "grid" else ():
        config_from(base | params)
    return asked


def _distribution(name: str, value: Any) -> BaseDistribution:
    """A list is a choice; {low, high, log} a range of the numbers' kind."""
    if isinstance(value, list) and value:
        return CategoricalDistribution([field_value(name, choice) for choice in value])
    if not isinstance(value, dict) or not {"low", "high"} <= set(value) <= _RANGE_KEYS:
        raise UsageError(f"[space]: {name} must be a list or {{low = ..., high = ..., log = true}}, got {value!r}")
    low, high, log = field_value(name, value["low"]), field_value(name, value["high"]), value.get("log", False)
    if not (type(log) is bool and type(low) in (int, float) and low < high and not (log and low <= 0)):
        raise UsageError(f"[space]: {name} must have low < high, and low > 0 with log, got {value!r}")
    if type(low) is int:
        return IntDistribution(low, high, log=log)
    return FloatDistribution(low, high, log=log)


def search(asked: Search, root: Path, console: Console, *, data_dir: Path | None, threads: int | None) -> Config:
    """Make the trials that are missing; returns the best trial's Config.

    A trial that diverges is pruned. best.toml and best.json are written at the end.

    Args:
        asked: what to search.
        root: the search's folder: trials.db, and a folder for each trial.
        console: where to show it.
        data_dir: instead of the file's.
        threads: CPU threads.

    Raises:
        UsageError: the folder cannot be used.
        RunError: no trial ended well, or a file cannot be written.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {root} cannot be made: {error.strerror}") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        storage=f"sqlite:///{root.resolve() / 'trials.db'}",
        study_name=asked.name,
        direction="maximize",
        load_if_exists=True,
    )
    _require_same(study, asked, root)
    _take_up_interrupted(study, asked)
    while len(_tried(study)) < asked.trials:
        if asked.sampler == "grid":
            left = [params for params in _grid(asked) if params not in _tried(study)]
            if not left:
                break
            study.enqueue_trial(left[0])
        # A new one for each trial, so that a search that was stopped draws what it would have drawn.
        study.sampler = optuna.samplers.TPESampler(seed=asked.seed * 100_003 + len(_tried(study)))
        trial = study.ask(asked.space)
        folder = root / folder_name(trial.params)
        console.print(f"trial {trial.number}: {folder.name}", highlight=False, markup=False)
        try:
            config = replace(config_from(asked.base | trial.params), out=folder, resume=True)
        except UsageError as error:  # these values do not go together; others may
            console.print(f"left out: {error}", highlight=False, markup=False, soft_wrap=True)
            study.tell(trial, state=TrialState.PRUNED)
            continue
        config = replace(config, data_dir=data_dir or config.data_dir, threads=threads or config.threads)
        try:
            with Display(console) as display:
                summary = run(config, display)
            study.tell(trial, summary[asked.objective])
        except RunDivergedError as error:
            console.print(f"diverged: {error}", highlight=False, markup=False, soft_wrap=True)
            study.tell(trial, state=TrialState.PRUNED)
    return _finish(asked, study, root, console)


def _require_same(study: optuna.Study, asked: Search, root: Path) -> None:
    """Scores of other settings cannot be ranked together: a folder keeps one search."""
    base = {key: value for key, value in asked.base.items() if key not in NOT_PART_OF_A_RUN}
    parts = {"base": base, "space": repr(asked.space), "sampler": asked.sampler, "objective": asked.objective}
    now = json.loads(json.dumps(parts, default=str))
    before = study.user_attrs.get("asked")
    if before is None:
        study.set_user_attr("asked", now)
    elif before != now:
        differing = ", ".join(name for name in now if before.get(name) != now[name])
        raise UsageError(f"{root} holds a search with another {differing}: choose another --out")


def _tried(study: optuna.Study) -> list[dict[str, Any]]:
    """The parameters of the trials that came to an end, well or not."""
    ended = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE, TrialState.PRUNED])
    return [trial.params for trial in ended]


def _grid(asked: Search) -> list[dict[str, Any]]:
    """Every combination, in the order of the file."""
    choices = [cast(CategoricalDistribution, choice).choices for choice in asked.space.values()]
    return [dict(zip(asked.space, combination, strict=True)) for combination in itertools.product(*choices)]


def _take_up_interrupted(study: optuna.Study, asked: Search) -> None:
    """Ask again for what a killed search was trying: its run goes on from the checkpoint."""
    for trial in study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
        study.tell(trial.number, state=TrialState.FAIL)
        if asked.sampler == "tpe":  # a grid comes to it again by itself
            study.enqueue_trial(trial.params)


def _finish(asked: Search, study: optuna.Study, root: Path, console: Console) -> Config:
    ended = study.get_trials(states=[TrialState.COMPLETE])
    pruned = len(study.get_trials(states=[TrialState.PRUNED]))
    if not ended:
        raise RunError(f"all {pruned} trials diverged: lower the rates in [space]")
    ended.sort(key=lambda trial: cast(float, trial.value), reverse=True)
    table = Table("trial", f"{asked.objective} (%)", *asked.space, box=None, pad_edge=False)
    for trial in ended[:10]:
        values = (f"{value:.4g}" if isinstance(value, float) else str(value) for value in trial.params.values())
        table.add_row(str(trial.number), f"{trial.value:.2f}", *(Text(value) for value in values))
    console.print(table, highlight=False)
    console.print(f"{len(ended)} trials ended, {pruned} diverged; kept in {root}", highlight=False, markup=False)
    best = ended[0]
    report.write_json(
        root / "best.json",
        {"trial": best.number, asked.objective: best.value, "params": best.params, "trials": len(ended)},
    )
    lines = [f"# trial {best.number} of {len(ended)}: {asked.objective} {best.value:.2f} %", "[base]"]
    fields = {key: value for key, value in (asked.base | best.params).items() if key not in ("seed", "test")}
    lines += [f"{key} = {_toml(value)}" for key, value in fields.items()]
    write_bytes(root / "best.toml", ("\n".join(lines) + "\n").encode())
    return config_from(asked.base | best.params)


def _toml(value: Any) -> str:
    """A field as TOML: JSON's strings, numbers and booleans are TOML's too."""
    return json.dumps(value)
