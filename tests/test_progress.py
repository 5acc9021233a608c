"""Progress in low precision: the message, and the mean that comes of it."""

import pytest
import torch

from fastlocal.ops.averaging import relative_weights
from fastlocal.ops.progress import add_up, empty_message, mean_, num_bytes, progress_
from fastlocal.reference import averaging as reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def start_and_rows(dtype, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    anchor = torch.randn(columns, generator=generator, dtype=torch.float64)
    rows = anchor.to(dtype) + torch.randn(3, columns, generator=generator, dtype=torch.float64).to(dtype) / 64
    return anchor.to(DEVICE, torch.float64 if dtype == torch.float64 else torch.float32), rows.to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [0, 1, 1000, 2**22 + 5])
def test_a_message_is_the_weighted_sum_of_rounded_progress(dtype, columns):
    anchor, rows = start_and_rows(dtype, columns)
    rows[1, : columns // 2] = torch.nan
    message = torch.full((columns,), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    progress_(message, rows, anchor, [0.25, 0.0, 1.0])
    start = anchor.to(dtype).double()
    exact = sum((weight * (rows[k].double() - start)).bfloat16().double() for k, weight in ((0, 0.25), (2, 1.0)))
    # The sum is rounded once; a term may fall to the other side of a tie where float32 rounded it before.
    torch.testing.assert_close(message.double(), exact, rtol=2**-8, atol=2**-14)
    mean = torch.empty_like(anchor)
    mean_(mean, message, rows, anchor, 1.25)
    torch.testing.assert_close(mean.double(), start + message.double() / 1.25, rtol=1e-6, atol=1e-6)
    weights = torch.tensor([0.25, 0.0, 1.0], device=DEVICE)
    said = reference.mean_of_progress(rows, anchor, weights, torch.bfloat16)
    torch.testing.assert_close(mean, said, rtol=1e-6, atol=1e-6)


def test_relative_weights_are_over_a_power_of_two_and_fit_float32():
    assert relative_weights([3.0, 3.0]) == [1.0, 1.0]
    assert relative_weights([1.0, 3.0, 0.0]) == [0.25, 0.75, 0.0]
    assert relative_weights([2.0**1000, 1.0]) == [0.5, 2.0**-126]
    assert relative_weights([2.0**-1000, 2.0**-1001]) == [0.5, 0.25]


def test_a_lone_row_is_rounded_once_and_none_is_zero():
    anchor = torch.tensor([1.0, 1.0, -2.0])
    rows = torch.tensor([[1.0 + 2**-10, 1.5, -2.0 + 3 * 2**-12]])
    message = torch.empty(3, dtype=torch.bfloat16)
    progress_(message, rows, anchor, [1.0])
    # A parameter near 1 rounded to bfloat16 would have lost 2^-10 altogether.
    assert message.tolist() == [2**-10, 0.5, 3 * 2**-12]
    progress_(message, rows * torch.nan, anchor, [0.0])
    assert message.tolist() == [0.0, 0.0, 0.0]


def test_vectors_that_do_not_fit_the_rows_are_refused():
    with pytest.raises(
        ValueError, match=r"must have 3, 3 and 2 entries for rows of the shape \(2, 3\), got 3, \(4,\) and 2"
    ):
        progress_(torch.empty(3), torch.empty(2, 3), torch.empty(4), [1.0, 1.0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [0, 1, 1000, 2**22 + 1029])
def test_the_mean_of_a_float8_message_is_that_of_the_reference(dtype, columns):
    anchor, rows = start_and_rows(dtype, columns)
    rows[1, : columns // 2] = torch.nan
    message = empty_message(columns, torch.float8_e4m3fn, rows.device).fill_(99)
    weights = [0.25, 0.0, 1.0]
    progress_(message, rows, anchor, weights)
    mean = torch.empty_like(anchor)
    mean_(mean, message, rows, anchor, 1.25)
    said = reference.mean_of_progress(rows, anchor, torch.tensor(weights, device=DEVICE), torch.float8_e4m3fn)
    torch.testing.assert_close(mean, said, rtol=1e-6, atol=1e-6)
    progress_(message, rows * torch.nan, anchor, [0.0, 0.0, 0.0])
    mean_(mean, message, rows, anchor, 1.0)
    assert torch.equal(mean, anchor.to(dtype).to(mean.dtype))


def test_a_message_takes_half_or_a_quarter_of_float32_and_a_byte_a_chunk():
    assert num_bytes(1_000_000, torch.bfloat16) == 2_000_000
    assert num_bytes(1_000_000, torch.float8_e4m3fn) == 1_000_977
    assert num_bytes(0, torch.float8_e4m3fn) == 0
    assert empty_message(2 * 1024, torch.float8_e4m3fn, torch.device("cpu")).nbytes == num_bytes(
        2 * 1024, torch.float8_e4m3fn
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_a_sum_of_three_is_rounded_once_in_a_message_and_over_messages(dtype):
    # Beside 256 bfloat16 has steps of 2, beside 16 float8: 1 at a time is lost, 2 are not.
    most = 256.0 if dtype == torch.bfloat16 else 16.0
    rows = torch.tensor([[most], [1.0], [1.0]], device=DEVICE)
    anchor = torch.zeros(1, device=DEVICE)
    alone = empty_message(1, dtype, anchor.device)
    progress_(alone, rows, anchor, [1.0] * 3)
    messages = torch.stack([torch.empty_like(alone)] * 3)
    for message, row in zip(messages, rows, strict=True):
        progress_(message, row[None], anchor, [1.0])
    for message in (alone, add_up(messages)):
        mean = torch.empty_like(anchor)
        mean_(mean, message, rows, anchor, 1.0)
        assert mean.item() == most + 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_weights_of_less_than_one_in_all_are_divided_out(dtype):
    anchor, rows = torch.ones(2, device=DEVICE), torch.tensor([[1.5, 3.0]], device=DEVICE)
    message, mean = empty_message(2, dtype, anchor.device), torch.empty_like(anchor)
    progress_(message, rows, anchor, [0.5])
    mean_(mean, message, rows, anchor, 0.5)
    assert mean.tolist() == [1.5, 3.0]
