"""The kernels' machine code for sm_80 and sm_90: 16-byte accesses and no spills. Needs no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# (loads, stores) a block of a whole chunk must make, one a tensor touched.
ACCESSES = {
    "lamb moments": (4, 2),
    "lamb weights": (3, 1),
    "lamb step": (7, 3),
    "lars norms": (2, 0),
    "lars weights": (3, 2),
    "lars step": (5, 2),
}


@pytest.fixture(scope="module", params=[80, 90], ids=["sm_80", "sm_90"])
def kernels(request):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), *sys.path])
    script = [sys.executable, str(HERE / "compile_trust_ratio_kernels.py"), str(request.param)]
    done = subprocess.run(script, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {row["kernel"]: row for row in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("name", ACCESSES)
def test_whole_chunks_are_read_and_written_16_bytes_at_a_time(kernels, name):
    loads, stores = ACCESSES[name]
    row = kernels[name]
    assert row["ptx loads of 16 bytes"] >= loads
    assert row["ptx stores of 16 bytes"] >= stores
    assert row["loads of 16 bytes"] >= loads
    assert row["stores of 16 bytes"] >= stores


@pytest.mark.parametrize("name", ACCESSES)
def test_bfloat16_weights_and_gradients_are_accessed_8_bytes_at_a_time(kernels, name):
    row = kernels[f"{name} bf16"]
    state_stores = {"lamb moments": 2, "lamb weights": 0, "lamb step": 2, "lars norms": 0}.get(name, 1)
    weight_stores = {"lamb moments": 0, "lars norms": 0}.get(name, 1)
    assert row["loads of 8 bytes"] >= {"lamb weights": 1, "lamb step": 3, "lars step": 4}.get(name, 2)
    assert row["stores of 8 bytes"] >= weight_stores
    assert row["stores of 16 bytes"] >= state_stores


@pytest.mark.parametrize(
    ("name", "loads", "stores"),
    [
        ("lamb moments", 3, 2),
        ("lamb weights", 3, 1),
        ("lamb step", 6, 3),
        ("lars norms", 1, 0),
        ("lars weights", 2, 2),
        ("lars step", 3, 2),
    ],
)
def test_masters_are_accessed_16_bytes_at_a_time(kernels, name, loads, stores):
    row = kernels[f"{name} masters"]
    assert row["loads of 16 bytes"] >= loads
    assert row["stores of 16 bytes"] >= stores


def test_unaligned_tensors_are_never_accessed_16_bytes_at_a_time(kernels):
    for name in ACCESSES:
        row = kernels[f"{name} unaligned"]
        assert (row["loads of 16 bytes"], row["stores of 16 bytes"]) == (0, 0)


def test_the_norm_of_the_gradients_is_read_16_bytes_at_a_time(kernels):
    assert kernels["square"]["loads of 16 bytes"] >= 1


def test_no_kernel_spills_and_five_blocks_fit_a_multiprocessor(kernels):
    for name, row in kernels.items():
        assert row["spills"] == 0, name
        assert row["stack"] == 0, name
        if "step" in name and "masters" in name:
            assert row["registers"] <= 72, name  # three blocks: Triton 3.6 takes 71 on sm_80, 3.7 64
        elif "step" in name:
            assert row["registers"] <= 64, name  # four blocks
        elif "unaligned" not in name:
            assert row["registers"] <= 48, name  # 65,536 registers / (48 · 256 threads) = 5.3 blocks


def test_norms_too_small_for_a_square_and_nan_are_what_they_are_in_the_reference(kernels):
    # An approximate root takes a subnormal sum for zero, and max.f32 of NaN and 1 is 1; the interpreter differs.
    for name, row in kernels.items():
        assert row["approximate roots"] == 0, name
        if name != "lamb prepare":
            assert row["maxima that drop a NaN"] == 0, name
    assert kernels["lamb prepare"]["maxima that keep a NaN"] == 1  # ‖G‖
    assert kernels["lamb prepare"]["maxima that drop a NaN"] == 1  # of the step count, which is a number
    assert kernels["lamb step"]["maxima that keep a NaN"] == 2  # the clip of the trust ratio


@pytest.mark.parametrize("name", ["lamb step", "lars step"])
def test_a_step_in_one_launch_releases_what_it_stored_before_others_acquire_it(kernels, name):
    order = kernels[name]["synchronisation"]
    # Taking a ticket orders nothing else. Waiting acquires for all threads, and drops what the multiprocessor caches.
    ticket, wait, rest = order[0], order[1:3], order[3:]
    assert ticket == "relaxed.add"
    assert wait == ["acquire load", "barrier"]
    # All threads' stores, one thread's count of arrivals, then the coefficients and the word that they are there.
    assert rest == ["barrier", "acq_rel.add", "barrier", "release.exch"]
    assert kernels[name]["cache invalidations"] == 2
    assert kernels[name]["fences"] >= 2
