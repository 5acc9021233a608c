"""Between processes; the only module that may import torch.distributed."""

import torch.distributed as dist


def require_single_process() -> None:
    """Raise RuntimeError inside an initialised process group of several processes.

    Rows are averaged within one process so far. Averaging there and nowhere else would train
    each process on its own without a word.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise RuntimeError(
            f"fastlocal averages workers inside one process, but {dist.get_world_size()} processes are running: "
            "use fastlocal.Workers in one process"
        )
