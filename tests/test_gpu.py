"""What only a GPU can show: the compiled kernels, long offsets, training on the device."""

import pytest
import torch
from torch import nn

from fastlocal import FixedInterval, SlowMo, Workers
from fastlocal.ops import averaging as ops

pytestmark = pytest.mark.gpu


def test_offsets_beyond_two_to_the_31_are_right():
    n = 2**31 + 4096
    rows = torch.zeros(1, n, dtype=torch.float16, device="cuda")
    rows[0, -1] = 3.0
    anchor, slow = torch.zeros(n, device="cuda"), torch.zeros(n, device="cuda")
    parts = torch.empty(1, ops.num_drift_parts(n), device="cuda")
    weights = torch.ones(1, device="cuda")
    ops.outer_step_(rows, anchor, slow, weights, parts, direct=0.5, momentum=0.0, decay=1.0, gain=0.0)
    assert rows[0, -1].item() == 1.5
    assert rows[0, :4096].count_nonzero().item() == 0
    rows[0, -2] = torch.inf
    assert ops.finite_rows(rows).tolist() == [False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_with_the_kernels_agrees_with_the_reference(dtype):
    results = []
    for impl in ("triton", "reference"):
        torch.manual_seed(0)
        workers = Workers(nn.Linear(50, 20).to("cuda", dtype), 4)
        policy = FixedInterval(3)
        policy.reads_drift = True
        optimizer = SlowMo(torch.optim.SGD(workers.parameters(), lr=0.1), workers, policy, impl=impl)
        generator = torch.Generator("cuda").manual_seed(1)
        for _ in range(12):
            optimizer.zero_grad()
            for worker in workers:
                batch = torch.randn(8, 50, generator=generator, device="cuda").to(dtype)
                worker(batch).square().mean().backward()
            optimizer.step()
        results.append((torch.cat([p.detach().flatten() for p in workers.parameters()]), optimizer.stats.drift))
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(results[0][0], results[1][0], rtol=tolerance, atol=tolerance)
    assert results[0][1] == pytest.approx(results[1][1], rel=10 * tolerance)
