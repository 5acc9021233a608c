"""Four workers in a Lightning module: python examples/lightning_module.py (needs pytorch-lightning).

Lightning keeps the loop; the module holds the workers and returns a wrapped optimizer. Give it a model that is on its
device and in its dtype already: Lightning then moves nothing out of the workers' buffer.
"""

import pytorch_lightning as lightning  # pyright: ignore[reportMissingImports]
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastlocal

WORKERS, INTERVAL, BATCH_SIZE = 4, 8, 64


class LocalTraining(lightning.LightningModule):
    """Each batch holds one part a worker; the workers step alone and average once an interval."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.workers = fastlocal.Workers(model, WORKERS)
        self.models = nn.ModuleList(self.workers)  # Lightning saves what it knows as modules

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        """The sum over the workers: each one's gradient is of its own part alone."""
        parts = zip(self.workers, *(tensor.chunk(WORKERS) for tensor in batch), strict=True)
        return torch.stack([nn.functional.cross_entropy(worker(x), y) for worker, x, y in parts]).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """An optimizer like any other."""
        inner = torch.optim.SGD(self.workers.parameters(), lr=0.05, momentum=0.9)
        return fastlocal.SlowMo(inner, self.workers, INTERVAL, slow_momentum=0.3)

    def on_train_epoch_end(self) -> None:
        """Closes the round under way, so that what is saved or evaluated is the mean."""
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, fastlocal.SlowMo)
        optimizer.sync()
        print(f"{optimizer.stats.rounds} syncs in {optimizer.stats.local_steps} steps")


def main() -> float:
    """Trains for two epochs; returns the mean model's accuracy on points not trained on, in percent."""
    torch.manual_seed(0)
    centres, labels = torch.randn(10, 64), torch.randint(10, (10_240,))
    points = centres[labels] + 1.5 * torch.randn(len(labels), 64)
    loader = DataLoader(TensorDataset(points[:8192], labels[:8192]), WORKERS * BATCH_SIZE, shuffle=True)
    module = LocalTraining(nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10)))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    lightning.Trainer(max_epochs=2, accelerator="cpu", enable_model_summary=False, **quiet).fit(module, loader)
    mean = module.workers.mean().eval()
    with torch.no_grad():
        return (mean(points[8192:]).argmax(1) == labels[8192:]).float().mean().item() * 100


if __name__ == "__main__":
    print(f"{main():.1f} % of unseen points")
