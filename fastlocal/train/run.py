"""One run, from a Config to a finished folder."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastlocal import comm
from fastlocal.local import DisagreementError
from fastlocal.train import build, data, run_files
from fastlocal.train.allocator import keep_freed_memory
from fastlocal.train.config import Config
from fastlocal.train.display import Display
from fastlocal.train.errors import RunError, UsageError
from fastlocal.train.kinds import SHOWN, SUMMARY
from fastlocal.train.lock import NoLocksError, hold
from fastlocal.train.loop import Training
from fastlocal.train.processes import Processes
from fastlocal.train.ready import what_is_slow

# One that was killed, and whose successor is here already, may still be on its way out.
_PATIENCE_SECONDS = 10.0
_OF_A_MACHINE = ("data_dir", "device", "threads", "checkpoint_seconds")
"""What the processes of one run may differ in."""
_OUTPUTS = {"records.jsonl", "checkpoint.pt", "curves.png", "summary.json"}


def run(config: Config, display: Display) -> dict[str, Any]:
    """Train, test and write the folder; returns the summary. A finished run is not run again when resumed.

    Under torchrun the workers are shared among the processes, and process 0 writes. Processes that torchrun has
    started again resume.

    Raises:
        UsageError: the folder, the data, the device or the checkpoint cannot be used.
        RunDivergedError: training diverged.
        RunError: a file could not be written on the way, or another process was lost or did not come.
    """
    device = build.device(config)
    try:
        group = comm.join(device)
    except ValueError as error:
        raise UsageError(str(error)) from None
    except comm.RendezvousError as error:
        raise RunError(str(error)) from None
    try:
        with ExitStack() as held:
            summary = _run(config, device, Processes(group), display, held)
    except (comm.LostRankError, DisagreementError) as error:
        raise RunError(str(error)) from None
    comm.leave()
    return summary


def _run(
    config: Config, device: torch.device, processes: Processes, display: Display, held: ExitStack
) -> dict[str, Any]:
    folder = config.folder
    _require_equal(processes, config.as_dict())
    processes.share(config.workers)
    if comm.was_noted(f"began {folder}"):
        config = replace(config, resume=True)
    finished = processes.from_first(lambda: _look(folder, config))
    if finished is not None:
        display.note(f"{folder} is finished already")
        return finished
    keep_freed_memory()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if config.dataset == "cifar100" and config.download:
        processes.from_first(lambda: data.download(config.data_dir))
    splits = data.load(config)
    _require_equal(processes, {"images": splits.digest})
    training = Training(config, splits, folder / "checkpoint.pt", device, processes, display.step)
    # First the note: a process that is killed right after the folder was made must be let in again.
    comm.note_for_restarts(f"began {folder}")
    finished = processes.from_first(lambda: _begin(folder, config, display, held))
    if finished is not None:
        display.note(f"{folder} has been finished by another process")
        return finished
    if config.resume and processes.from_first(training.checkpoint_path.exists):
        training.resume()
        display.note(f"going on after epoch {training.epoch}, step {training.step}")
    elif config.resume:
        display.note(f"no checkpoint in {folder}: starting from the beginning")
    for note in _notes(config, splits, training, len(processes)):
        display.note(note)
    for record in training.epochs():
        if processes.rank == 0:
            run_files.write_records(folder / "records.jsonl", training.records)
        display.epoch(record, config.epochs, training.train_samples)
    test_loss, test_accuracy = training.test() if config.test else (None, None)
    return processes.from_first(lambda: _finish(config, training, splits.source, test_loss, test_accuracy))


def _notes(config: Config, splits: data.Splits, training: Training, num_processes: int) -> Iterator[str]:
    """What somebody should know of a run before it begins."""
    yield (
        f"{config.dataset}: {len(splits.train):,} images to train on, {len(splits.val):,} to validate, "
        f"{len(splits.test):,} to test; {config.model}, {config.method} with {config.workers} workers on "
        f"{training.device}, {config.precision}, {training.total_steps:,} local steps"
    )
    if slow := what_is_slow([config]):
        yield slow
    between = config.eval_every * training.steps_per_epoch
    if config.method != "sync" and config.interval > between:
        yield (
            f"--interval {config.interval} is longer than the {between} steps between two evaluations, each of which "
            "closes a round"
        )
    left_out = len(splits.train) - config.workers * config.batch_size * training.steps_per_epoch
    if left_out > len(splits.train) / 100:
        yield f"{left_out:,} images are left out of each epoch: they fill no batch of every worker"
    if config.warmup_steps >= training.total_steps:
        yield f"--warmup-steps {config.warmup_steps} is the whole run: each step averages gradients"
    if num_processes > 1:
        yield f"{num_processes} processes with {config.workers // num_processes} workers each"


def _require_equal(processes: Processes, settings: dict[str, Any]) -> None:
    """Raise UsageError on every process if one has other settings, or other images, than the first."""
    first, *others = processes.gather(settings)
    for rank, own in enumerate(others, start=1):
        for name in settings:
            if name not in _OF_A_MACHINE and own[name] != first[name]:
                values = f"{own[name]} on rank {rank} and {first[name]} on rank 0"
                raise UsageError(f"{name} must be the same on all ranks, got {values}")


def _finish(
    config: Config, training: Training, source: data.Source, test_loss: float | None, test_accuracy: float | None
) -> dict[str, Any]:
    """Write what a finished run leaves behind."""
    from fastlocal.train.curves import write_curves  # Matplotlib takes half a second: no other command waits for it

    folder = config.folder
    summary = run_files.summarise(
        config,
        training.records,
        test_loss=test_loss,
        test_accuracy=test_accuracy,
        train_samples=training.train_samples,
        interval_trace=training.interval_trace,
        images={"source": source, "sha256": training.digest},
        device=training.device,
    )
    run_files.write_records(folder / "records.jsonl", training.records)
    write_curves(folder / "curves.png", training.records, training.interval_trace)
    run_files.write_json(folder / "summary.json", summary)
    return summary


def _look(folder: Path, config: Config) -> dict[str, Any] | None:
    """Refuse a folder that holds another run; returns the summary of a finished one. Writes nothing."""
    try:
        present = {path.name for path in folder.iterdir()} if folder.exists() else set()
    except OSError as error:
        raise UsageError(f"--out {folder} cannot be used: {error.strerror}") from None
    if "config.json" not in present:
        if present & _OUTPUTS:
            raise UsageError(f"{folder} holds {min(present & _OUTPUTS)} of something else: choose another --out")
        return None
    if not config.resume:
        raise UsageError(f"{folder} holds a run already: add --resume to go on with it, or choose another --out")
    differences = config.differences(run_files.read_json(folder / "config.json"))
    if differences:
        raise UsageError(f"{folder} holds another run: {', '.join(differences)}")
    if "summary.json" not in present:
        return None
    return run_files.read_summary(folder, SUMMARY | SHOWN) | {"folder": str(folder)}  # which may have been moved


def _begin(folder: Path, config: Config, display: Display, held: ExitStack) -> dict[str, Any] | None:
    """Make the folder, keep it for this process, write config.json; returns the summary if it is finished by now."""
    try:
        held.enter_context(hold(folder, patience_seconds=_PATIENCE_SECONDS))
    except NoLocksError as error:
        display.note(f"{error}: keep other runs out of it yourself")
    finished = _look(folder, config)  # another process may have been here meanwhile
    if finished is not None:
        return finished
    if not (folder / "config.json").exists():
        try:
            run_files.write_json(folder / "config.json", config.as_dict())
        except RunError as error:
            raise UsageError(str(error)) from None
    return None
