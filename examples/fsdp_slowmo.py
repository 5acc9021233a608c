"""SlowMo across groups of processes, each of which shards one model with FSDP2.

    torchrun --nproc-per-node 4 examples/fsdp_slowmo.py

Within a group (one machine, say) gradients and parameters travel in every step; between groups parameters alone,
every 8 steps.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fastlocal

SHARDS = 2


def main() -> None:
    """Trains on made-up points; rank 0 prints the loss before and after."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    if kind == "cuda":
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    replicas = dist.get_world_size() // SHARDS
    mesh = init_device_mesh(kind, (replicas, SHARDS), mesh_dim_names=("replicate", "shard"))

    torch.manual_seed(0)
    teacher = nn.Linear(32, 8).to(kind)
    model = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 8)).to(kind)
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh["shard"])
    torch.manual_seed(1 + dist.get_rank())

    inner = torch.optim.AdamW(model.parameters(), lr=3e-3)
    optimizer = fastlocal.SlowMo(inner, model, interval=8, process_group=mesh.get_group("replicate"))
    losses = []
    for _ in range(160):
        x = torch.randn(64, 32, device=kind)
        loss = nn.functional.mse_loss(model(x), teacher(x).detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    optimizer.sync()

    if dist.get_rank() == 0:
        print(f"loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last; {optimizer.stats.rounds} rounds")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
