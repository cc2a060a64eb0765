from __future__ import annotations

import io
from datetime import UTC, datetime
from pathlib import Path

import pytest

from airflow_mlops.cli import main
from airflow_mlops.core.codec import from_dict, to_dict
from airflow_mlops.demo.console import Console
from airflow_mlops.demo.runner import run
from airflow_mlops.demo.story import Story, WindowStory, draw, table
from airflow_mlops.ledger import EntryKind, Ledger, LedgerEntry

REASON = "degraded: MAE 2.61 on 6000 labelled rows, 1.48 at training (77% worse); none of 7 inputs moved"


def told(window: str, live: float, first: float, *, promoted: str | None = None) -> WindowStory:
    return WindowStory(
        window=window,
        rows=6000,
        model_version="1",
        live_error=live,
        first_error=first,
        outcome="retrain" if promoted else "nothing",
        reason=REASON,
        promoted_version=promoted,
    )


WINDOWS = (
    told("2019-01", 1.43, 1.43),
    told("2019-02", 2.61, 2.61, promoted="2"),
    told("2019-03", 1.48, 2.79),
)


def test_the_table_has_a_line_per_window_and_the_reason_where_something_was_decided():
    lines = table(WINDOWS, width=70).splitlines()
    assert lines[0].split() == [
        "window",
        "trips",
        "version",
        "MAE",
        "live",
        "MAE",
        "first",
        "model",
        "decision",
    ]
    assert lines[2].split() == ["2019-01", "6000", "1", "1.43", "1.43", "nothing"]
    assert lines[3].endswith("retrain -> version 2")
    assert " ".join(line.strip() for line in lines[4:-1]) == REASON
    assert lines[-1].split() == ["2019-03", "6000", "1", "1.48", "2.79", "nothing"]
    assert max(map(len, lines)) <= 80


def test_the_story_survives_its_file():
    story = Story(windows=WINDOWS, links={"endpoint": "http://127.0.0.1:1"}, seconds={"start": 1.5})
    assert from_dict(Story, to_dict(story)) == story


@pytest.mark.parametrize("windows", [WINDOWS, WINDOWS[:1]])
def test_the_picture_is_a_png(tmp_path: Path, windows: tuple[WindowStory, ...]):
    draw(windows, tmp_path / "picture.png", change=("2019-02", "every trip +$2.50"))
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colors_and_progress_are_for_terminals_only():
    file, terminal = io.StringIO(), Terminal()
    for stream in (file, terminal):
        console = Console(stream)
        console.progress("working")
        console.good("done")
        console.bad("failed")
    assert "\033" not in file.getvalue()
    assert "working" not in file.getvalue()
    assert "working" in terminal.getvalue()
    assert "\033[32mdone\033[0m" in terminal.getvalue()


def test_long_words_such_as_links_are_not_broken():
    stream = io.StringIO()
    Console(stream).say("see http://127.0.0.1:5000/" + "x" * 200)
    assert "http://127.0.0.1:5000/" + "x" * 200 in stream.getvalue()


class ClosedPipe(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


def test_nobody_listening_ends_the_demo_once_and_quietly(tmp_path: Path):
    console = Console(ClosedPipe())
    assert run(data=None, workspace=tmp_path / "demo", keep_up=False, console=console) == 1


def test_a_workspace_with_somebodys_files_is_refused_before_anything_starts(tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("mine")
    stream = io.StringIO()
    assert run(data=None, workspace=tmp_path, keep_up=False, console=Console(stream)) == 1
    assert "is not empty and no folder of this demo" in stream.getvalue()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_data_file_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    absent = tmp_path / "absent.parquet"
    assert main(["demo", "--data", str(absent), "--workspace", str(tmp_path / "demo")]) == 1
    assert f"no readable Parquet file at {absent}" in capsys.readouterr().out
    assert not (tmp_path / "demo").exists()


def test_windows_must_be_a_count(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="2"):
        main(["demo", "--windows", "0"])
    assert "'0' is no whole number from 1 to" in capsys.readouterr().err


def test_the_ledger_is_made_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    assert main(["ledger", url, "--migrate"]) == 0
    with Ledger.open(url) as ledger:
        for number, model in enumerate(["fares", "fares", "tips"]):
            ledger.record(
                LedgerEntry(
                    kind=EntryKind.PROMOTION,
                    key=str(number),
                    model_name=model,
                    window=None,
                    subject=None,
                    summary=f"entry {number} of {model}",
                    payload={},
                    actor="test",
                    recorded_at=datetime(2026, 1, 1, tzinfo=UTC),
                )
            )
    capsys.readouterr()
    assert main(["ledger", url, "--model", "fares"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[-1] for line in lines] == ["entry 0 of fares", "entry 1 of fares"]


def test_a_missing_ledger_url_says_how_to_give_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.delenv("AIRFLOW_MLOPS_LEDGER_URL", raising=False)
    assert main(["ledger"]) == 1
    assert "AIRFLOW_MLOPS_LEDGER_URL" in capsys.readouterr().err
