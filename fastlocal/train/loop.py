"""The one training loop: it takes a Config and images, and yields a Record an epoch.

Everything random in an epoch is drawn before it begins, from the seed and the epoch's number. So the state of
a run is its step, the workers and the optimizer, and a resumed run repeats the other one bit by bit.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastlocal.local import DivergedError
from fastlocal.train import build, checkpoint
from fastlocal.train.augment import Augmenter, Normalizer
from fastlocal.train.config import Config
from fastlocal.train.data import ImageSet, Splits
from fastlocal.train.data_parallel import DataParallel
from fastlocal.train.errors import RunDivergedError, UsageError
from fastlocal.train.processes import Processes
from fastlocal.train.record import Record, Standing
from fastlocal.train.schedule import learning_rate
from fastlocal.train.state import collect, optimizer_state
from fastlocal.train.step import Gradients, forward

_EVAL_BATCH = 1000
_STEPS_BETWEEN_QUESTIONS = 32


class Training:
    """A run: build it, resume it if wanted, iterate over `epochs()`, then `test()`.

    Args:
        config: the run.
        splits: its images.
        checkpoint_path: where the state is kept.
        device: where it trains.
        processes: among which the workers are shared; every process calls the same methods.
        on_step: called after each local step.
    """

    def __init__(
        self,
        config: Config,
        splits: Splits,
        checkpoint_path: Path,
        device: torch.device,
        processes: Processes,
        on_step: Callable[[Standing], None] = lambda standing: None,
    ) -> None:
        self.config = config
        self.checkpoint_path = checkpoint_path
        self.on_step = on_step
        self.device = device
        self.processes = processes
        self.here = processes.share(config.workers)
        self.digest = splits.digest
        train = _to(splits.train, self.device)
        self.normalize = Normalizer(train.images)
        self.val, self.test_set = _to(splits.val, self.device), _to(splits.test, self.device)
        # Each worker has its own part of the images, the same size for all.
        per_worker = len(train) // config.workers
        order = torch.randperm(len(train), generator=_generator(config.seed, 0)).to(self.device)
        self.data = [
            Augmenter(train.take(order[k * per_worker : (k + 1) * per_worker]), self.normalize) for k in self.here
        ]
        # A last batch that is not full is left for another epoch's order.
        self.steps_per_epoch = per_worker // config.batch_size
        self.total_steps = config.epochs * self.steps_per_epoch
        self.workers = build.workers(config, len(self.here), device)
        self.optimizer = build.optimizer(config, self.workers, self.total_steps, processes.group)
        parallel = self.optimizer if isinstance(self.optimizer, DataParallel) else None
        models = [parallel.model] if parallel else list(self.workers)
        self.watching = parallel.watching if parallel else contextlib.nullcontext
        self.gradients = Gradients(models, self.data, config.batch_size, config.precision, record=parallel is None)
        self.epoch = 0  # completed
        self.step = 0  # completed, of the epoch under way
        self.train_seconds = 0.0
        self.interval_trace: list[list[int]] = []  # [local step, interval] where it changed
        self.records: list[Record] = []

    @property
    def train_samples(self) -> int:
        """Images that went through training, all workers together."""
        return self.optimizer.stats.local_steps * self.config.workers * self.config.batch_size

    def epochs(self) -> Iterator[Record]:
        """Train to the end, from wherever the run stands; one record an epoch.

        Raises:
            RunDivergedError: training diverged.
            RunError: a checkpoint cannot be written.
        """
        while self.epoch < self.config.epochs:
            self._train_epoch()
            epoch = self.epoch + 1
            train_loss = self._train_loss()
            val_loss = val_accuracy = None
            if epoch % self.config.eval_every == 0 or epoch == self.config.epochs:
                with self._timed():
                    self._guarded(self.optimizer.sync)
                val_loss, val_accuracy = self.evaluate(self.val)
                self._require_finite(val_loss, "validation")
                self.optimizer.observe(val_loss=val_loss, train_loss=train_loss)
            self.records.append(self._record(train_loss, val_loss, val_accuracy))
            self.epoch, self.step = epoch, 0
            self.gradients.losses.zero_()
            self.save()
            yield self.records[-1]

    def _record(self, train_loss: float, val_loss: float | None, val_accuracy: float | None) -> Record:
        stats = self.optimizer.stats
        return Record(
            epoch=self.epoch + 1,
            local_steps=stats.local_steps,
            rounds=stats.rounds,
            bytes_on_wire=stats.bytes_on_wire,
            bytes_synchronous=stats.bytes_synchronous,
            interval=stats.interval,
            drift=None if math.isnan(stats.drift) else stats.drift,
            excluded=stats.excluded,
            lr=self.optimizer.param_groups[0]["lr"],
            train_loss=train_loss,
            val_loss=val_loss,
            val_accuracy=val_accuracy,
            train_seconds=self.train_seconds,
            sync_seconds=None if isinstance(self.optimizer, DataParallel) else stats.seconds_in_sync,
        )

    def _train_epoch(self) -> None:
        generator = _generator(self.config.seed, self.epoch + 1)
        # Every worker's, so that the numbers do not depend on how the workers are shared.
        plans = [self.data[0].plan(generator) for _ in range(self.config.workers)]
        own = torch.stack(plans[self.here.start : self.here.stop])
        self.workers.train()
        while self.step < self.steps_per_epoch:
            with self._timed():
                self._train_until_checkpoint(own)
            if self.step < self.steps_per_epoch:
                self._train_loss()  # of a run that has diverged no checkpoint is kept
                self.save()

    def _train_until_checkpoint(self, plans: torch.Tensor) -> None:
        """Local steps until it is time for a checkpoint, or the epoch is over."""
        config, begun = self.config, time.perf_counter()
        warmup = config.lr_warmup_epochs * self.steps_per_epoch
        while self.step < self.steps_per_epoch:
            step = self.epoch * self.steps_per_epoch + self.step
            rate = learning_rate(config.schedule, config.learning_rate, step, self.total_steps, warmup)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            first = self.step * config.batch_size
            with self.watching():
                self.gradients(plans[:, :, first : first + config.batch_size])
            self._guarded(self.optimizer.step)
            self.step += 1
            stats = self.optimizer.stats
            self.processes.local_step = stats.local_steps
            if not self.interval_trace or self.interval_trace[-1][1] != stats.interval:
                self.interval_trace.append([stats.local_steps - 1, stats.interval])
            self.on_step(self._standing())
            if self.step < self.steps_per_epoch and self._is_time_to_save(begun):
                break

    def _standing(self) -> Standing:
        stats = self.optimizer.stats
        return Standing(
            epoch=self.epoch + 1,
            epochs=self.config.epochs,
            step=self.step,
            steps=self.steps_per_epoch,
            interval=stats.interval,
            bytes_on_wire=stats.bytes_on_wire,
            bytes_synchronous=stats.bytes_synchronous,
        )

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """Count the seconds as training, until the device has done its work."""
        started = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.train_seconds += time.perf_counter() - started

    def _is_time_to_save(self, last: float) -> bool:
        """Process 0 decides by its clock; the others ask now and then, since asking is a message."""
        if len(self.processes) > 1 and self.optimizer.stats.local_steps % _STEPS_BETWEEN_QUESTIONS:
            return False
        seconds = time.perf_counter() - last
        return self.processes.told_by_first(seconds > self.config.checkpoint_seconds)

    @torch.inference_mode()
    def evaluate(self, images: ImageSet) -> tuple[float, float]:
        """Mean cross-entropy and accuracy in percent of the averaged model; each process takes some of the batches.

        Any number of processes comes to the same bits: a policy may read the loss.
        """
        model = self.workers.mean().eval()
        starts = range(0, len(images), _EVAL_BATCH)
        totals = torch.zeros(len(starts), 2, dtype=torch.float64, device=self.device)  # of the loss, and correct ones
        for number in range(self.processes.rank, len(starts), len(self.processes)):
            here = slice(starts[number], starts[number] + _EVAL_BATCH)
            labels = images.labels[here]
            logits = forward(model, self.normalize(images.images[here]), self.config.precision)
            totals[number, 0] = nn.functional.cross_entropy(logits, labels, reduction="sum")
            totals[number, 1] = (logits.argmax(dim=1) == labels).sum()
        self.processes.sum_(totals)
        loss, correct = totals.sum(dim=0).tolist()
        return loss / len(images), 100 * correct / len(images)

    def test(self) -> tuple[float, float]:
        """Loss and accuracy on the test images: once, at the end."""
        return self.evaluate(self.test_set)

    def _guarded(self, sync: Callable[[], Any]) -> None:
        try:
            sync()
        except DivergedError as error:
            raise RunDivergedError(str(error)) from None

    def _train_loss(self) -> float:
        """Mean over the epoch so far and over the workers; RunDivergedError if none of them was finite."""
        totals = self.gradients.losses.sum(dim=0)
        self.processes.sum_(totals)
        total, count = totals.tolist()
        train_loss = total / count if count else math.nan
        self._require_finite(train_loss, "training")
        return train_loss

    def _require_finite(self, loss: float, what: str) -> None:
        if not math.isfinite(loss):
            raise RunDivergedError(
                f"the {what} loss is {loss} in epoch {self.epoch + 1}: training has diverged; {_calmer(self.config)}"
            )

    def save(self) -> None:
        """Write the checkpoint.

        Raises:
            RunError: it cannot be written; the last one is untouched.
        """
        state = {
            "config": self.config.as_dict(),
            "images": self.digest,
            "epoch": self.epoch,
            "step": self.step,
            "train_seconds": self.train_seconds,
            "interval_trace": self.interval_trace,
            "records": [asdict(record) for record in self.records],
            **collect(self.workers.state_dict()["workers"], self.gradients.losses, self.optimizer, self.processes),
        }
        self.processes.from_first(lambda: checkpoint.save(self.checkpoint_path, state))

    def resume(self) -> None:
        """Take the state back from the checkpoint.

        Raises:
            UsageError: it is damaged, of other images, of another run, or of other processes than such a run allows.
        """
        content = self.processes.from_first(lambda: checkpoint.read(self.checkpoint_path))
        try:
            state = checkpoint.decode(content)
            differences = self.config.differences(state["config"])
            if differences:
                raise UsageError(f"{self.checkpoint_path} is of another run: {', '.join(differences)}")
            if state["images"] != self.digest:
                raise UsageError(f"{self.checkpoint_path} was made with other images than those in --data-dir")
            if (state["common"]["method"] == "DataParallel") != isinstance(self.optimizer, DataParallel):
                began = "otherwise" if isinstance(self.optimizer, DataParallel) else "with one worker a process"
                raise UsageError(
                    f"{self.checkpoint_path} is of synchronous training that began {began}, and goes on only so"
                )
            if len(state["workers"]) != self.config.workers:
                raise ValueError(f"it holds {len(state['workers'])} workers")
            if not 0 <= state["epoch"] <= self.config.epochs or not 0 <= state["step"] <= self.steps_per_epoch:
                raise ValueError(f"it stands at epoch {state['epoch']}, step {state['step']}")
            own = slice(self.here.start, self.here.stop)
            self.workers.load_state_dict({"workers": state["workers"][own]})
            self.optimizer.load_state_dict(optimizer_state(state, self.optimizer, self.here))
            self.epoch, self.step = state["epoch"], state["step"]
            self.gradients.losses.copy_(state["losses"][own])
            self.train_seconds = state["train_seconds"]
            self.interval_trace = state["interval_trace"]
            self.records = [Record(**record) for record in state["records"]]
        except UsageError:
            raise
        except Exception as error:  # it is whole, and of whoever wrote it: there is no end of what may be wrong
            raise UsageError(f"{self.checkpoint_path} is no checkpoint of this version: {error!r}") from None


def _calmer(config: Config) -> str:
    """What to change of a run that diverged; a run accepts each of it."""
    lower, longest = f"lower --lr (now {config.learning_rate:g})", config.epochs - 1
    if config.schedule != "warmup-cosine" and longest:
        return f"{lower} or give --schedule warmup-cosine --lr-warmup-epochs {min(5, longest)}"
    if config.schedule == "warmup-cosine" and config.lr_warmup_epochs < longest:
        return f"{lower} or raise --lr-warmup-epochs (now {config.lr_warmup_epochs})"
    return lower


def _generator(seed: int, stream: int) -> torch.Generator:
    """A generator for one epoch (0: for the split among the workers) of one seed."""
    return torch.Generator().manual_seed(seed * 1_000_003 + stream)


def _to(images: ImageSet, device: torch.device) -> ImageSet:
    return ImageSet(images.images.to(device), images.labels.to(device))
