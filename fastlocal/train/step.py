"""Forward and backward of all workers: the part of a local step that is the same every time.

On a GPU it is recorded once as a CUDA graph, each worker on a stream of its own, and replayed: small networks are
limited by the launches otherwise. Nothing in it is read back from the device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastlocal.train.augment import Augmenter
from fastlocal.train.config import Precision

_CALLS_BEFORE_CAPTURE = 3
"""On the streams of the graph, so that libraries have chosen their algorithms and made their workspaces."""


def forward(model: nn.Module, images: Tensor, precision: Precision) -> Tensor:
    """The model's outputs in float32."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
        return model(images).float()


class Gradients:
    """Leaves in each worker's `.grad` the gradient of its own batch.

    Args:
        models: the workers, in whatever is to be called instead of them.
        data: each worker's images.
        batch_size: images of each.
        precision: of the forward pass.
        record: whether to make a CUDA graph of it where there is CUDA; not of models that communicate.

    Attributes:
        losses: float64, (K, 2), each worker's sum and number of finite losses since they were zeroed.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        data: Sequence[Augmenter],
        batch_size: int,
        precision: Precision,
        *,
        record: bool = True,
    ) -> None:
        self.models, self.data = list(models), data
        self.precision: Precision = precision
        self.device = data[0].labels.device
        self.losses = torch.zeros(len(models), 2, dtype=torch.float64, device=self.device)
        self.picks = torch.zeros(len(models), 4, batch_size, dtype=torch.int64, device=self.device)
        self.records = record and self.device.type == "cuda"
        self.streams = [torch.cuda.Stream(self.device) for _ in models] if self.records else []
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, picks: Tensor) -> None:
        """Of one batch a worker.

        Args:
            picks: int64, (K, 4, batch_size), columns of the workers' plans.
        """
        self.picks.copy_(picks)
        if not self.records:
            self._clear()
            for worker in range(len(self.models)):
                self._compute(worker)
        elif self.graph is not None:
            self.graph.replay()
        elif self.calls < _CALLS_BEFORE_CAPTURE:
            self.calls += 1
            self._clear()
            self._compute_on_streams()
        else:
            # The gradients that the recording allocates are the ones that every replay writes.
            self._clear()
            self.graph = torch.cuda.CUDAGraph()
            # Its own choice of a stream is one of the device that was current when a graph was first made.
            with torch.cuda.device(self.device), torch.cuda.graph(self.graph, stream=torch.cuda.Stream(self.device)):
                self._compute_on_streams()
            self.graph.replay()

    def _clear(self) -> None:
        for model in self.models:
            model.zero_grad()

    def _compute_on_streams(self) -> None:
        main = torch.cuda.current_stream(self.device)
        for worker, stream in enumerate(self.streams):
            stream.wait_stream(main)
            with torch.cuda.stream(stream):
                self._compute(worker)
        for stream in self.streams:
            main.wait_stream(stream)

    def _compute(self, worker: int) -> None:
        images, labels = self.data[worker].batch(self.picks[worker])
        loss = nn.functional.cross_entropy(forward(self.models[worker], images, self.precision), labels)
        loss.backward()
        # A worker that diverges alone is healed by the next sync; its loss says nothing about the others.
        finite = loss.detach().isfinite()
        self.losses[worker] += torch.stack([torch.where(finite, loss.detach(), 0.0), finite.float()])
