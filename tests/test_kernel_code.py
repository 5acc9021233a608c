"""The compiled kernels, read without a GPU: 16-byte loads and stores, no spills."""

import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton is a dependency on Linux alone")

# Runs in a process of its own: under Triton's interpreter a kernel cannot be compiled.
COMPILE = """
import subprocess, sys, tempfile, pathlib
import triton, triton.backends.nvidia as nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fastlocal.kernels import average, slowmo

kernel = {"average": average._average_kernel, "outer": slowmo._outer_step_kernel,
          "finite": average._finite_rows_kernel}[sys.argv[1]]
k, dtype, capability, known = int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), sys.argv[5] == "True"
types = {"rows_ptr": f"*{dtype}", "weights_ptr": "*fp32", "parts_ptr": "*fp32", "anchor_ptr": "*fp32",
         "slow_ptr": "*fp32", "finite_ptr": "*i8", "row_stride": "i32", "parts_stride": "i32", "n": "i32",
         "mean_ptr": "*fp32", "K": "constexpr", "HAS_MEAN": "constexpr", "BLOCK": "constexpr"}
signature = {name: types.get(name, "fp32") for name in kernel.arg_names}
constants = {"K": k, "HAS_MEAN": known, "BLOCK": average.BLOCK}
constants = {name: value for name, value in constants.items() if name in signature}
# As at run time: flat rows are aligned and their length is a multiple of 16 elements.
aligned = [name for name in signature if name.endswith("_ptr") or name in ("row_stride", "n")]
attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
compiled = triton.compile(ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes),
                          target=GPUTarget("cuda", capability, 32), options={"num_warps": average.NUM_WARPS})
print(compiled.asm["ptx"])
print(compiled.asm["ttir"])
with tempfile.TemporaryDirectory() as folder:
    cubin = pathlib.Path(folder) / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = pathlib.Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    print(subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout)
"""


def compile_kernel(name, k, dtype, capability, known):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, name, str(k), dtype, str(capability), str(known)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("dtype", "width"), [("fp32", "v4.b32"), ("bf16", "v2.b32")])
@pytest.mark.parametrize(
    ("name", "k", "state", "known"),
    [
        ("average", 4, 0, False),
        ("average", 2, 0, True),
        ("outer", 1, 2, False),
        ("outer", 8, 2, False),
        ("outer", 2, 2, True),
        ("finite", 1, 0, False),
    ],
)
def test_rows_move_in_wide_words_and_nothing_spills(name, k, state, known, dtype, width, capability):
    code = compile_kernel(name, k, dtype, capability, known)
    loads, stores = (re.findall(rf"{kind}\.global\S*\.(v\d\.b32)", code) for kind in ("ld", "st"))
    # Four elements a thread: 16 bytes of float32, 8 of bfloat16. Anchor and slow momentum are float32.
    expected = [width] * k + ["v4.b32"] * state
    assert sorted(loads) == sorted(expected + ["v4.b32"] * known)
    assert sorted(stores) == sorted([] if name == "finite" else expected)
    # Eight rows of 307M float32 lie 2³¹ elements apart: offsets of rows are 64 bits wide, though the stride is not.
    assert not re.search(r"arith\.muli.*row_stride.* : i32", code)
    assert name == "finite" or k == 1 or re.search(r"arith\.muli.* : i64", code)
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", code)
    assert usage, code[-500:]
    assert (usage[2], usage[3]) == ("0", "0"), "registers spill to memory"
    # A multiprocessor has 65,536 registers: with 80 a thread, 24 of its 64 warps stay resident, and eight rows
    # have 98 KB in flight then.
    assert int(usage[1]) <= 80
