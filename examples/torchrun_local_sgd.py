"""One worker a process: torchrun --nproc-per-node 2 examples/torchrun_local_sgd.py (made-up points, on the CPU)."""

import torch
import torch.distributed as dist
from torch import nn

import fastlocal


def main() -> None:
    """Trains; rank 0 prints the accuracy on points that no process has seen."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)  # the same model and classes in every process
    centres = torch.randn(10, 64)
    model = nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 10))
    torch.manual_seed(1 + dist.get_rank())  # other points

    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = fastlocal.LocalSGD(inner, model, interval=16)
    for _ in range(201):
        labels = torch.randint(10, (256,))
        loss = nn.functional.cross_entropy(model(centres[labels] + torch.randn(256, 64)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimizer.sync()  # the last round was not full

    if dist.get_rank() == 0:
        labels = torch.arange(10).repeat(100)
        correct = model.eval()(centres[labels] + torch.randn(1000, 64)).argmax(1) == labels
        accuracy, stats = 100 * correct.float().mean(), optimizer.stats
        print(f"accuracy {accuracy:.1f} %, {stats.rounds} rounds, {stats.bytes_on_wire:,} bytes sent")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
