"""Storing float32 results in a tensor's own dtype, rounded to nearest even.

Triton's interpreter truncates float32 to bfloat16, where the GPU and PyTorch round to nearest even.
Rounding in integers gives the same bits everywhere, so that a test on a CPU says something about a GPU.
"""

import triton
import triton.language as tl


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """x: float32. Returns x in `dtype`; bfloat16 is rounded to nearest even, and NaN stays NaN."""
    if dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        # A NaN whose payload is all ones would carry into the sign; a quiet NaN cannot.
        quiet_nan = (bits >> 16) | 0x0040
        return tl.where(x != x, quiet_nan, rounded).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)
