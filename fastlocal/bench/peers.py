"""What other libraries do to parameters at a sync, as plain PyTorch: the operations they issue, in their order.

Each is the part that one process runs beside the collective, which is left out: with one process it is the
identity. Tests use them as oracles and pin their bytes and launches; benchmarks time them. `x` is a list of the
process's parameters, in place of `anchor` and `slow` lists of the same shapes; all float32, `num_processes` ≥ 1.

    sequence                launches     bytes a parameter
    pytorch_average_        2            16
    accelerate_average_     2T           16
    torchft_average_        3T           24
    torchdistx_slowmo_      5T + 2       68
    fairscale_slowmo_       8T + 2       92
    torchft_diloco_         7T + 4       108

References (what was read): torch 2.13.0 model_averaging, accelerate 16cb6eb, torchft 7eb7087, torchdistx 9c1b9f5,
fairscale 146f160 (its memory-efficient form with one owner).
"""

import torch
from torch import Tensor


def pytorch_average_(x: list[Tensor], num_processes: int) -> None:
    """torch.distributed.algorithms.model_averaging: pack, divide, (sum over processes), point into the pack."""
    flat = torch.cat([p.reshape(-1) for p in x])
    flat /= num_processes
    start = 0
    for p in x:
        p.data = flat[start : start + p.numel()].view_as(p)
        start += p.numel()


def accelerate_average_(x: list[Tensor], num_processes: int) -> None:
    """accelerate.LocalSGD: clone, (sum over processes), divide, point to the clone."""
    for p in x:
        mean = p.clone()
        mean /= num_processes
        p.data = mean


def torchft_average_(x: list[Tensor], num_processes: int) -> None:
    """torchft.LocalSGD: clone, (sum over processes), divide, copy back."""
    means = [p.clone() for p in x]
    for p, mean in zip(x, means, strict=True):
        mean /= num_processes
        p.copy_(mean)


def torchdistx_slowmo_(
    x: list[Tensor], anchor: list[Tensor], slow: list[Tensor], *, lr: float, momentum: float, num_processes: int
) -> None:
    """torchdistx.SlowMomentumOptimizer: u ← βu − x/γ + x₀/γ; x₀ ← x₀ − γu; x ← x₀. `slow` is u."""
    pytorch_average_(x, num_processes)
    _divided_slowmo_(x, anchor, slow, lr, momentum)


def fairscale_slowmo_(
    x: list[Tensor], anchor: list[Tensor], slow: list[Tensor], *, lr: float, momentum: float, num_processes: int
) -> None:
    """fairscale's SlowMo: divide, pack, (reduce to the owner), unpack, step, pack, (broadcast), unpack."""
    for p in x:
        p /= num_processes
    _unpack_(torch.cat([p.reshape(-1) for p in x]), x)
    _divided_slowmo_(x, anchor, slow, lr, momentum)
    _unpack_(torch.cat([p.reshape(-1) for p in x]), x)


def torchft_diloco_(
    x: list[Tensor], anchor: list[Tensor], outer: torch.optim.SGD, *, num_processes: int, alpha: float = 0.0
) -> None:
    """torchft.DiLoCo: Δ = x₀ − x, (sum over processes), restore x₀, outer optimizer on Δ, save x₀, mix.

    Args:
        x: the local parameters; the parameters of `outer`.
        anchor: x₀.
        outer: the outer optimizer, which torchft's authors run as SGD with Nesterov momentum.
        num_processes: by which Δ is divided.
        alpha: fragment_update_alpha, how much of the local parameters stays; the last pass runs at 0 too.
    """
    with torch.no_grad():
        deltas = [start - p for p, start in zip(x, anchor, strict=True)]
        for delta in deltas:
            delta /= num_processes
        local = [p.clone() for p in x]
        for p, start, delta in zip(x, anchor, deltas, strict=True):
            p.copy_(start)
            p.grad = delta
    outer.step()
    with torch.no_grad():
        for p, start, mine in zip(x, anchor, local, strict=True):
            start.copy_(p.clone())
            p.lerp_(mine, alpha)


def plain_average_(rows: Tensor) -> None:
    """The mean of K rows in one process and its write-back as anybody would write them."""
    rows.copy_(rows.mean(dim=0).expand_as(rows))


def plain_average_with_drift_(rows: Tensor) -> Tensor:
    """The same, and ‖x_k − x̄‖² for each row, shape (k,)."""
    mean = rows.mean(dim=0)
    drift = (rows - mean).square().sum(dim=1)
    rows.copy_(mean.expand_as(rows))
    return drift


def plain_outer_step_(rows: Tensor, anchor: Tensor, slow: Tensor, *, decay: float) -> None:
    """SlowMo over K rows in the fewest plain operations we know."""
    delta = anchor - rows.mean(dim=0)
    slow.mul_(decay).add_(delta)
    anchor.sub_(slow)
    rows.copy_(anchor.expand_as(rows))


def looped_average_(rows: Tensor) -> None:
    """The mean as simulators of K workers write it: add worker by worker, divide, load into each."""
    total = rows[0].clone()
    for row in rows[1:]:
        total += row
    total = total / rows.shape[0]
    for row in rows:
        row.copy_(total)


def _divided_slowmo_(x: list[Tensor], anchor: list[Tensor], slow: list[Tensor], lr: float, momentum: float) -> None:
    for p, start, u in zip(x, anchor, slow, strict=True):
        u.mul_(momentum).sub_(p, alpha=1 / lr).add_(start, alpha=1 / lr)
        start.sub_(u, alpha=lr)
        p.copy_(start)


def _unpack_(flat: Tensor, x: list[Tensor]) -> None:
    start = 0
    for p in x:
        p.copy_(flat[start : start + p.numel()].view_as(p))
        start += p.numel()
