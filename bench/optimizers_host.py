"""How long the host takes to issue a fused LAMB or LARS step, the kernel launches themselves left out.

    python bench/optimizers_host.py [--tensors 400] [--rounds 200] [--beside ../another-checkout] [--out FILE]

Every kernel is replaced by one that does nothing, so that this needs no GPU; the tensors lie on the CPU.
"kept" gradients keep their addresses from step to step; "moved" ones alternate between two sets, which is what
an allocator that hands out other memory looks like. With --beside, another checkout is stepped in turn with
this one in the same process, so that a noisy neighbour hits both.

"reads alone" is the floor of a step that trusts nothing: each p.grad, the address of every tensor and its layout, the
dtype of every weight and gradient, the size and pending sign of every gradient, and autograd's version counters.
PyTorch has no call that reads them of a whole list.
"torch" is torch.optim.AdamW(fused=True) beside LAMB, and SGD(fused=True) with momentum beside LARS, their kernels
left out likewise. Prints a line a case.
"""

import argparse
import importlib
import os
import statistics
import sys
import time
from operator import attrgetter
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # the door to the kernels then takes CPU tensors

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from fastlocal.bench import machine  # noqa: E402 - a checkout nobody installed must be measurable

CASES: tuple[tuple[str, dict[str, Any]], ...] = (("LARS", {}), ("LAMB", {}), ("LAMB", {"max_grad_norm": 1.0}))


class NoKernel:
    """Launches nothing."""

    def __init__(self, kernel: Any):
        self.arg_names = kernel.arg_names

    def __getitem__(self, grid: object) -> Any:
        return lambda *arguments, **constants: None


def load(checkout: Path) -> dict[str, Any]:
    """The modules of a checkout's package by name, the kernels replaced."""
    for name in [n for n in sys.modules if n.split(".")[0] == "fastlocal"]:
        del sys.modules[name]
    sys.path.insert(0, str(checkout))
    importlib.import_module("fastlocal")
    launcher = importlib.import_module("fastlocal.kernels.trust_ratio")
    sys.path.pop(0)
    for module in (launcher, launcher.lamb, launcher.lars):
        for name, kernel in list(vars(module).items()):
            if name.endswith("_kernel"):
                setattr(module, name, NoKernel(kernel))
    return {n: m for n, m in sys.modules.items() if n.split(".")[0] == "fastlocal"}


def torchs_own(label: str, params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """PyTorch's fused optimizer that is most like ours, its kernels replaced."""
    for name in ("_fused_adamw_", "_fused_sgd_", "_foreach_add_"):
        setattr(torch, name, lambda *arguments, **options: None)
    if label == "LAMB":
        return torch.optim.AdamW(params, lr=1e-3, weight_decay=0.01, fused=True)
    return torch.optim.SGD(params, lr=1e-3, momentum=0.9, weight_decay=0.01, fused=True)


class ReadsAlone:
    """What a step must ask of its tensors, and nothing else."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.params = list(optimizer.state)
        self.state = [t for s in optimizer.state.values() for t in s.values()]
        self.moments = [t for t in self.state if t.dim()]

    def step(self) -> None:
        """Read it all once."""
        grads: Any = [p.grad for p in self.params]
        for tensors in (self.params, grads, self.state):
            list(map(torch.Tensor.data_ptr, tensors))
        for tensors in (self.params, grads):
            list(map(attrgetter("dtype"), tensors))
        list(map(torch.Tensor.numel, grads))
        any(map(torch.Tensor.is_neg, grads))
        list(map(torch.Tensor.dim, self.params))
        for tensors in (self.params, grads, self.moments):
            all(map(torch.Tensor.is_contiguous, tensors))
        torch.autograd.graph.increment_version(self.params)


def measure(
    checkouts: dict[str, dict[str, Any]], label: str, options: dict[str, Any], tensors: int, rounds: int, moved: bool
) -> dict[str, dict[str, float]]:
    """Microseconds a step of each checkout and of the reads alone, in turn."""
    steppers: dict[str, tuple[Any, list, list]] = {}
    for checkout, modules in checkouts.items():
        sys.modules.update(modules)
        params = [torch.nn.Parameter(torch.randn(8)) for _ in range(tensors)]
        grads = [[torch.randn(8) for _ in params] for _ in range(2)]
        optimizer = getattr(modules["fastlocal"], label)(params, weight_decay=0.01, fused=True, **options)
        steppers[checkout] = (optimizer, params, grads)
    _, params, grads = steppers["this"]
    steppers["torch"] = (torchs_own(label, params), params, grads)
    times: dict[str, list[float]] = {name: [] for name in (*steppers, "reads alone")}
    for number in range(rounds + 4):
        for checkout, (optimizer, params, grads) in list(steppers.items()):
            for p, g in zip(params, grads[number % 2 if moved else 0], strict=True):
                p.grad = g
            if checkout in checkouts:
                sys.modules.update(checkouts[checkout])  # a step imports the kernels when it needs them
            start = time.perf_counter()
            optimizer.step()
            if number >= 4:
                times[checkout].append((time.perf_counter() - start) * 1e6)
        if number == 0:
            optimizer, params, grads = steppers["this"]
            steppers["reads alone"] = (ReadsAlone(optimizer), params, grads)
    return {
        name: {"median_us": round(statistics.median(t), 1), "min_us": round(min(t), 1)} for name, t in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensors", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--beside", type=Path, help="another checkout of fastlocal")
    parser.add_argument("--out", type=Path, help="file to append a JSON line to")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    paths = {"this": ROOT} | ({} if arguments.beside is None else {"beside": arguments.beside})
    checkouts = {name: load(path) for name, path in paths.items()}
    record: dict[str, Any] = {
        **machine.origin("cpu"),
        "tensors": arguments.tensors,
        "rounds": arguments.rounds,
        "rows": {},
    }
    for label, options in CASES:
        for moved in (False, True):
            name = " ".join([label, *(f"{k}={v}" for k, v in options.items()), "moved" if moved else "kept"])
            rows = measure(checkouts, label, options, arguments.tensors, arguments.rounds, moved)
            record["rows"][name] = rows
            medians = ", ".join(f"{c} {row['median_us']:.0f} us" for c, row in rows.items())
            print(f"{name:40} {arguments.tensors} tensors: {medians}")
    machine.append_rows(arguments.out, record)


if __name__ == "__main__":
    main()
