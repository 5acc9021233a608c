"""The README's Python snippets run as they stand, one after another."""

import re
from pathlib import Path

import pytest
import torch

README = (Path(__file__).parent.parent / "README.md").read_text()


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


@pytest.mark.parametrize("figure", re.findall(r"\]\(((?:bench|examples)/[^)#]+)\)", README))
def test_files_that_the_readme_names_exist(figure):
    assert (Path(__file__).parent.parent / figure).exists()
