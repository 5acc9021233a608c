"""One of the processes of test_many_processes.py: it runs every scenario, one after the other.

Each rank writes FOLDER/SCENARIO.RANK: "ok", or the traceback. A scenario has groups of its own, so that one that
fails does not break the next.
"""

import functools
import os
import sys
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from tests.many_processes.scenarios import SCENARIOS
from tests.many_processes.team import ALONE, WORLD


def main(rank, folder, chosen=()):
    torch.set_num_threads(1)
    # Many scenarios give every rank the same numbers, which a user had better not.
    warnings.filterwarnings("ignore", "all processes have the same gradients")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    groups = [dist.new_group([number]) for number in range(WORLD)]
    ALONE.append(groups[rank])
    for scenario in SCENARIOS:
        if chosen and scenario.__name__ not in chosen:
            continue
        started = time.monotonic()
        try:
            scenario(rank, functools.partial(dist.new_group, timeout=timedelta(seconds=30)))
            outcome = "ok"
        except BaseException:
            outcome = traceback.format_exc()
        Path(folder, f"{scenario.__name__}.{rank}").write_text(outcome)
        if chosen or os.environ.get("FASTLOCAL_TIMES"):
            print(f"{rank} {time.monotonic() - started:6.2f} s {scenario.__name__} {outcome}", flush=True)
    os._exit(0)  # a broken group cannot be destroyed in order


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
