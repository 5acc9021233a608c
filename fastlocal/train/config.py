"""Every knob of a training run, its default and its unit, once."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from fastlocal.train.errors import UsageError

Dataset = Literal["synthetic", "cifar100"]
Method = Literal["sync", "local-sgd", "slowmo", "diloco"]
PolicyName = Literal["fixed", "post-local", "val-loss", "val-loss-original", "qsr", "adacomm", "consensus"]
OptimizerName = Literal["sgd", "adamw", "lars", "lamb"]
ModelName = Literal["lenet", "resnet18"]
Schedule = Literal["cosine", "warmup-cosine", "constant"]
Precision = Literal["fp32", "bf16"]
WireDtype = Literal["fp32", "bf16", "fp8"]

_OUTER_DEFAULTS = {"slowmo": (1.0, 0.5), "diloco": (0.7, 0.9)}  # slow_lr, slow_momentum

_LOCAL = ("local-sgd", "slowmo", "diloco")
_BOUNDED_BELOW = ("val-loss", "val-loss-original", "consensus")
USED_WITH: dict[str, tuple[str, tuple[str, ...]]] = {
    "download": ("dataset", ("cifar100",)),
    "synthetic_images": ("dataset", ("synthetic",)),
    "policy": ("method", _LOCAL),
    "interval": ("method", _LOCAL),
    "warmup_steps": ("method", _LOCAL),
    "inner_state": ("method", _LOCAL),
    "wire_dtype": ("method", _LOCAL),
    "overlap_steps": ("method", _LOCAL),
    "slow_lr": ("method", ("slowmo", "diloco")),
    "slow_momentum": ("method", ("slowmo", "diloco")),
    "min_interval": ("policy", _BOUNDED_BELOW),
    "max_interval": ("policy", (*_BOUNDED_BELOW, "qsr", "adacomm")),
    "post_local_steps": ("policy", ("post-local",)),
    "qsr_alpha": ("policy", ("qsr",)),
    "consensus_target": ("policy", ("consensus",)),
    "momentum": ("optimizer", ("sgd", "lars")),
    "lr_warmup_epochs": ("schedule", ("warmup-cosine",)),
}
"""Fields that only some runs have a use for: the field that decides, and the values of it that do."""

NOT_PART_OF_A_RUN = ("data_dir", "download", "device", "threads", "out", "resume", "checkpoint_seconds")
"""Fields that may change when a run is resumed."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """One training run."""

    dataset: Dataset = "synthetic"
    """Images to train on: made from a seed, or CIFAR-100 from --data-dir."""

    data_dir: Path = Path("data")
    """Folder that holds cifar-100-python/{train,test}."""

    download: bool = False
    """Fetch CIFAR-100 into --data-dir first (needs torchvision)."""

    synthetic_images: int = 12_000
    """Training and validation images of the synthetic set; a sixth as many are added for the test."""

    method: Method = "local-sgd"
    """What happens between workers: gradients averaged in every step (sync), or parameters once a round."""

    policy: PolicyName = "fixed"
    """What chooses the local steps of the next round; val-loss-original is the rule of the student study
    that fastlocal grew from, without smoothing."""

    interval: int = 16
    """Local steps between two syncs; where the policy starts from."""

    min_interval: int = 4
    """Lower bound of the interval for val-loss, val-loss-original and consensus."""

    max_interval: int = 64
    """Upper bound of the interval for every policy but fixed and post-local."""

    post_local_steps: int = 0
    """Local steps, each with a sync, after which the post-local policy takes --interval."""

    qsr_alpha: float | None = None
    """alpha of the qsr policy: interval (alpha/lr)^2. Default: the one that starts at --interval."""

    consensus_target: float | None = None
    """The drift that the consensus policy steers to; it has no default."""

    warmup_steps: int = 0
    """Average gradients instead of parameters for so many steps first."""

    workers: int = 4
    """Workers, K; they share the images of an epoch."""

    inner_state: Literal["keep", "reset", "average"] = "keep"
    """What a sync does to the inner optimizer's momentum."""

    wire_dtype: WireDtype = "fp32"
    """What a sync sends: the parameters, or how far they came since the last, in half or a quarter of the bytes."""

    overlap_steps: int = 0
    """Local steps of the next round that the messages of a sync may take."""

    slow_lr: float | None = None
    """Outer step size. Default: 1 for slowmo, 0.7 for diloco."""

    slow_momentum: float | None = None
    """Outer momentum. Default: 0.5 for slowmo, 0.9 for diloco."""

    optimizer: OptimizerName = "sgd"
    """The inner optimizer."""

    lr: float | None = None
    """Peak learning rate. Default: 0.01 times the workers for sgd, 0.001 for adamw, 8 for lars, 0.01 for lamb."""

    momentum: float = 0.9
    """Momentum of sgd and lars."""

    weight_decay: float | None = None
    """Weight decay. Default: 0.001 for sgd and lars, 0.1 for adamw, 0.01 for lamb."""

    schedule: Schedule = "cosine"
    """How the learning rate changes from step to step; both cosines end at 0."""

    lr_warmup_epochs: int = 5
    """Epochs of linear rise in warmup-cosine."""

    model: ModelName = "lenet"
    """The network."""

    batch_size: int = 64
    """Images of one worker in one step."""

    epochs: int = 150
    """Passes over the training images, by all workers together; a last batch that is not full is left out."""

    eval_every: int = 1
    """Epochs between two evaluations; each closes the round under way and evaluates the averaged model."""

    test: bool = True
    """Evaluate the test images once, at the end. A search does not."""

    precision: Precision = "fp32"
    """fp32, or bf16 by automatic mixed precision."""

    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto is CUDA if there is a GPU."""

    threads: int | None = None
    """CPU threads of PyTorch. Default: its own choice."""

    seed: int = 0
    """Seed of the initial weights, the order of the images and their augmentation."""

    out: Path | None = None
    """Folder of the run. Default: runs/ and a name made of dataset, model, method, policy, workers and seed."""

    resume: bool = False
    """Go on from the checkpoint in --out, bit by bit as if the run had not been stopped; without one, begin."""

    checkpoint_seconds: float = 60.0
    """Seconds between two checkpoints within an epoch; each epoch ends with one. Several processes look at the clock
    every 32 steps."""

    def __post_init__(self) -> None:
        for name in (
            "synthetic_images",
            "interval",
            "min_interval",
            "max_interval",
            "workers",
            "batch_size",
            "epochs",
            "eval_every",
        ):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
            _require(getattr(self, name) < 2**63, name, getattr(self, name), "below 2^63")
        _require(self.synthetic_images <= 10**7, "synthetic_images", self.synthetic_images, "at most 10 million")
        steps = "warmup_steps", "overlap_steps", "post_local_steps"
        for name in (*steps, "lr_warmup_epochs", "checkpoint_seconds", "seed"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        for name in (*steps, "lr_warmup_epochs"):
            _require(getattr(self, name) < 2**63, name, getattr(self, name), "below 2^63")
        for name in ("lr", "qsr_alpha", "consensus_target", "slow_lr"):
            value = getattr(self, name)
            _require(value is None or 0 < value <= 1e30, name, value, "positive and at most 1e30")
        for name in ("momentum", "slow_momentum"):
            value = getattr(self, name)
            _require(value is None or 0 <= value < 1, name, value, "in [0, 1)")
        decay = self.weight_decay
        _require(
            decay is None or (decay >= 0 and math.isfinite(decay)), "weight_decay", decay, "at least 0 and finite"
        )
        _require(self.threads is None or 1 <= self.threads <= 1024, "threads", self.threads, "in [1, 1024]")
        _require(self.seed < 2**40, "seed", self.seed, "below 2^40")
        if self.policy in _BOUNDED_BELOW and self.max_interval < self.min_interval:
            raise UsageError(
                f"--max-interval must be at least --min-interval {self.min_interval}, got {self.max_interval}"
            )
        if self.policy in _BOUNDED_BELOW and not self.min_interval <= self.interval <= self.max_interval:
            raise UsageError(
                f"--interval must lie between --min-interval {self.min_interval} and --max-interval "
                f"{self.max_interval} for --policy {self.policy}, got {self.interval}"
            )
        if self.policy in ("qsr", "adacomm") and self.interval > self.max_interval:
            raise UsageError(f"--interval must be at most --max-interval {self.max_interval}, got {self.interval}")
        if self.policy == "consensus" and self.consensus_target is None:
            raise UsageError("--policy consensus needs --consensus-target, the drift to steer to")
        if self.policy == "consensus" and self.overlap_steps:
            raise UsageError(
                f"--policy consensus decides from the drift of the last sync, which is not known yet with "
                f"--overlap-steps {self.overlap_steps}"
            )
        if self.method == "sync" and self.policy != "fixed":
            raise UsageError(f"--method sync averages in every step: --policy {self.policy} has no use with it")
        self._refuse_what_has_no_use()
        if self.schedule == "warmup-cosine" and self.lr_warmup_epochs >= self.epochs:
            raise UsageError(
                f"--lr-warmup-epochs must be below --epochs {self.epochs} for --schedule warmup-cosine, "
                f"got {self.lr_warmup_epochs}"
            )

    def _refuse_what_has_no_use(self) -> None:
        """A field that this run would ignore keeps its default: anything else is a misunderstanding."""
        for field in fields(self):
            if getattr(self, field.name) != field.default and not has_use(field.name, vars(self)):
                decides, values = USED_WITH[field.name]
                listed = " or ".join(", ".join(values).rsplit(", ", 1))
                raise UsageError(f"{_flag(field.name)} has no use without {_flag(decides)} {listed}")

    @property
    def learning_rate(self) -> float:
        """The peak learning rate, the default resolved."""
        if self.lr is not None:
            return self.lr
        return {"sgd": 0.01 * self.workers, "adamw": 0.001, "lars": 8.0, "lamb": 0.01}[self.optimizer]

    @property
    def decay(self) -> float:
        """The weight decay, the default resolved."""
        if self.weight_decay is not None:
            return self.weight_decay
        return {"sgd": 1e-3, "adamw": 0.1, "lars": 1e-3, "lamb": 0.01}[self.optimizer]

    def resolved(self) -> dict[str, float]:
        """What the run uses where a field is None, and what was given where it is not; nothing it has no use for."""
        values = {"lr": self.learning_rate, "weight_decay": self.decay}
        if self.method in _OUTER_DEFAULTS:
            slow_lr, slow_momentum = _OUTER_DEFAULTS[self.method]
            values["slow_lr"] = slow_lr if self.slow_lr is None else self.slow_lr
            values["slow_momentum"] = slow_momentum if self.slow_momentum is None else self.slow_momentum
        if self.policy == "qsr":
            values["qsr_alpha"] = self.qsr_alpha or self.learning_rate * self.interval**0.5
        return values

    @property
    def folder(self) -> Path:
        """Where the run is kept, the default resolved."""
        if self.out is not None:
            return self.out
        method = self.method if self.method == "sync" else f"{self.method}-{self.policy}"
        return Path("runs") / f"{self.dataset}-{self.model}-{method}-k{self.workers}-s{self.seed}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON and checkpoints."""
        return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}

    def differences(self, saved: dict[str, Any]) -> list[str]:
        """What would make a resumed run another run: "--lr 0.1 (it was 0.2)", one entry a field.

        A field younger than the saved run had its default. A default is what it comes to: --lr 0.04 goes on with a
        run of four workers that was given none.
        """
        mine = self.as_dict()
        before = {field.name: saved.get(field.name, field.default) for field in fields(self)}
        return [
            f"{_flag(name)} {_said(mine[name])} (it was {_said(before[name])})"
            for name in before
            if name not in NOT_PART_OF_A_RUN and self._value(name, mine[name]) != self._value(name, before[name])
        ]

    def _value(self, name: str, given: Any) -> Any:
        """What a field comes to beside the others of this run."""
        has_default = given is None and name in self.resolved()
        return replace(self, **{name: None}).resolved()[name] if has_default else given


def has_use(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a run of these fields has a use for one of them."""
    decides, values = USED_WITH.get(name, (None, ()))
    return decides is None or config[decides] in values


def _require(holds: bool, name: str, value: Any, rule: str) -> None:
    if not holds:
        raise UsageError(f"{_flag(name)} must be {rule}, got {value}")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _said(value: Any) -> str:
    return "the default" if value is None else str(value)
