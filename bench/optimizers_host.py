"""How long the host takes to issue a fused LAMB or LARS step, the kernel launches themselves left out.

    python bench/optimizers_host.py [--tensors 400] [--rounds 200] [--beside ../another-checkout]

Every kernel is replaced by one that does nothing, so that this needs no GPU; the tensors lie on the CPU.
"kept" gradients keep their addresses from step to step; "moved" ones alternate between two sets, which is what
an allocator that hands out other memory looks like. With --beside, another checkout is stepped in turn with
this one in the same process, so that a noisy neighbour hits both.
"""

import argparse
import importlib
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # the door to the kernels then takes CPU tensors

import torch

ROOT = Path(__file__).resolve().parent.parent


class NoKernel:
    """Launches nothing."""

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
        for name in [n for n in vars(module) if n.endswith("_kernel")]:
            setattr(module, name, NoKernel())
    return {n: m for n, m in sys.modules.items() if n.split(".")[0] == "fastlocal"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensors", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--beside", type=Path, help="another checkout of fastlocal")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    paths = {"this": ROOT} | ({} if arguments.beside is None else {"beside": arguments.beside})
    checkouts = {name: load(path) for name, path in paths.items()}
    for label, options in (("LARS", {}), ("LAMB", {}), ("LAMB", {"max_grad_norm": 1.0})):
        for moved in (False, True):
            steps = {}
            for checkout, modules in checkouts.items():
                sys.modules.update(modules)
                package = modules["fastlocal"]
                params = [torch.nn.Parameter(torch.randn(8)) for _ in range(arguments.tensors)]
                grads = [[torch.randn(8) for _ in params] for _ in range(2)]
                optimizer = getattr(package, label)(params, weight_decay=0.01, fused=True, **options)
                steps[checkout] = (optimizer, params, grads)
            times: dict[str, list[float]] = {checkout: [] for checkout in steps}
            for number in range(arguments.rounds + 4):
                for checkout, (optimizer, params, grads) in steps.items():
                    for p, g in zip(params, grads[number % 2 if moved else 0], strict=True):
                        p.grad = g
                    sys.modules.update(checkouts[checkout])  # a step imports the kernels when it needs them
                    start = time.perf_counter()
                    optimizer.step()
                    if number >= 4:
                        times[checkout].append((time.perf_counter() - start) * 1e6)
            name = f"{label} {options or ''} {'moved' if moved else 'kept'} gradients"
            medians = ", ".join(f"{c} {statistics.median(t):.0f} us" for c, t in times.items())
            print(f"{name:50} {arguments.tensors} tensors: {medians}")


if __name__ == "__main__":
    main()
