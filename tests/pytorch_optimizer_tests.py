"""Runs PyTorch's own optimizer tests, its test/test_optim.py, on LARS and LAMB.

    python tests/pytorch_optimizer_tests.py PYTORCH/test/test_optim.py

Run by test_pytorch_optimizer_tests.py in a process of its own: the classes that PyTorch tests are described in a list
that must be replaced before its file is imported. Needs the package expecttest.

Not run, and why:
- complex parameters: refused, since the norm of a complex tensor is not that of its real and imaginary parts;
- tensors of 2**32 elements: they take 64 GiB and more of a GPU's memory;
- defaults_changed_to_foreach: it replaces a function of torch.optim's own modules;
- state_dict_cross_device, once state_dict_with_cuda_params: it wants step counts on the CPU, where the kernels could
  not count;
- set_default_dtype_works_with_foreach: it wants step counts in float64 where that is the default dtype, the kernels
  read float32;
- float64 with fused=True, also among others in mixed_device_dtype: the kernels step no float64;
- LARS with a scheduler and the default rate: without decay that is plain SGD with a rate of 1.
Without a GPU, PyTorch itself skips the tests of fused steps, of peak memory and of moving state between devices.
"""

import importlib.util
import os
import sys
import unittest
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.testing._internal import common_optimizers as common
from torch.testing._internal.opinfo.core import DecorateInfo

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from fastlocal import LAMB, LARS  # noqa: E402 - a checkout nobody installed must be testable

# λ = 0 with adapt "decayed" takes plain steps, which zero gradients leave alone, as PyTorch's tests want.
SHARED: list[dict[str, Any]] = [
    {},
    {"lr": 0.01},
    {"lr": torch.tensor(0.001)},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "maximize": True},
    {"weight_decay": 0.0, "adapt": "all"},
    {"weight_decay": 0.1, "adapt": "matrices"},
]
LAMB_ONLY: list[dict[str, Any]] = [
    {"max_grad_norm": 1.0},
    {"bias_correction": "step", "weight_decay": 0.1},
    {"decay": "l2", "weight_decay": 0.1},
    {"decay": "decoupled", "weight_decay": 0.1, "grad_averaging": False},
    {"trust_clip": (0.1, 5.0), "weight_decay": 0.1},
]
LARS_ONLY: list[dict[str, Any]] = [
    {"momentum": 0.0},
    {"nesterov": True, "weight_decay": 0.1},
    {"dampening": 0.5, "weight_decay": 0.1},
    {"norm": "joint", "trust_clip": True, "weight_decay": 0.1},
    {"momentum_form": "lr_in_buffer", "weight_decay": 0.1},
]
WRONG: dict[type, list[tuple[dict[str, Any], str]]] = {
    LAMB: [
        ({"betas": (1.0, 0.0)}, "Invalid beta parameter at index 0: 1.0"),
        ({"weight_decay": -1}, "Invalid weight_decay value: -1"),
    ],
    LARS: [
        ({"momentum": -0.5}, r"momentum must be in \[0, 1\), got -0.5"),
        ({"eps": -1e-8}, "Invalid epsilon value: -1e-08"),
    ],
}


def inputs(optimizer: type, device: object, dtype: object = None) -> list[common.OptimizerInput]:
    """Options to test: LAMB's decay always named, since PyTorch's tests take an unnamed one for 0; LARS with a rate
    at which their small problems neither stall nor diverge."""
    own, start = (LAMB_ONLY, {"weight_decay": 0.01}) if optimizer is LAMB else (LARS_ONLY, {"lr": 0.01})
    return [common.OptimizerInput(None, {**start, **kwargs}, str(kwargs)) for kwargs in [*SHARED, *own]]


def error_inputs(optimizer: type, device: object, dtype: object) -> list[common.ErrorOptimizerInput]:
    """What every optimizer must refuse, and what ours must."""
    wrong = [
        common.ErrorOptimizerInput(common.OptimizerInput(None, kwargs, text), error_type=ValueError, error_regex=text)
        for kwargs, text in WRONG[optimizer]
    ]
    return [*common.get_error_inputs_for_all_optims(device, dtype), *wrong]


SKIPPED = {
    "test_complex": "complex parameters are refused",
    "test_complex_2d": "complex parameters are refused",
    "test_fused_large_tensor": "2**32 elements take 64 GiB on a GPU",
    "test_foreach_large_tensor": "2**32 elements take 72 GB on a GPU",
    "test_defaults_changed_to_foreach": "looks for a function of torch.optim's own modules",
    "test_state_dict_with_cuda_params": "wants step counts on the CPU; the kernels count on the parameter's device",
    "test_state_dict_cross_device": "wants step counts on the CPU; the kernels count on the parameter's device",
    "test_set_default_dtype_works_with_foreach": "wants step counts in the default dtype; the kernels read float32",
}
LARS_SKIPPED = {
    "test_complex": "complex parameters are refused",
    "test_complex_2d": "complex parameters are refused",
    "test_param_group_with_lrscheduler_goes_right_direction": "without decay the default rate of 1 is plain SGD's",
}


def info(optimizer: type) -> common.OptimizerInfo:
    """One of ours, as PyTorch's tests want it described."""
    return common.OptimizerInfo(
        optimizer,  # pyright: ignore[reportArgumentType] - PyTorch means the class
        optim_inputs_func=partial(inputs, optimizer),
        optim_error_inputs_func=partial(error_inputs, optimizer),
        supported_impls=("foreach", "fused"),
        supports_fused_on=("cuda", "cpu") if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda",),
        not_og_supported_flags=("foreach", "fused", "maximize", "capturable", "master_weights"),
        has_capturable_arg=True,
        supports_complex=False,
        skips=(
            *(
                DecorateInfo(unittest.skip(reason), "TestOptimRenewed", test)
                for test, reason in (SKIPPED if optimizer is LAMB else SKIPPED | LARS_SKIPPED).items()
            ),
            DecorateInfo(
                unittest.skip("the kernels step no float64"),
                "TestOptimRenewed",
                "test_fused_matches_forloop",
                dtypes=[torch.float64],
            ),
            DecorateInfo(
                unittest.skip("the kernels step no float64"),
                "TestOptimRenewed",
                "test_mixed_device_dtype",
                active_if=lambda kwargs: kwargs["impl"] == "fused",
            ),
        ),
    )


def main() -> None:
    """Run the class TestOptimRenewed; the exit status says whether all passed."""
    path = Path(sys.argv[1])
    common.optim_db[:] = [info(LAMB), info(LARS)]
    sys.path.insert(0, str(path.parent))  # the file imports its neighbours
    spec = importlib.util.spec_from_file_location("pytorch_test_optim", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["pytorch_test_optim"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    loader = unittest.TestLoader()
    generated = [value for name, value in vars(module).items() if name.startswith("TestOptimRenewed")]
    suite = unittest.TestSuite(loader.loadTestsFromTestCase(case) for case in generated)
    result = unittest.TextTestRunner(verbosity=1).run(suite)
    failed = len(result.failures) + len(result.errors)
    print(f"{result.testsRun - failed - len(result.skipped)} passed, {failed} failed, {len(result.skipped)} skipped")
    for _, reason in result.skipped:
        print("skipped:", reason)
    sys.exit(failed != 0 or result.testsRun == len(result.skipped))


if __name__ == "__main__":
    main()
