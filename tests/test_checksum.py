"""Checksums that tell whether processes hold the same bytes."""

import pytest
import torch

from fastlocal import checksum as module
from fastlocal.checksum import checksum

DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int64, torch.float8_e4m3fn),
    *(torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128),
]


def signed(number):
    return (number + 2**63) % 2**64 - 2**63


def weight(number):
    for factor in (0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9):
        number = signed(number * factor)
        number ^= number >> 29
    return number | 1


def expected(tensor, chunk):
    size = min(tensor.element_size(), 8)
    own = bytes(tensor.flatten().view(torch.uint8).tolist())
    values = [int.from_bytes(own[i : i + size], "little", signed=size > 1) for i in range(0, len(own), size)]
    total = 0
    for number, start in enumerate(range(0, len(values), chunk)):
        part = sum(weight(i + 1) * v for i, v in enumerate(values[start : start + chunk]))
        total += weight(chunk + number + 1) * part
    return signed(total)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("elements", [0, 1, 7, 8, 21])
def test_a_checksum_is_the_weighted_sum_of_the_bytes_as_whole_numbers(dtype, elements, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 8)
    values = torch.randn(elements, generator=torch.Generator().manual_seed(0)).mul(9).abs().to(dtype)
    assert checksum(values).item() == expected(values, 8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_whose_elements_have_changed_places_have_other_checksums(dtype):
    def of(*numbers):
        return checksum(torch.tensor(numbers).to(dtype)).item()

    sums = [of(1, 0, 0, 1), of(0, 1, 1, 0), of(1, 1, 0, 0), of(0, 0, 1, 1), of(1, 0, 1, 0), of(0, 1, 0, 1)]
    assert len(set(sums)) == len(sums)


def test_elements_that_have_changed_places_over_a_long_way_are_seen_and_the_layout_is_not(monkeypatch):
    values = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    assert checksum(values) == checksum(values.to(memory_format=torch.channels_last))
    assert checksum(values.relu()) == checksum(values.relu().to_sparse())
    assert checksum(values[0, 0, 0, 0]) == checksum(values[:1, 0, 0, 0])  # one number, of shape ()
    monkeypatch.setattr(module, "_CHUNK", 8)
    for here, there in ((0, 8), (1, 8), (8, 16), (0, 119)):
        swapped = values.clone().flatten()
        swapped[[here, there]] = swapped[[there, here]]
        assert checksum(values) != checksum(swapped)
