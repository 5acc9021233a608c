"""Vectors in float8, against exact arithmetic in float64."""

import pytest
import torch

from fastlocal.ops import float8
from fastlocal.reference.averaging import rounded_to_float8

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def sent(values):
    message = float8.empty(len(values), DEVICE).fill_(77)
    float8.encode_(message, values.to(DEVICE))
    return float8.decode(message)[: len(values)].cpu()


@pytest.mark.parametrize("columns", [0, 1, 1023, 1024, 1025, 5000])
def test_values_of_all_sizes_arrive_as_the_reference_rounds_them(columns):
    generator = torch.Generator().manual_seed(columns)
    sizes = torch.logspace(-36, 36, max(columns, 1))[:columns]
    for scale in (torch.ones(columns), sizes, sizes.flip(0)):
        values = torch.randn(columns, generator=generator) * scale
        assert torch.equal(sent(values), rounded_to_float8(values))
        assert torch.equal(sent(sent(values)), sent(values))


def test_a_chunk_that_is_full_is_not_followed_by_an_empty_one():
    assert [float8.num_chunks(columns) for columns in (0, 1, 1023, 1024, 1025, 2048)] == [0, 1, 1, 1, 2, 2]
    assert float8.empty(2048, DEVICE).shape == (2, 1025)


@pytest.mark.parametrize("rounded", [sent, rounded_to_float8])
def test_values_are_rounded_to_four_bits_of_their_own_or_to_steps_of_the_chunk(rounded):
    # 448 stands for itself, so the chunk's power of two is 1 and its least step 2^-9.
    values = torch.tensor([448.0, 17.0, 18.9, -19.0, 25.0, 2**-9, 1.4 * 2**-9, 1.5 * 2**-9, 0.5 * 2**-9, 0.0])
    assert rounded(values).tolist() == [448.0, 16.0, 18.0, -20.0, 24.0, 2**-9, 2**-9, 2**-8, 0.0, 0.0]
    # Past 448 the power of two is 2.
    assert rounded(torch.tensor([449.0, 2**-9])).tolist() == [448.0, 0.0]
    assert rounded(torch.tensor([-480.0, 2**-8])).tolist() == [-480.0, 2**-8]


def test_what_is_a_14336th_of_the_largest_keeps_its_bits_and_a_458752nd_is_lost():
    for largest in (448.0, 225.0, 300.0):
        kept = torch.tensor([largest, largest / 14336, -largest / 14000])
        torch.testing.assert_close(sent(kept), kept, rtol=2**-4, atol=0)
        assert sent(torch.tensor([largest, largest / 458_752])).tolist()[1] == 0.0


def test_chunks_do_not_share_a_power_of_two():
    values = torch.full((2048,), 1e-30)
    values[0] = 1e30
    arrived = sent(values)
    assert arrived[1:1024].count_nonzero() == 0
    torch.testing.assert_close(arrived[1024:], values[1024:], rtol=2**-4, atol=0)


def test_the_ends_of_float32_survive():
    for value in (3.2e38, 1.2e-38, 1e-39, -3.2e38):
        torch.testing.assert_close(sent(torch.tensor([value])), torch.tensor([value]), rtol=2**-4, atol=0)
    assert sent(torch.tensor([1e300, 1.0], dtype=torch.float64)).isfinite().tolist() == [False, False]


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_is_never_taken_for_a_number(value):
    values = torch.ones(1500)
    values[3] = value
    arrived = sent(values)
    assert not arrived[:1024].isfinite().any()
    assert torch.equal(arrived[1024:], values[1024:])
