"""Kill a run at random, again and again, and compare it with one that was left in peace.

    python bench/kills.py [--processes 2] [--kills 20] [--epochs 40] [--out bench/results/kills.jsonl]

torchrun starts the processes anew after each SIGKILL, and they go on from the last checkpoint. A round that was lost
or repeated would leave other parameters: both runs must end with the same bits and the same records. A kill counts
once torchrun has started the processes that follow it. Reads /proc, so it needs Linux.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from fastlocal.bench import machine

RUN = ["--synthetic-images", "2000", "--batch-size", "16", "--interval", "8", "--method", "slowmo"]
CLOCK = ("train_seconds", "sync_seconds")


class Job:
    """A run under torchrun; at the end of the `with` block nothing of it is left.

    Args:
        processes: how many, one worker each.
        restarts: how often torchrun may start them anew.
        epochs: of the run.
        out: its folder.
    """

    def __init__(self, processes: int, restarts: int, epochs: int, out: Path) -> None:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command += [f"--max-restarts={restarts}", "-m", "fastlocal", "train", "--workers", str(processes), *RUN]
        command += ["--epochs", str(epochs), "--out", str(out)]
        self.torchrun = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        left = [pid for pid, _, _ in self.workers()]
        self.torchrun.terminate()  # it ends its processes
        try:
            self.torchrun.wait(30)
        except subprocess.TimeoutExpired:
            self.torchrun.kill()
            self.torchrun.wait()
            for pid in left:
                if Path(f"/proc/{pid}").exists():
                    os.kill(pid, signal.SIGKILL)

    def workers(self) -> list[tuple[int, int, int]]:
        """(process id, rank, restarts before it) of the processes that run now."""
        if self.torchrun.poll() is not None:
            return []
        found = []
        children = Path(f"/proc/{self.torchrun.pid}/task/{self.torchrun.pid}/children").read_text().split()
        for pid in map(int, children):
            try:
                lines = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
            except OSError:  # it has just ended
                continue
            told = dict(line.split("=", 1) for line in lines if "=" in line)
            if "TORCHELASTIC_RESTART_COUNT" in told:
                found.append((pid, int(told["RANK"]), int(told["TORCHELASTIC_RESTART_COUNT"])))
        return found


def kill_repeatedly(job: Job, checkpoint: Path, kills: int, rng: random.Random) -> list[int]:
    """Kill a process at random `kills` times, each after a new checkpoint; the ranks of those that were followed.

    Raises:
        SystemExit: the run ended before.
    """
    ranks: list[int] = []
    seen = 0
    while len(ranks) < kills:
        while not checkpoint.exists() or checkpoint.stat().st_mtime_ns == seen:  # it makes progress in between
            wait(job, ranks)
        time.sleep(rng.uniform(0, 0.5))
        running = job.workers()
        if not running:
            wait(job, ranks)
            continue
        seen = checkpoint.stat().st_mtime_ns
        pid, rank, before = rng.choice(running)
        os.kill(pid, signal.SIGKILL)
        while not any(restarts > before for _, _, restarts in job.workers()):
            wait(job, ranks)
        ranks.append(rank)
    return ranks


def wait(job: Job, ranks: list[int]) -> None:
    """A moment, while the run is under way."""
    if job.torchrun.poll() is not None:
        raise SystemExit(f"the run ended after {len(ranks)} restarts: give it more epochs")
    time.sleep(0.01)


def outcome(folder: Path) -> tuple[list[dict], list[dict]]:
    """All workers' parameters, and the records without what the clock says."""
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    return state["workers"], [{k: v for k, v in record.items() if k not in CLOCK} for record in records]


def main() -> None:
    """Run both, kill one, compare, print a line and append it to a file if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no process is left behind in any case
    processes, kills, epochs = arguments.processes, arguments.kills, arguments.epochs
    with tempfile.TemporaryDirectory() as folder:
        peaceful, killed = Path(folder) / "peaceful", Path(folder) / "killed"
        with Job(processes, 0, epochs, peaceful) as job:
            if job.torchrun.wait():
                raise SystemExit("the run that nobody disturbs failed")
        with Job(processes, kills, epochs, killed) as job:
            ranks = kill_repeatedly(job, killed / "checkpoint.pt", kills, random.Random(arguments.seed))
            if job.torchrun.wait():
                raise SystemExit("the killed run did not come to its end")
        (workers, records), (workers2, records2) = outcome(peaceful), outcome(killed)
    same_bits = all(
        torch.equal(one[name], other[name]) for one, other in zip(workers, workers2, strict=True) for name in one
    )
    row = {
        **machine.origin("cpu"),
        "processes": processes,
        "restarts": len(ranks),
        "killed_ranks": ranks,
        "epochs": len(records),
        "rounds": records[-1]["rounds"],
        "same_bits": same_bits,
        "same_records": records == records2,
    }
    print(json.dumps(row))
    machine.append_rows(arguments.out, row)
    if not (same_bits and records == records2):
        raise SystemExit("the runs differ")


if __name__ == "__main__":
    main()
