"""Every example runs as it stands, offline, and does what it says."""

import importlib.util
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _own_generator():
    """The examples seed the global generator; other tests shall not notice."""
    with torch.random.fork_rng():
        yield


def test_workers_in_one_process_learn_with_an_eighth_of_the_bytes(capsys):
    accuracy, sent, synchronous = load("workers_in_one_process").main(interval=8)
    assert accuracy > 99.0  # guessing gives 10, and the classes hardly overlap
    # 32 steps an epoch are 4 rounds of 8; (64·256 + 256 + 256·10 + 10) float32, 2·3/4 times, in 8 rounds.
    assert sent == 8 * 2 * 3 * 19_210 * 4 // 4
    assert synchronous == 8 * sent
    assert "a worker sent 0.9 MB; averaging in every step sends 7.4 MB" in capsys.readouterr().out


def test_a_policy_of_ones_own_chooses_the_intervals():
    intervals, loss = load("own_policy").main(60)
    assert intervals == [1, 1, 1, 2, 2, 2, 4, 4, 4, 8, 8, 8]
    assert loss < 0.01  # of a line without noise; 8 before


def test_the_policy_of_the_example_goes_on_from_its_state():
    example = load("own_policy")
    policy, other = example.Doubling(3, 16), example.Doubling(3, 16)
    straight = [policy.next_interval(None) for _ in range(20)]
    policy = example.Doubling(3, 16)
    begun = [policy.next_interval(None) for _ in range(7)]
    other.load_state_dict(policy.state_dict())
    assert begun + [other.next_interval(None) for _ in range(13)] == straight


def test_the_language_model_reads_more_than_the_frequencies_of_letters(capsys):
    entropy, before, after = load("char_language_model").main()
    # Counting letters cannot do better than their entropy, 2.55; before training all 28 are equally likely: ln 28.
    assert 2.4 < entropy < 2.7
    assert 3.2 < before < 3.5
    assert after < 0.5 * entropy
    assert "syncs in 60 steps" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")  # Lightning's own
def test_a_lightning_module_trains_four_workers():
    pytest.importorskip("pytorch_lightning")
    assert load("lightning_module").main() > 99.0


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_fits_on_a_page_and_is_in_the_list(path):
    assert len(path.read_text().splitlines()) <= 60
    assert f"({path.name})" in (EXAMPLES / "README.md").read_text()
