"""From a Config to the objects it names: device, workers, optimizer, policy."""

import re

import torch

from fastlocal import LAMB, LARS, DiLoCo, LocalSGD, SlowMo, Workers, comm
from fastlocal.policy import (
    QSR,
    AdaComm,
    ConsensusDistance,
    FixedInterval,
    OriginalValidationLoss,
    Policy,
    PostLocal,
    ValidationLoss,
)
from fastlocal.train.config import Config
from fastlocal.train.data_parallel import DataParallel
from fastlocal.train.errors import UsageError
from fastlocal.train.model import build as build_model

Optimizer = LocalSGD | DataParallel
"""What takes the steps of a run."""


def device(config: Config) -> torch.device:
    """The device of a run; each process of a machine has a GPU of its own.

    Raises:
        UsageError: there is no such device.
    """
    name = kind_of(config.device) if config.device == "auto" else config.device
    if name.startswith("cuda:") and comm.launched_processes() > 1:
        raise UsageError(f"--device must be auto, cpu or cuda with several processes, got {name}")
    if name == "cuda" and comm.launched_processes() > 1:
        name = f"cuda:{comm.local_rank()}"
    require_device(name)
    chosen = torch.device(name)
    try:
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from None
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    return chosen


def kind_of(name: str) -> str:
    """What a run's device comes to here, cpu or cuda."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name.partition(":")[0]


def require_device(name: str) -> None:
    """Refuse a device that is not there. Takes no memory of a GPU.

    Raises:
        UsageError: it is none of auto, cpu and cuda, or PyTorch finds no such GPU.
    """
    kind, _, index = name.partition(":")
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise UsageError(f"--device must be auto, cpu, cuda or cuda:1 ..., got {name}")
    found = torch.cuda.device_count()
    if kind == "cuda" and int(index or 0) >= found:
        raise UsageError(f"--device {name} cannot be used: PyTorch finds {found or 'no'} CUDA devices")


def workers(config: Config, number: int, on: torch.device) -> Workers:
    """This process's workers, equal at first, channels_last, on their device."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = build_model(config.model)
    return Workers(model.to(on, memory_format=torch.channels_last), number)  # pyright: ignore[reportCallIssue]


def optimizer(config: Config, over: Workers, total_steps: int, group: comm.Group | None = None) -> Optimizer:
    """The wrapper that the config asks for, around its inner optimizer.

    Synchronous training is DistributedDataParallel with one worker a process, and otherwise a LocalSGD whose
    gradients are averaged in every step to the end.

    Args:
        config: the run.
        over: the workers of this process.
        total_steps: local steps of the whole run.
        group: the processes, if there are several.
    """
    inner = _inner(config, over)
    if config.method == "sync" and group is not None and len(over) == 1:
        return DataParallel(inner, over, group)
    wire = {"fp32": None, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}[config.wire_dtype]
    match config.method:
        case "sync":
            return LocalSGD(inner, over, 1, warmup_steps=total_steps)
        case "local-sgd":
            return LocalSGD(
                inner,
                over,
                policy(config, total_steps),
                inner_state=config.inner_state,
                warmup_steps=config.warmup_steps,
                wire_dtype=wire,
                overlap_steps=config.overlap_steps,
            )
        case "slowmo" | "diloco":
            outer = SlowMo if config.method == "slowmo" else DiLoCo
            values = config.resolved()
            return outer(
                inner,
                over,
                policy(config, total_steps),
                slow_lr=values["slow_lr"],
                slow_momentum=values["slow_momentum"],
                inner_state=config.inner_state,
                warmup_steps=config.warmup_steps,
                wire_dtype=wire,
                overlap_steps=config.overlap_steps,
            )


def _inner(config: Config, over: Workers) -> torch.optim.Optimizer:
    """The optimizer of the local steps. Every tensor has the decay and so, with lars and lamb, a trust ratio."""
    lr, decay = config.learning_rate, config.decay
    match config.optimizer:
        case "sgd":
            return torch.optim.SGD(over.parameters(), lr=lr, momentum=config.momentum, weight_decay=decay, fused=True)
        case "adamw":
            return torch.optim.AdamW(over.parameters(), lr=lr, weight_decay=decay, fused=True)
        case "lars":
            return LARS(over.parameters(), lr=lr, momentum=config.momentum, weight_decay=decay)
        case "lamb":
            return LAMB(over.parameters(), lr=lr, weight_decay=decay)


def policy(config: Config, total_steps: int) -> Policy:
    """What chooses the interval."""
    match config.policy:
        case "fixed":
            return FixedInterval(config.interval)
        case "post-local":
            return PostLocal(config.post_local_steps, config.interval)
        case "val-loss" | "val-loss-original":
            rule = ValidationLoss if config.policy == "val-loss" else OriginalValidationLoss
            return rule(
                config.interval,
                total_epochs=-(-config.epochs // config.eval_every),
                minimum=config.min_interval,
                maximum=config.max_interval,
            )
        case "qsr":
            warmup = config.lr_warmup_epochs if config.schedule == "warmup-cosine" else 0
            return QSR(
                config.interval,
                config.resolved()["qsr_alpha"],
                maximum=config.max_interval,
                start_step=warmup * total_steps // config.epochs,
            )
        case "adacomm":
            return AdaComm(config.interval, maximum=config.max_interval)
        case "consensus":
            assert config.consensus_target is not None  # Config refuses it
            return ConsensusDistance(
                config.consensus_target,
                initial=config.interval,
                minimum=config.min_interval,
                maximum=config.max_interval,
            )
