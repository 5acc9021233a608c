"""SlowMo for a small character language model, on sentences made on the spot."""

import random

import torch
from torch import Tensor, nn

import fastlocal

WORKERS, INTERVAL, STEPS, CONTEXT, BATCH_SIZE = 4, 8, 60, 40, 16
ALPHABET = " .abcdefghijklmnopqrstuvwxyz"
NOUNS, VERBS = ("cat", "worker", "river", "kernel"), ("sees", "follows", "averages", "trains")


def make_text(sentences: int, seed: int) -> Tensor:
    """Ids of the letters of sentences such as "the cat sees the river."."""
    rng = random.Random(seed)
    each = [f"the {rng.choice(NOUNS)} {rng.choice(VERBS)} the {rng.choice(NOUNS)}. " for _ in range(sentences)]
    return torch.tensor([ALPHABET.index(letter) for letter in "".join(each)])


class Model(nn.Module):
    """A recurrent network that predicts each of ids[:, 1:] from those before; ids has the shape (batch, time)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(len(ALPHABET), 24), nn.Linear(64, len(ALPHABET))
        self.memory = nn.GRU(24, 64, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        """The loss, in nats a character."""
        logits = self.head(self.memory(self.embedding(ids[:, :-1]))[0])
        return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def main() -> tuple[float, float, float]:
    """Trains; returns the unigram entropy and the loss on unseen sentences before and after, in nats a character."""
    torch.manual_seed(0)
    *texts, unseen = [make_text(500, seed) for seed in range(WORKERS + 1)]  # each worker reads its own
    entropy = torch.special.entr(unseen.bincount() / len(unseen)).sum().item()  # the least loss without memory
    workers = fastlocal.Workers(Model(), WORKERS)
    adam = torch.optim.AdamW(workers.parameters(), lr=1e-2)
    optimizer = fastlocal.SlowMo(adam, workers, INTERVAL, slow_momentum=0.3)
    before = workers.mean()(unseen[None]).item()
    for _ in range(STEPS):
        optimizer.zero_grad()
        for worker, text in zip(workers, texts, strict=True):
            starts = torch.randint(len(text) - CONTEXT, (BATCH_SIZE, 1))
            worker(text[starts + torch.arange(CONTEXT + 1)]).backward()
        optimizer.step()
    optimizer.sync()
    after = workers.mean()(unseen[None]).item()
    print(f"nats a character: {before:.3f} before, {after:.3f} after, {entropy:.3f} by counting letters")
    stats, saved = optimizer.stats, optimizer.stats.bytes_synchronous - optimizer.stats.bytes_on_wire
    print(f"{stats.rounds} syncs in {STEPS} steps: a worker sent {saved / 1e6:.1f} MB less")
    return entropy, before, after


if __name__ == "__main__":
    main()
