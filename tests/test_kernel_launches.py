"""Every launch the library makes compiles for sm_90 as Triton specialises it; and where block sizes come from."""

import json
import os
import runpy
import subprocess
import sys
import weakref
from pathlib import Path
from unittest import mock

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
    assert cases["lamb in one launch"] == 5  # the norm, prepare, and both phases
    assert cases["lars in one launch"] == 1
    assert cases["roofline"] == 10


def step_and_phases(seconds):
    """What the roofline finds for a step in one launch and for its two phases of 1 s each, beside a copy of 8 B/s."""
    found = [row(kernel, torch.float32, 1, 1024, 8) for kernel in ("lamb_moments", "lamb_weights")]
    phases = [r | {"bytes": 4, "share_of_copy": 0.5} for r in found]
    other = row("lamb_weights", torch.bfloat16, 1, 512, 8) | {"bytes": 4, "share_of_copy": 0.1}
    of_step = {"entry": launch.entry("lamb_step", torch.float32), "constants": [1024, 4, 64]}
    return [*phases, other, of_step | {"bytes": 6, "share_of_copy": 6 / seconds / 8}]


@pytest.fixture
def measured(tmp_path, monkeypatch):
    path = tmp_path / "launch.json"
    path.write_text("{}\n")
    monkeypatch.setattr(launch, "MEASURED", path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: NAME)
    launch.launch_constants.cache_clear()
    launch.queue_constants.cache_clear()
    yield path
    launch.launch_constants.cache_clear()
    launch.queue_constants.cache_clear()


def row(kernel, dtype, rows, block, warps):
    return {"entry": launch.entry(kernel, dtype, rows), "constants": [block, warps]}


def test_what_the_roofline_adopts_is_what_a_device_of_that_name_launches(measured):
    measured.write_text(json.dumps({"Another GPU": {launch.entry("square", torch.float32): [512, 4]}}))
    found = [
        row("average", torch.float32, 1, 1024, 4),
        row("average", torch.float32, 8, 1024, 16),
        row("square", torch.bfloat16, 1, 2048, 8),
    ]
    ROOFLINE["adopt"](NAME, found)
    given = [launch.launch_constants("average", CUDA, torch.float32, rows) for rows in (1, 2, 7, 8, 16, 17)]
    default = launch.BLOCK, launch.NUM_WARPS
    # A program holds all rows: 32 in the registers that four warps have were spilled, where eight warps' hold them.
    assert given == [(1024, 4), (1024, 4), default, (1024, 16), (1024, 16), default]
    assert launch.launch_constants("square", CUDA, torch.bfloat16) == (2048, 8)
    assert launch.launch_constants("square", CUDA, torch.float32) == default  # measured on another GPU alone
    assert launch.launch_constants("average", torch.device("cpu"), torch.float32, 8) == default
    assert json.loads(measured.read_text())["Another GPU"]


def test_a_step_in_one_launch_is_taken_where_it_is_faster_than_its_phases(measured):
    assert launch.queue_constants("lamb_step", CUDA, torch.float32) is None
    for seconds, expected in ((1.9, (1024, 4, 64)), (2.1, None), (1.99, None)):
        launch.queue_constants.cache_clear()
        ROOFLINE["adopt"](NAME, step_and_phases(seconds))
        assert launch.queue_constants("lamb_step", CUDA, torch.float32) == expected
    ROOFLINE["adopt"](NAME, [row("average", torch.float32, 1, 1024, 4)])
    assert launch.launch_constants("lamb_weights", CUDA, torch.bfloat16) == (512, 8)  # what was known is kept
    assert launch.queue_constants("lamb_step", CUDA, torch.bfloat16) is None
    assert launch.queue_constants("lamb_step", torch.device("cpu"), torch.float32) is None


def test_the_winner_is_the_fastest_configuration(capsys):
    seconds = {
        ("square", (512, 4)): 12.0,
        ("square", (1024, 8)): 6.0,
        ("square", (2048, 8)): 4.0,
        ("other", (1, 1)): 1.0,
    }
    (winner,) = ROOFLINE["winners"]({"square": (print, 12)}, torch.float32, 1, 4.0, seconds)
    assert winner["constants"] == [2048, 8]
    assert (winner["seconds"], winner["share_of_copy"], winner["by_default"]) == (4.0, 0.75, 0.5)
    assert capsys.readouterr().out.splitlines()[0].endswith("75.0 % of copy")


def test_what_the_roofline_launches_on_lives_as_long_as_its_launches():
    held: list[weakref.ref[torch.Tensor]] = []
    full = torch.full

    def noted(*arguments, **options):
        held.append(weakref.ref(made := full(*arguments, **options)))
        return made

    with mock.patch("torch.full", noted):
        launches = ROOFLINE["optimizer_launches"]([16, 40], torch.float32, "cpu")
    assert len(held) >= 8  # p, g, m and v of both tensors, which the tables name by address alone
    assert all(reference() is not None for reference in held)
    del launches


def test_the_file_that_ships_has_whole_chunks_and_known_kernels():
    known = set(ROOFLINE["rows_launches"](1, 16, torch.float32, "cpu"))
    known |= set(ROOFLINE["optimizer_launches"]([16], torch.float32, "cpu"))
    for entries in json.loads(launch.MEASURED.read_text()).values():
        for name, configuration in entries.items():
            kernel = name.split()[0]
            assert kernel in known
            assert ROOFLINE["CHUNK"] % configuration[0] == 0
            assert tuple(configuration) in ROOFLINE["CONFIGURATIONS"].get(kernel, ROOFLINE["OTHERS"])
