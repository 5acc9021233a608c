"""The example runs, and each optimizer learns what can be learned."""

import importlib.util
from pathlib import Path

import pytest
import torch

EXAMPLE = Path(__file__).parent.parent / "examples" / "swap_optimizer.py"


def load():
    spec = importlib.util.spec_from_file_location("swap_optimizer", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["sgd", "lars", "lamb"])
def test_one_changed_line_trains_the_same_model(name, capsys):
    state = torch.random.get_rng_state()
    accuracy = load().main(name)
    torch.random.set_rng_state(state)
    assert accuracy > 99.0  # guessing gives 10, and the classes hardly overlap
    assert f"{name}: {accuracy:.1f} % of 4,096 unseen points" in capsys.readouterr().out


def test_an_unknown_optimizer_is_named():
    with pytest.raises(ValueError, match="optimizer must be sgd, lars or lamb, got adam"):
        load().main("adam")
