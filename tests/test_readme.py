"""The Python snippets of the README, then of docs/wrappers.md, run as they stand, one after another."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch

import fastlocal
from fastlocal.train import cli

ROOT = Path(__file__).parent.parent
SNIPPETS = "".join((ROOT / page).read_text() for page in ("README.md", "docs/wrappers.md"))


def test_the_snippets_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    snippets = re.findall(r"```python\n(.*?)```", SNIPPETS, flags=re.DOTALL)
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


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "docs/wrappers.md",
        "docs/trainer.md",
        "docs/plan.md",
        "bench/results/README.md",
        "examples/README.md",
    ],
)
def test_files_and_headings_that_a_page_links_to_exist(page):
    path = ROOT / page
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", path.read_text())
    assert links
    for name, heading in links:
        target = path.parent / name if name else path
        assert target.exists(), f"{page}: {name}"
        assert not heading or heading in _headings(target.read_text()), f"{page}: {name}#{heading}"


PAGES = ["README.md", "docs/trainer.md", "docs/plan.md", "bench/results/README.md"]


def _commands(page):
    """Every command line of ours in the page's shell blocks, one flag list each."""
    for block in re.findall(r"```sh\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if "fastlocal" in words and words[0] != "git" and "cd" not in words:
                yield words[words.index("fastlocal") + 1 :]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_is_one_that_the_command_line_takes(page):
    commands = list(_commands(page))
    assert commands
    for words in commands:
        words = [word.replace("$study", "local-sgd").replace("$runs", "*") for word in words if word != "done"]
        cli.app.parse_args([word.rstrip(";") for word in words], exit_on_error=False, print_error=False)
        for word in words:
            assert not word.endswith(".toml") or (ROOT / word).exists(), words


def test_the_figures_of_the_plan_are_those_that_its_commands_give(capsys):
    page = (ROOT / "docs" / "plan.md").read_text()
    commands = [words for words in _commands("docs/plan.md") if "3.5e8" in words]
    first, second, third = commands
    halved = [*second, "--wire-dtype", "bf16", "--baseline-dtype", "fp32"]
    longer = ["500" if word == "100" else word for word in third]
    for row, (words, changed) in enumerate(zip(commands, (first, halved, longer), strict=True), start=1):
        (line,) = [line for line in page.splitlines() if line.startswith(f"| ({row}) ")]
        for given in (words, changed):
            assert cli.main([*given, "--json"]) == 0
            found = json.loads(capsys.readouterr().out)["estimate"]
            if given is words:
                seconds, synchronous = found["step_seconds"], found["synchronous_step_seconds"]
                assert f"| {seconds:#.3g} ({synchronous:#.3g}) |" in line
                assert f"| {100 * found['communication_share']:.2g} % |" in line
            speedup = found["speedup"]
            assert f" {speedup:#.{2 if speedup < 1 else 3}g}" in line
