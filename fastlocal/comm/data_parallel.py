"""DistributedDataParallel beside a wrapper: whether it averages what the workers are to keep apart."""

from collections.abc import Iterable, Sequence

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def averages_gradients(modules: Iterable[nn.Module], ranks: Sequence[int]) -> bool:
    """Whether one of the modules is under a DistributedDataParallel that all of these global ranks are in, and its
    last forward pass was one of training, not inside of its `no_sync()`.

    One of fewer ranks makes these a worker together; one with a hook of its own sends what that says.
    """
    return any(
        isinstance(part, DistributedDataParallel)
        and part.training
        and part._lazy_init_ran  # a forward pass has come by it
        and part.require_forward_param_sync
        and not part._comm_hooks
        and {*ranks} <= {*dist.get_process_group_ranks(part.process_group)}
        for module in modules
        for part in module.modules()
    )
