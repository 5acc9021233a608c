"""Compiles the LAMB and LARS kernels for GPUs this machine need not have; prints what the machine code does.

Run by test_trust_ratio_machine_code.py in a process of its own, since Triton's interpreter cannot be
switched off once Triton is imported. One JSON line a kernel.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastlocal.kernels import lamb, lars, trust_ratio_common
from fastlocal.kernels.trust_ratio_common import BLOCK, CHUNK, NUM_WARPS

TYPES = {
    "pointers": "*i64",
    "sizes": "*i64",
    "chunks": "*i32",
    "first_chunk": "*i32",
    "adapts": "*i32",
    "num_tensors": "i32",
    "coefficients": "*fp32",
    "partials": "*fp32",
    "queue": "*i32",
    "norm": "*fp32",
    "sums": "*fp32",
    "num_sums": "i32",
    "counters": "*i32",
    "found_inf": "*fp32",
    "grad_scale": "*fp32",
    "lr": "*fp32",
}
LAMB = {"HAS_FOUND": True, "HAS_MASTER": False}
LARS_NORMS = {"HAS_FOUND": True, "HAS_SCALE": True, "JOINT": False, "MAXIMIZE": False, "MASTER": 0}
LARS_WEIGHTS = {"HAS_FOUND": True, "HAS_BUFFER": True, "NESTEROV": False, "MASTER": 0}
LAMB_STEP = LAMB | {"HAS_CLIP": True}
LARS_STEP = LARS_NORMS | LARS_WEIGHTS | {"COUNTED": True, "STEP": 3, "CLIP": True, "LR_IN_BUFFER": False}
KERNELS = {
    "lamb moments": (lamb.moments_kernel, LAMB, True),
    "lamb weights": (lamb.weights_kernel, LAMB, False),
    "lars norms": (lars.norms_kernel, LARS_NORMS, True),
    "lars weights": (lars.weights_kernel, LARS_WEIGHTS, True),
    "lamb step": (lamb.step_kernel, LAMB_STEP, True),
    "lars step": (lars.step_kernel, LARS_STEP, True),
}


def compiled(kernel, constexprs, capability):
    signature = {name: "constexpr" if name in constexprs else TYPES.get(name, "fp32") for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": NUM_WARPS})


def cuobjdump(flag, cubin):
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout


def synchronisation(ptx):
    """Atomics and acquiring loads in order, the barrier right before an atomic, and the one right after a load."""
    found, last = [], ""
    for line in ptx.splitlines():
        if atomic := re.search(r"atom\.global\.gpu\.(\w+\.\w+)\.\w+ ", line):
            found += ["barrier"] * (last == "bar.sync") + [atomic[1]]
        elif operation := re.search(r"ld\.global(\.gpu\.acquire)?|bar\.sync|st\.global", line):
            found += ["barrier"] * (operation[0] == "bar.sync" and last.endswith("acquire"))
            found += ["acquire load"] * operation[0].endswith("acquire")
            last = operation[0]
    return found


def report(name, kernel, constexprs, capability):
    binary = compiled(kernel, constexprs, capability)
    code = cuobjdump("-sass", binary.asm["cubin"])
    usage = cuobjdump("--dump-resource-usage", binary.asm["cubin"])
    print(
        json.dumps(
            {
                "kernel": name,
                "capability": capability,
                "ptx loads of 16 bytes": len(re.findall(r"ld\.global\S*\.v4\.b32", binary.asm["ptx"])),
                "ptx stores of 16 bytes": len(re.findall(r"st\.global\S*\.v4\.b32", binary.asm["ptx"])),
                "loads of 16 bytes": len(re.findall(r"LDG\.E\S*\.128", code)),
                "stores of 16 bytes": len(re.findall(r"STG\.E\S*\.128", code)),
                "loads of 8 bytes": len(re.findall(r"LDG\.E\S*\.64", code)),
                "stores of 8 bytes": len(re.findall(r"STG\.E\S*\.64", code)),
                "approximate roots": len(re.findall(r"sqrt\.approx", binary.asm["ptx"])),
                "maxima that drop a NaN": len(re.findall(r"\b(?:max|min)\.(?:ftz\.)?f32", binary.asm["ptx"])),
                "maxima that keep a NaN": len(re.findall(r"\b(?:max|min)\.NaN\.f32", binary.asm["ptx"])),
                "synchronisation": synchronisation(binary.asm["ptx"]),
                "cache invalidations": len(re.findall(r"CCTL\.IVALL", code)),
                "fences": len(re.findall(r"MEMBAR\.\w+\.GPU", code)),
                "spills": len(re.findall(r"\b(?:STL|LDL)\b", code)),
                "registers": int(re.findall(r"REG:(\d+)", usage)[-1]),
                "stack": int(re.findall(r"STACK:(\d+)", usage)[-1]),
            }
        )
    )


def main(capability):
    layout = {"ALIGNED": True, "CHUNK": CHUNK, "BLOCK": BLOCK}
    for name, (kernel, constexprs, reads_gradient) in KERNELS.items():
        for suffix, dtype in (("", tl.float32), (" bf16", tl.bfloat16)):
            dtypes = {"P_DTYPE": dtype} | ({"G_DTYPE": dtype} if reads_gradient else {})
            report(name + suffix, kernel, constexprs | layout | dtypes, capability)
        unaligned = layout | {"ALIGNED": False, "P_DTYPE": tl.float32}
        report(
            name + " unaligned",
            kernel,
            constexprs | unaligned | ({"G_DTYPE": tl.float32} if reads_gradient else {}),
            capability,
        )
    bf16 = {"P_DTYPE": tl.bfloat16}
    masters = {
        "lamb moments": {"HAS_MASTER": True, "G_DTYPE": tl.bfloat16},
        "lamb weights": {"HAS_MASTER": True},
        "lars norms": {"MASTER": 3, "G_DTYPE": tl.bfloat16},
        "lars weights": {"MASTER": 3, "G_DTYPE": tl.bfloat16},
        "lamb step": {"HAS_MASTER": True, "G_DTYPE": tl.bfloat16},
        "lars step": {"MASTER": 3, "STEP": 4, "G_DTYPE": tl.bfloat16},
    }
    for name, changes in masters.items():
        kernel, constexprs, _ = KERNELS[name]
        report(name + " masters", kernel, constexprs | layout | bf16 | changes, capability)
    square = {"G_DTYPE": tl.float32, "ROW": 1} | layout
    report("square", trust_ratio_common.square_kernel, square, capability)
    report("norm", trust_ratio_common.norm_kernel, {"BLOCK": BLOCK}, capability)
    prepare = {"HAS_NORM": True, "HAS_SCALE": True, "HAS_FOUND": True, "CORRECTION": "moments", "DECOUPLED": False}
    prepare |= {"MAXIMIZE": False, "HAS_MASTER": False, "TENSORS": lamb.TENSORS}
    report("lamb prepare", lamb.prepare_kernel, prepare, capability)


if __name__ == "__main__":
    main(int(sys.argv[1]))
