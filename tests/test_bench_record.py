"""What bench/record.py keeps of finished runs, and what bench/plot.py draws of that."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "bench" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


record, plot = load("record"), load("plot")


def finish(folder, *, sent=(1e6, 2e6, 4e6), epochs=3, seconds=60.5):
    """The files of a finished run of three epochs, the second of which was not evaluated."""
    folder.mkdir(parents=True)
    config = {"epochs": epochs, "lr": 0.1, "data_dir": "/home/me/data", "out": str(folder)}
    summary = {"best_val_accuracy": 30.0, "bytes_on_wire": sent[-1], "train_seconds": seconds, "sync_seconds": 1.0}
    summary |= {"folder": str(folder), "config": config, "resolved": {"lr": 0.1}, "images": {"source": "re-split"}}
    (folder / "summary.json").write_text(json.dumps(summary))
    lines = [
        {"epoch": epoch, "val_accuracy": accuracy, "val_loss": accuracy, "bytes_on_wire": num_bytes, "rounds": epoch}
        for epoch, accuracy, num_bytes in zip((1, 2, 3), (10.0, None, 30.0), sent, strict=True)
    ]
    (folder / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_study_becomes_one_line_a_finished_run_and_no_run_a_second_line(tmp_path):
    finish(tmp_path / "study" / "a-s0")
    (tmp_path / "study" / "b-s0").mkdir()  # not finished
    results = tmp_path / "results" / "study.jsonl"
    assert record.record(results, "abc1234", [tmp_path / "study"]) == ["a-s0"]
    (row,) = map(json.loads, results.read_text().splitlines())
    assert (row["run"], row["commit"]) == ("a-s0", "abc1234")
    assert row["epochs"] == {
        "val_accuracy": [10.0, None, 30.0],
        "val_loss": [10.0, None, 30.0],
        "bytes_on_wire": [1e6, 2e6, 4e6],
        "rounds": [1, 2, 3],
    }
    assert row["config"] == {"epochs": 3, "lr": 0.1}
    assert str(tmp_path) not in results.read_text()
    finish(tmp_path / "study" / "c-s0")
    assert record.record(results, "abc1234", [tmp_path / "study", tmp_path / "study" / "a-s0"]) == ["c-s0"]
    assert len(results.read_text().splitlines()) == 2


def test_a_folder_without_a_finished_run_is_named_and_nothing_is_written(tmp_path, monkeypatch):
    results = tmp_path / "study.jsonl"
    monkeypatch.setattr(sys, "argv", ["record.py", str(results), "abc1234", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match="there is no finished run in .*none"):
        record.main()
    assert not results.exists()


def test_the_plot_has_a_line_a_run_over_epochs_and_over_megabytes(tmp_path):
    for name, values in (
        ("local", {}),
        ("alone", {"sent": (0, 0, 0), "seconds": 50.0}),
        ("longer", {"sent": (3e6, 5e6, 6e6), "epochs": 9}),
    ):
        finish(tmp_path / name, **values)
    rows = [record.row(tmp_path / name, "abc1234") for name in ("local", "alone", "longer")]
    by_epoch, by_bytes = plot.draw(rows).axes
    assert [list(map(list, line.get_data())) for line in by_epoch.lines] == 3 * [[[1, 3], [10.0, 30.0]]]
    assert [line.get_label() for line in by_epoch.lines] == ["local, 3 epochs", "alone, 3 epochs", "longer, 9 epochs"]
    local, alone, longer = by_bytes.lines
    assert list(map(list, local.get_data())) == [[1.0, 4.0], [10.0, 30.0]]
    assert set(alone.get_ydata()) == {30.0}  # its best, as a level: it has sent nothing
    assert list(longer.get_xdata()) == [3.0, 6.0]


def test_the_plot_takes_committed_rows_by_name(tmp_path, monkeypatch):
    results = ROOT / "bench" / "results" / "study" / "headline.jsonl"
    command = ["plot.py", str(tmp_path / "figure.png"), str(results), "--only"]
    monkeypatch.setattr(sys, "argv", [*command, "localsgd*"])
    plot.main()
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(sys, "argv", [*command, "none"])
    with pytest.raises(SystemExit):
        plot.main()
