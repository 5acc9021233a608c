"""`fastlocal search`: hyper-parameters by Optuna, judged on the validation images; never sees the test images."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from rich.console import Console
from rich.table import Table
from rich.text import Text
from sqlalchemy.engine import URL
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from fastlocal.train import run_files
from fastlocal.train.checkpoint import write_bytes
from fastlocal.train.config import NOT_PART_OF_A_RUN, Config
from fastlocal.train.errors import RunError, UsageError
from fastlocal.train.kinds import NUMBER
from fastlocal.train.lock import hold
from fastlocal.train.pool import Place, find, placed, run_all
from fastlocal.train.ready import require_ready, what_is_missing, what_is_slow
from fastlocal.train.search_file import Search, grid
from fastlocal.train.study_display import StudyDisplay
from fastlocal.train.study_file import folder_name
from fastlocal.train.tables import print_line, print_whole
from fastlocal.train.values import config_from

_LEFT_OUT = "left out"
"""Of a trial whose values do not go together: why."""


def search(
    asked: Search,
    root: Path,
    console: Console,
    *,
    data_dir: Path | None,
    threads: int | None,
    default_threads: int | None = None,
    device: str | None = None,
    parallel: int = 1,
) -> None:
    """Make the trials that are missing, each in a process of its own.

    A trial that diverges is pruned. best.toml and best.json are written at the end.

    Args:
        asked: what to search.
        root: the search's folder: trials.db, and a folder for each trial.
        console: where to show it.
        data_dir: instead of the file's.
        threads: CPU threads of each trial, instead of the file's.
        default_threads: where neither says.
        device: instead of the file's.
        parallel: trials at a time. With one, a search that was stopped makes the trials it would have made; with
            more, which ones TPE proposes depends on which came to an end first.

    Raises:
        UsageError: the images or the device are not there, the folder cannot be used, or another search is at work
            in it.
        RunError: a trial broke, none ended well, or a file cannot be written.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    base = placed(asked.example, data_dir, device, threads, default_threads)
    require_ready([base])  # a wrong request leaves no folder behind
    with hold(root), _usable(root):
        _require_only(asked, root)
        study = optuna.create_study(
            storage=_storage(root),
            study_name=asked.name,
            direction="maximize",
            load_if_exists=True,
        )
        _require_same(study, asked, root)
        _take_up_interrupted(study, asked)
        trials = _Trials(asked, study, root, console, base)
        left = asked.trials - len(_tried(study))
        if left > 0 and (slow := what_is_slow([base])):
            print_line(console, slow)
        with StudyDisplay(console, trials.places, epochs=max(0, left) * base.epochs) as display:

            def on_change(ended: list[Place]) -> None:
                for place in ended:
                    trials.tell(place)
                display.update()

            run_all(trials.ask(), parallel, on_change)
        _finish(asked, study, root, console)


def plan(asked: Search, root: Path, console: Console, *, data_dir: Path | None, device: str | None) -> None:
    """Show what is searched, how many of the trials are made, and whether more can be. Starts nothing.

    Raises:
        UsageError: the folder holds another search.
    """
    made = 0
    with _usable(root):
        if _require_only(asked, root):
            study = optuna.load_study(storage=_storage(root), study_name=asked.name)
            _require_same(study, asked, root)
            made = len(_tried(study))
    table = Table("searched", "values", box=None, pad_edge=False)
    for name, choice in asked.space.items():
        table.add_row(name, Text(_values(choice)))
    print_whole(console, table)
    count = min(asked.trials, len(grid(asked))) if asked.sampler == "grid" else asked.trials
    base = placed(asked.example, data_dir, device, None)
    trials = (
        f"{made} of {count} trials are made" if made <= count else f"{made} trials are made, {count} were asked for"
    )
    notes = [f"{asked.sampler}: {trials}, of {base.epochs:,} epochs each"]
    if missing := what_is_missing([base]):
        notes.append(f"not ready: {missing}")
    elif slow := what_is_slow([base]):
        notes.append(slow)
    for note in notes:
        print_line(console, note)


def _values(choice: BaseDistribution) -> str:
    if isinstance(choice, CategoricalDistribution):
        return ", ".join(map(str, choice.choices))
    assert isinstance(choice, IntDistribution | FloatDistribution)
    return f"{choice.low:g} to {choice.high:g}" + (", on a log scale" if choice.log else "")


def _storage(root: Path) -> RDBStorage:
    """trials.db, which is made if it is not there; no connection stays open."""
    path = root.resolve() / "trials.db"
    address = URL.create("sqlite", database=str(path)).render_as_string()  # a folder's name may hold ? and %
    return RDBStorage(address, engine_kwargs={"poolclass": NullPool})


@contextmanager
def _usable(root: Path) -> Iterator[None]:
    """Around the use of trials.db: RunError where it is damaged, or the disk is full."""
    try:
        yield
    except (SQLAlchemyError, StorageInternalError) as error:
        reason = str(error.__cause__ or error).splitlines()[0] if str(error) else repr(error)
        raise RunError(
            f"{root / 'trials.db'} cannot be used: {reason}; if another program uses it, wait for that; if it is "
            "damaged, delete it: runs that have ended are taken up again"
        ) from error


class _Trials:
    """Asks Optuna what to try next, and tells it how that ended."""

    def __init__(self, asked: Search, study: optuna.Study, root: Path, console: Console, base: Config) -> None:
        self.asked, self.study, self.root, self.console = asked, study, root, console
        self.base = base
        self.places: list[Place] = []
        self._open: dict[str, list[optuna.Trial]] = {}  # by folder: what runs now

    def ask(self) -> Iterator[Place]:
        """The runs to make, one when asked for, until there are as many trials as wanted."""
        while len(tried := _tried(self.study, TrialState.RUNNING)) < self.asked.trials:
            if self.asked.sampler == "grid":
                left = [params for params in grid(self.asked) if params not in tried]
                if not left:
                    return
                if not self.study.get_trials(deepcopy=False, states=[TrialState.WAITING]):  # of a killed search
                    self.study.enqueue_trial(left[0])
            # A new one for each trial, so that a search that was stopped draws what it would have drawn.
            seed = (self.asked.seed * 100_003 + len(tried)) % 2**32  # as NumPy takes them
            self.study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
            trial = self.study.ask(self.asked.space)
            name = folder_name(trial.params)
            print_line(self.console, f"trial {trial.number}: {name}")
            try:
                config = config_from(self.asked.base | trial.params)
            except UsageError as error:  # these values do not go together; others may
                print_line(self.console, f"left out: {error}")
                trial.set_user_attr(_LEFT_OUT, str(error))
                self.study.tell(trial, state=TrialState.PRUNED)
                continue
            if name in self._open:  # TPE may propose what it waits for
                if self._open[name][0].params != trial.params:
                    raise RunError(
                        f"trial {trial.number}, {trial.params}, would have the folder {name} of another one"
                    )
                self._open[name].append(trial)
                continue
            self._open[name] = [trial]
            config = placed(config, self.base.data_dir, self.base.device, self.base.threads)
            found = find(replace(config, out=self.root / name, resume=True))
            if found.state in ("finished", "diverged"):  # proposed before
                self.tell(found)
                continue
            self.places.append(found)
            yield found

    def tell(self, place: Place) -> None:
        """Tell Optuna how a run ended; RunError if that says nothing of its values."""
        if place.state == "broken":
            raise RunError(f"{place.name} did not end: {place.message}; the same command goes on with it")
        for trial in self._open.pop(place.name):
            if place.state == "diverged":
                self.study.tell(trial, state=TrialState.PRUNED)
                continue
            value = run_files.read_summary(place.folder, {self.asked.objective: NUMBER})[self.asked.objective]
            self.study.tell(trial, value)
            place.message = f"{self.asked.objective} {value:.2f} %"


def _require_only(asked: Search, root: Path) -> bool:
    """Whether the folder holds this search already; UsageError if it holds another one."""
    names = optuna.get_all_study_names(_storage(root)) if (root / "trials.db").exists() else []
    for name in names:
        if name != asked.name:
            raise UsageError(f"{root} holds the search {name}, not {asked.name}: choose another --out")
    return bool(names)


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


def _tried(study: optuna.Study, *more: TrialState) -> list[dict[str, Any]]:
    """The parameters of the trials that came to an end, well or not, and of those in other states."""
    ended = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE, TrialState.PRUNED, *more])
    return [trial.params for trial in ended]


def _take_up_interrupted(study: optuna.Study, asked: Search) -> None:
    """Ask again for what a killed search was trying: its run goes on from the checkpoint."""
    for trial in study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
        study.tell(trial.number, state=TrialState.FAIL)
        if asked.sampler == "tpe":  # a grid comes to it again by itself
            study.enqueue_trial(trial.params)


def _finish(asked: Search, study: optuna.Study, root: Path, console: Console) -> None:
    ended = study.get_trials(states=[TrialState.COMPLETE])
    pruned = study.get_trials(states=[TrialState.PRUNED])
    left_out = [trial.user_attrs[_LEFT_OUT] for trial in pruned if _LEFT_OUT in trial.user_attrs]
    diverged = len(pruned) - len(left_out)
    if not ended and diverged:
        raise RunError(f"all {diverged} trials diverged: lower the rates in [space]")
    if not ended:
        raise UsageError(f"[space] has no values that go together: {left_out[-1]}")
    ended.sort(key=lambda trial: cast(float, trial.value), reverse=True)
    table = Table("trial", f"{asked.objective} (%)", *asked.space, box=None, pad_edge=False)
    for trial in ended[:10]:
        values = (f"{value:.4g}" if isinstance(value, float) else str(value) for value in trial.params.values())
        table.add_row(str(trial.number), f"{trial.value:.2f}", *(Text(value) for value in values))
    print_whole(console, table)
    counts = f"{len(ended)} trials ended, {diverged} diverged" + (f", {len(left_out)} left out" if left_out else "")
    print_line(console, f"{counts}; kept in {root}")
    best = ended[0]
    run_files.write_json(
        root / "best.json",
        {"trial": best.number, asked.objective: best.value, "params": best.params, "trials": len(ended)},
    )
    reached = f"trial {best.number}, the best of {len(ended)} that ended: {asked.objective} {best.value:.2f} %"
    lines = [f"# {reached}", f"seeds = [{asked.seed}]", "[base]"]
    fields = {key: value for key, value in (asked.base | best.params).items() if key not in ("seed", "test")}
    lines += [f"{key} = {_toml(value)}" for key, value in fields.items()]
    lines += ["[[cells]]", 'name = "best"']  # so that `fastlocal study` trains it, and tests it
    write_bytes(root / "best.toml", ("\n".join(lines) + "\n").encode())


def _toml(value: Any) -> str:
    """A field as TOML: JSON's strings, numbers and booleans are TOML's too, but for surrogates."""
    return "inf" if value == math.inf else json.dumps(value, ensure_ascii=False)
