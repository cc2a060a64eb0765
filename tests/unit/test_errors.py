"""Errors that cross a process, and specs nobody can read."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

from airflow_mlops import exceptions
from airflow_mlops.core.errors import describe_error, rebuild_error

OURS = [cls for name, cls in inspect.getmembers(exceptions, inspect.isclass) if name.endswith("Error")]


def carried(err: Exception) -> Exception:
    return rebuild_error(json.loads(json.dumps(describe_error(err))), details="the end of its log")


@pytest.mark.parametrize("cls", OURS, ids=lambda cls: cls.__name__)
def test_our_errors_stay_what_they_are(cls: type[Exception]) -> None:
    gate = issubclass(cls, exceptions.GateFailedError)
    again = carried(cls("words", evidence={"rows": 3}) if gate else cls("words"))
    assert type(again) is cls
    assert str(again) == "words"
    assert getattr(again, "evidence", None) == ({"rows": 3} if gate else None)


def test_an_error_that_needs_more_than_words_becomes_the_nearest_that_does_not() -> None:
    undecodable = UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
    again = carried(undecodable)
    assert type(again) is UnicodeError
    assert str(again) == f"UnicodeDecodeError: {undecodable}"
    assert type(carried(ExceptionGroup("several", [ValueError("one")]))) is RuntimeError


def test_an_error_of_somebody_elses_is_retried_as_what_it_derives_from() -> None:
    with pytest.raises(json.JSONDecodeError) as malformed:
        json.loads("{")
    again = carried(malformed.value)
    assert type(again) is ValueError
    assert str(again).startswith("JSONDecodeError: Expecting property name")

    class Unheard(Exception):  # noqa: N818 - not ours to name
        pass

    again = carried(Unheard("of"))
    assert type(again) is RuntimeError
    assert str(again) == "Unheard: of\nthe end of its log"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "No such file or directory"),
        ("{", "Expecting property name"),
        ("[1]", "holds no JSON object but list"),
        (b"\xff", "can't decode byte"),
    ],
)
def test_a_spec_that_cannot_be_read_is_said_in_a_line(
    tmp_path: Path, text: str | bytes | None, words: str
) -> None:
    spec, result = tmp_path / "spec.json", tmp_path / "result.json"
    if text is not None:
        spec.write_bytes(text if isinstance(text, bytes) else text.encode())
    command = [sys.executable, "-m", "airflow_mlops.steps", "ingest", "--spec", str(spec)]
    done = subprocess.run([*command, "--result", str(result)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert f"error: --spec {spec}" in done.stderr
    assert words in done.stderr
    assert isinstance(rebuild_error(json.loads(result.read_text())["error"]), ValueError)


def test_a_result_that_has_no_folder_is_said_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "spec.json").write_text("{}")
    result = tmp_path / "nowhere" / "result.json"
    command = [sys.executable, "-m", "airflow_mlops.steps", "ingest", "--spec", str(tmp_path / "spec.json")]
    done = subprocess.run([*command, "--result", str(result)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert f"error: --result {result}: there is no folder" in done.stderr
