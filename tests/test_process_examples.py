"""The examples that run under torchrun do, and learn."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def torchrun(example, processes):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    path = ROOT / "examples" / example
    done = subprocess.run(
        [*command, str(path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_local_sgd_under_torchrun_learns_and_says_what_it_sent():
    said = torchrun("torchrun_local_sgd.py", 2)
    # 201 steps in rounds of 16: 12 full ones and a rest; 9,866 parameters and 257 buffer elements, one int64.
    payload = 4 * (64 * 128 + 128 + 2 * 128 + 128 * 10 + 10 + 2 * 128) + 8
    accuracy, rounds, sent = re.search(r"accuracy ([\d.]+) %, (\d+) rounds, ([\d,]+) bytes", said).groups()
    assert float(accuracy) > 95  # guessing gives 10
    assert int(rounds) == 13
    assert int(sent.replace(",", "")) == 13 * payload


def test_slowmo_over_fsdp_learns():
    said = torchrun("fsdp_slowmo.py", 4)
    first, last, rounds = re.search(r"loss ([\d.]+) at first, ([\d.]+) at last; (\d+)", said).groups()
    assert float(last) < 0.5 * float(first)
    assert int(rounds) == 20
