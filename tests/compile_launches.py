"""Every launch the library makes, compiled for a GPU that need not be here, with the arguments it is launched with.

Run by test_kernel_launches.py in a process of its own, without Triton's interpreter. Triton compiles a kernel anew
for integers that are 1 or multiples of 16 and for addresses that are; the interpreter knows nothing of that. Here
the library's own launchers are called on CPU tensors, and Triton stops short of the launch. One JSON line a case.
"""

import json
import runpy
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fastlocal.kernels import average, slowmo, trust_ratio
from fastlocal.reference.trust_ratio import LambOptions, LarsOptions

ROOT = Path(__file__).resolve().parent.parent
launches: list[str] = []


class NoDevice:
    """What Triton asks of a driver before a launch."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only(function: Any, grid: Any) -> Any:
    def launch(*arguments: Any, **constants: Any) -> None:
        assert all(isinstance(n, int) and n > 0 for n in grid), grid
        kernel = function.run(*arguments, grid=grid, warmup=True, **constants)
        assert kernel.asm["cubin"]
        launches.append(kernel.hash)

    return launch


def tensors(shapes: Any, dtype: torch.dtype, offset: int = 0) -> list[torch.Tensor]:
    made = []
    for shape in shapes:
        size = torch.Size(shape).numel()
        made.append(torch.zeros(size + offset, dtype=dtype)[offset:].view(shape))
    return made


def lamb(shapes: Any, dtype: torch.dtype, options: LambOptions, *, offset: int = 0, masters: bool = False) -> None:
    p, g = tensors(shapes, dtype, offset), tensors(shapes, dtype, offset)
    m, v, w = (tensors(shapes, torch.float32) for _ in range(3))
    steps, scalar = [torch.zeros(()) for _ in p], torch.zeros(())
    norm = trust_ratio.grad_norm(g, {})
    found = scalar if options.maximize else None
    trust_ratio.lamb_(
        p, g, m, v, steps, options, {}, w if masters else None, norm=norm, grad_scale=found, found_inf=found
    )


def lars(shapes: Any, dtype: torch.dtype, options: LarsOptions, *, offset: int = 0, masters: bool = False) -> None:
    p, g = tensors(shapes, dtype, offset), tensors(shapes, dtype, offset)
    buffers = tensors(shapes, torch.float32) if options.momentum else [None for _ in p]
    steps = [torch.zeros(()) if options.dampening and options.momentum else None for _ in p]
    found = torch.zeros(()) if options.maximize else None
    w = tensors(shapes, torch.float32) if masters else None
    trust_ratio.lars_(p, g, buffers, steps, options, {}, w, grad_scale=found, found_inf=found)


def in_one_launch(step: Callable[[], None]) -> None:
    """The step on a device where one launch was measured to be the fastest."""
    with mock.patch.object(trust_ratio, "queue_constants", return_value=(1024, 8, 64)):
        step()


def rows(k: int, n: int, dtype: torch.dtype, known: bool) -> None:
    x, weights = torch.zeros(k, n, dtype=dtype), torch.ones(k)
    parts, anchor, slow = torch.zeros(k, -(-n // 1024)), torch.zeros(n), torch.zeros(n)
    mean = torch.zeros(n) if known else None
    average.finite_rows(x)
    average.average_(x, weights, parts, mean)
    slowmo.outer_step_(x, anchor, slow, weights, parts, mean, direct=0.5, momentum=1.0, decay=0.0, gain=1.0)


def roofline() -> None:
    """The launches that bench/roofline.py writes out itself."""
    module = runpy.run_path(str(ROOT / "bench" / "roofline.py"))
    every = [
        module["rows_launches"](2, 2**14, torch.bfloat16, "cpu"),
        module["optimizer_launches"]([2**14], torch.bfloat16, "cpu"),
    ]
    for by_kernel in every:
        for kernel, (launch, _) in by_kernel.items():
            launch(*module["CONFIGURATIONS"].get(kernel, module["OTHERS"])[0])


LAMB = LambOptions(
    lr=0.1, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01, bias_correction=True, grad_averaging=True,
    max_grad_norm=None, trust_clip=None, decay="update", adapt="all", maximize=False,
)  # fmt: skip
LARS = LarsOptions(
    lr=0.1, momentum=0.9, dampening=0.0, weight_decay=0.01, nesterov=False, trust_coefficient=1e-3, eps=1e-8,
    trust_clip=False, norm="sum", momentum_form="torch", adapt="all", maximize=False,
)  # fmt: skip
EVERY_LAMB = replace(
    LAMB,
    betas=(0.0, 0.0),
    bias_correction="step",
    max_grad_norm=1.0,
    trust_clip=(0.0, 10.0),
    decay="decoupled",
    maximize=True,
)
EVERY_LARS = replace(LARS, dampening=0.5, trust_clip=True, norm="joint", momentum_form="lr_in_buffer", maximize=True)
SIXTEEN = [(5000,), (3,), (0,), (), (2, 3), (1,), (8,), (9,)] * 2  # a number of tensors that is a multiple of 16
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
CASES: dict[str, Callable[[], None]] = {
    "lamb": lambda: lamb(SIXTEEN, FP32, LAMB),
    "lamb of one tensor": lambda: lamb([(5000,)], FP32, LAMB),
    "lamb of one number": lambda: lamb([()], FP32, LAMB),
    "lamb, every option, unaligned": lambda: lamb([(5000,), (3,)], BF16, EVERY_LAMB, offset=1),
    "lamb with masters": lambda: lamb([(5000,), (3,)], FP16, LAMB, masters=True),
    "lars": lambda: lars(SIXTEEN, FP32, LARS),
    "lars of one tensor, no momentum": lambda: lars([(5000,)], FP32, replace(LARS, momentum=0.0)),
    "lars, every option, unaligned": lambda: lars([(5000,), (3,)], BF16, EVERY_LARS, offset=1),
    "lars with masters, nesterov": lambda: lars([(5000,), (3,)], FP16, replace(LARS, nesterov=True), masters=True),
    "lamb in one launch": lambda: in_one_launch(lambda: lamb(SIXTEEN, FP32, LAMB)),
    "lamb in one launch, every option, unaligned": lambda: in_one_launch(
        lambda: lamb([(5000,), (3,)], BF16, EVERY_LAMB, offset=1)
    ),
    "lamb in one launch, one tensor, masters": lambda: in_one_launch(lambda: lamb([(3,)], FP16, LAMB, masters=True)),
    "lars in one launch": lambda: in_one_launch(lambda: lars(SIXTEEN, FP32, LARS)),
    "lars in one launch, every option, unaligned": lambda: in_one_launch(
        lambda: lars([(5000,), (3,)], BF16, EVERY_LARS, offset=1)
    ),
    "lars in one launch, one tensor, masters": lambda: in_one_launch(
        lambda: lars([(3,)], FP16, replace(LARS, momentum=0.0), masters=True)
    ),
    "a row": lambda: rows(1, 4096, FP32, known=True),
    "a row of one number": lambda: rows(1, 1, FP32, known=False),
    "rows": lambda: rows(3, 4096, BF16, known=False),
    "rows of odd length": lambda: rows(2, 1500, FP16, known=True),
    "roofline": roofline,
}


def main(capability: int) -> None:
    driver.set_active(NoDevice(capability))  # pyright: ignore[reportArgumentType]
    JITFunction.__getitem__ = compile_only  # pyright: ignore[reportAttributeAccessIssue]
    for name, case in CASES.items():
        before = len(launches)
        case()
        print(json.dumps({"case": name, "launches": len(launches) - before}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
