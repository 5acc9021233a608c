"""Vectors in float8: a byte a value, and one more for the power of two that each chunk of 1,024 values shares.

float8_e4m3fn holds 4 significant bits between 2⁻⁶ and 448, and steps of 2⁻⁹ below, and the largest value of a chunk
comes to lie between 224 and 448: what is 1/14,336 of it or more keeps its bits, what is below 1/229,376 may become 0.
Plain PyTorch on every device; the format is that of OCP's Microscaling Formats specification 1.0, with larger chunks.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

CHUNK = 1024
"""Values that share a power of two."""

_LARGEST = 448.0
_BIAS = 127
_NOT_FINITE = 255


def num_chunks(columns: int) -> int:
    """How many chunks hold so many values; the last may have room left."""
    return -(-columns // CHUNK)


def empty(columns: int, device: torch.device) -> Tensor:
    """Room for a vector: uint8, shape (chunks, 1 + CHUNK). A row is the exponent + 127, then the values."""
    return torch.empty(num_chunks(columns), 1 + CHUNK, dtype=torch.uint8, device=device)


def encode_(message: Tensor, values: Tensor) -> None:
    """Write the values, rounded to nearest, ties to even; a chunk with a value that is not finite reads as such.

    Args:
        message: uint8, shape (chunks, 1 + CHUNK).
        values: shape (n,), n at most chunks · CHUNK and above (chunks − 1) · CHUNK; the rest becomes 0.
    """
    missing = len(message) * CHUNK - len(values)
    chunks = (pad(values, (0, missing)) if missing else values).to(torch.float32).view(-1, CHUNK)
    lowest, highest = torch.aminmax(chunks, dim=1)
    largest = torch.maximum(highest, -lowest)
    mantissa, exponent = torch.frexp(largest)  # largest = mantissa · 2^exponent; 448 = 0.875 · 2⁹
    biased = (exponent - 9 + (mantissa > _LARGEST / 512)).clamp_(min=1 - _BIAS) + _BIAS
    biased.masked_fill_(~largest.isfinite(), _NOT_FINITE)
    message[:, 0] = biased
    message[:, 1:].view(torch.float8_e4m3fn).copy_(chunks * _power_of_two(-biased + 2 * _BIAS))


def decode(message: Tensor) -> Tensor:
    """The values, float32, shape (chunks · CHUNK,)."""
    values = message[:, 1:].view(torch.float8_e4m3fn).to(torch.float32)
    return values.mul_(_power_of_two(message[:, 0].to(torch.int32))).view(-1)


def _power_of_two(biased: Tensor) -> Tensor:
    """2^(biased − 127), exactly, float32, shape (chunks, 1): the bits of a float32 that has no digits."""
    return (biased << 23).view(torch.float32)[:, None]
