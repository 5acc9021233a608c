"""Block sizes and warps of the kernels: what was measured fastest on a GPU of that name, else the defaults.

`launch.json`, beside this file, is written by bench/roofline.py. It maps a device's name to entries such as
"outer_step float32 8 rows": [block, warps], and "lamb_step float32 1 rows": [block, warps, lag] where a step in one
launch is the fastest.
"""

import json
from functools import cache
from pathlib import Path

import torch

MEASURED = Path(__file__).with_name("launch.json")
BLOCK = 1024  # elements: four for each thread, which is one 16-byte access in float32
NUM_WARPS = 8


def entry(kernel: str, dtype: torch.dtype, rows: int = 1) -> str:
    """The name under which `launch.json` keeps the constants of a kernel."""
    return f"{kernel} {str(dtype).removeprefix('torch.')} {rows} rows"


def _measured(device: torch.device) -> dict[str, list[int]]:
    if device.type != "cuda":
        return {}
    return json.loads(MEASURED.read_text()).get(torch.cuda.get_device_name(device), {})


@cache
def launch_constants(kernel: str, device: torch.device, dtype: torch.dtype, rows: int = 1) -> tuple[int, int]:
    """(block, warps) of a kernel on a device; those of the most rows measured from half of `rows` to as many.

    Of more rows a program keeps more in registers, which fewer warps do not have.
    """
    measured = _measured(device)
    for fewer in range(rows, (rows - 1) // 2, -1):
        if found := measured.get(entry(kernel, dtype, fewer)):
            return found[0], found[1]
    return BLOCK, NUM_WARPS


@cache
def queue_constants(kernel: str, device: torch.device, dtype: torch.dtype) -> tuple[int, int, int] | None:
    """(block, warps, lag) of a step in one launch; None where it was not measured faster than one launch a phase."""
    found = _measured(device).get(entry(kernel, dtype))
    return None if found is None else (found[0], found[1], found[2])
