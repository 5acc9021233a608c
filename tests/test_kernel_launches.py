"""Every launch the library makes compiles for sm_90 as Triton specialises it; and where block sizes come from."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is a dependency on Linux alone")

from fastlocal.kernels import launch

HERE = Path(__file__).parent
ROOFLINE = runpy.run_path(str(HERE.parent / "bench" / "roofline.py"))
NAME = "A GPU that nobody has"
CUDA = torch.device("cuda", 0)


def test_every_launch_compiles_with_the_arguments_it_is_given():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), *sys.path])
    script = [sys.executable, str(HERE / "compile_launches.py"), "90"]
    done = subprocess.run(script, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cases = {row["case"]: row["launches"] for row in map(json.loads, done.stdout.splitlines())}
    # LAMB: prepare, moments, ratio and weights, and with the norm of all gradients three more.
    assert cases["lamb of one tensor"] == 7
    assert cases["lars of one tensor, no momentum"] == 3
    assert cases["a row"] == 3
    assert cases["roofline"] == 8


@pytest.fixture
def measured(tmp_path, monkeypatch):
    path = tmp_path / "launch.json"
    path.write_text("{}\n")
    monkeypatch.setattr(launch, "MEASURED", path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: NAME)
    launch.launch_constants.cache_clear()
    yield path
    launch.launch_constants.cache_clear()


def row(kernel, dtype, rows, block, warps):
    return {"entry": launch.entry(kernel, dtype, rows), "block": block, "num_warps": warps}


def test_what_the_roofline_adopts_is_what_a_device_of_that_name_launches(measured):
    measured.write_text(json.dumps({"Another GPU": {launch.entry("square", torch.float32): [512, 4]}}))
    found = [
        row("average", torch.float32, 1, 1024, 4),
        row("average", torch.float32, 8, 1024, 16),
        row("square", torch.bfloat16, 1, 2048, 8),
    ]
    ROOFLINE["adopt"](NAME, found)
    given = [launch.launch_constants("average", CUDA, torch.float32, rows) for rows in (1, 2, 7, 8, 20)]
    assert given == [(1024, 4), (1024, 4), (1024, 4), (1024, 16), (1024, 16)]
    assert launch.launch_constants("square", CUDA, torch.bfloat16) == (2048, 8)
    default = launch.BLOCK, launch.NUM_WARPS
    assert launch.launch_constants("square", CUDA, torch.float32) == default  # measured on another GPU alone
    assert launch.launch_constants("average", torch.device("cpu"), torch.float32, 8) == default
    assert json.loads(measured.read_text())["Another GPU"]


def test_the_winner_is_the_fastest_configuration(capsys):
    rates = {("square", 512, 4): 1e12, ("square", 1024, 8): 2e12, ("square", 2048, 8): 3e12, ("other", 512, 4): 9e12}
    (winner,) = ROOFLINE["winners"]({"square": (print, 1)}, torch.float32, 1, 4e12, rates)
    assert (winner["block"], winner["num_warps"]) == (2048, 8)
    assert (winner["share_of_copy"], winner["by_default"]) == (0.75, 0.5)
    assert capsys.readouterr().out.splitlines()[0].endswith("75.0 % of copy")


def test_the_file_that_ships_has_whole_chunks_and_known_kernels():
    known = set(ROOFLINE["rows_launches"](1, 16, torch.float32, "cpu"))
    known |= set(ROOFLINE["optimizer_launches"](16, torch.float32, "cpu"))
    for entries in json.loads(launch.MEASURED.read_text()).values():
        for name, (block, warps) in entries.items():
            kernel = name.split()[0]
            assert kernel in known
            assert ROOFLINE["CHUNK"] % block == 0
            assert kernel not in ROOFLINE["BLOCKS"] or block == launch.BLOCK
            assert warps in (1, 2, 4, 8, 16, 32)
