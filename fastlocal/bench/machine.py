"""What a figure was measured on, and how much memory and cache there is."""

import datetime
import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any, TypedDict

import torch

import fastlocal


class Origin(TypedDict):
    """Where and when a figure was measured, and with what; `commit` is None outside a checkout."""

    commit: str | None
    date: str
    device: str
    threads: int
    versions: dict[str, str]


_PACKAGES = ("torch", "triton", "timm", "pytorch_optimizer")


def origin(device: str) -> Origin:
    """Of a figure that is measured now on "cpu" or "cuda"."""
    return Origin(
        commit=commit(),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        device=device_name(device),
        threads=torch.get_num_threads(),
        versions=versions(),
    )


def append_rows(out: Path | None, *rows: dict[str, Any]) -> None:
    """One JSON line a row at the end of a file, which is made with its folder; without a file, nothing."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def device_name(device: str) -> str:
    """As the vendor calls it."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def cache_bytes(device: str) -> int:
    """Of the largest cache: the L2 of a GPU, the L3 of a CPU (32 MiB where it is not told)."""
    if device == "cuda":
        return torch.cuda.get_device_properties().L2_cache_size
    told = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    return int(told.read_text().strip().removesuffix("K")) * 1024 if told.exists() else 32 * 2**20


def free_bytes(device: str) -> int:
    """Memory that may still be taken."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    told = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    return told[0] if told else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def versions() -> dict[str, str]:
    """Of fastlocal and of what it is compared with; "absent" for what is not installed."""
    found = {"fastlocal": fastlocal.__version__}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def commit() -> str | None:
    """Of the checkout that is measured, or FASTLOCAL_COMMIT where that is set; None if it is installed elsewhere."""
    if told := os.environ.get("FASTLOCAL_COMMIT"):
        return told
    root = Path(fastlocal.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or None
    except FileNotFoundError:
        return None
