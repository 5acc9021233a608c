"""PyTorch's own optimizer tests on LARS and LAMB, where PYTORCH_TEST_OPTIM names its test/test_optim.py."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

PATH = os.environ.get("PYTORCH_TEST_OPTIM")


@pytest.mark.skipif(PATH is None, reason="PYTORCH_TEST_OPTIM does not name PyTorch's test/test_optim.py")
@pytest.mark.skipif(importlib.util.find_spec("expecttest") is None, reason="expecttest is not installed")
@pytest.mark.parametrize("interpreted", ["0", "1"])  # whether fused steps run too, in Triton's interpreter
def test_both_optimizers_pass_pytorchs_own_tests(interpreted):
    script = [sys.executable, str(Path(__file__).parent / "pytorch_optimizer_tests.py"), str(PATH)]
    environment = {**os.environ, "TRITON_INTERPRET": interpreted}
    done = subprocess.run(script, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
