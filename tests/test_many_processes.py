"""Training in several processes: real ones, that talk through gloo. What they do is in many_processes/."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.many_processes import failures
from tests.many_processes.scenarios import SCENARIOS
from tests.many_processes.team import WORLD

# From which scenario on a rank is no longer there.
KILLED = {
    2: failures.a_rank_that_is_killed_is_named_by_the_others,
    3: failures.a_rank_that_dies_between_header_and_transfer_is_named_by_the_others,
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Scenario and rank -> what the rank wrote; all scenarios ran in the same four processes."""
    folder = tmp_path_factory.mktemp("processes")
    root = Path(__file__).parent.parent
    environment = os.environ | {"PYTHONPATH": str(root)}
    command = [sys.executable, "-W", "error", "-m", "tests.many_processes"]
    ranks = [subprocess.Popen([*command, str(rank), str(folder)], env=environment) for rank in range(WORLD)]
    try:
        for process in ranks:
            process.wait(timeout=240)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    return {tuple(path.name.split(".")): path.read_text() for path in folder.glob("*.?")}


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_in_four_processes(outcomes, scenario):
    for rank in range(WORLD):
        if rank in KILLED and SCENARIOS.index(scenario) >= SCENARIOS.index(KILLED[rank]):
            assert (scenario.__name__, str(rank)) not in outcomes
        else:
            assert outcomes.get((scenario.__name__, str(rank)), "never finished") == "ok"
