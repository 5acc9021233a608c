"""The README's Python snippets run as they stand, one after another."""

import re
from pathlib import Path

import pytest
import torch

import fastlocal

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_snippets_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    snippets = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(snippets) >= 3
    names = {}
    for snippet in snippets:
        exec(snippet, names)
    assert "4 rounds, 504 bytes a worker" in capsys.readouterr().out
    assert names["saved"]["optimizer"]["fastlocal"]["method"] == "SlowMo"

    policy, stats, intervals = names["Patient"](4, maximum=16), fastlocal.Stats(), []
    for seen, loss in enumerate([2.0, 1.0, 1.5, 0.5, 0.4, 0.3], start=1):
        stats.observations, stats.val_loss = seen, loss
        intervals.append(policy.next_interval(stats))
    assert intervals == [8, 16, 4, 8, 16, 16]
    other = names["Patient"](4, maximum=16)
    other.load_state_dict(policy.state_dict())
    assert other.next_interval(stats) == 16


def _headings(page):
    """As GitHub names them in links."""
    return {
        re.sub(r"[^\w -]", "", line).strip().lower().replace(" ", "-")
        for line in re.findall(r"^#+ (.*)$", page, re.M)
    }


@pytest.mark.parametrize("page", ["README.md", "bench/results/README.md", "examples/README.md"])
def test_files_and_headings_that_a_page_links_to_exist(page):
    path = ROOT / page
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", path.read_text())
    assert len(links) > 5
    for name, heading in links:
        target = path.parent / name if name else path
        assert target.exists(), f"{page}: {name}"
        assert not heading or heading in _headings(target.read_text()), f"{page}: {name}#{heading}"
