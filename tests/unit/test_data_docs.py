"""The page of a validation: complete by itself, readable on a phone, and what comes from data stays text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
import pytest

from airflow_mlops.core.checks.data_docs import PastVerdict, describe_validation
from airflow_mlops.core.checks.verdict import gates, hide_values, tell_verdict
from airflow_mlops.core.codec import to_dict
from airflow_mlops.core.data.dataset import DatasetVersion
from airflow_mlops.integrations.great_expectations import validate_frame
from tests.browser import CHROMIUM, Tab, open_tab

if TYPE_CHECKING:
    from airflow_mlops.core.page import Page

HOSTILE = [
    "<script>document.title = 'owned'</script>",
    "<img src=https://example.org/x.png onerror=\"document.title='owned'\">",
    "</td></table><style>* { display: none }</style>",
    "שלום עולם \u202egnp.exe",
    "長" * 400,
    "x" * 400,
    "",
]
ROWS = pl.LazyFrame(
    {
        "trip_id": [f"id-{n}" for n in range(40)],
        "comment": [*HOSTILE, *["fine"] * 33],
        "fare": [None, float("nan"), -4.0, -0.5, *[9.5] * 36],
        "<b>&'\"": [1] * 40,
    }
)


def _on(kind: str, column: str, **more: Any) -> dict[str, Any]:
    severity = {"severity": more.pop("severity")} if "severity" in more else {}
    notes = {"notes": more.pop("notes")} if "notes" in more else {}
    return {"type": f"expect_column_{kind}", "kwargs": {"column": column, **more}, **severity, **notes}


SUITE = {
    "name": "trips <i>",
    "expectations": [
        {"type": "expect_table_row_count_to_be_between", "kwargs": {"min_value": 1, "max_value": 1_000}},
        _on("values_to_be_in_set", "comment", value_set=["fine"]),
        _on("values_to_be_between", "fare", min_value=0, mostly=0.99, notes="REVIEW: 2 of 10000 rows were negative"),
        _on("values_to_not_be_null", "fare", severity="warning"),
        _on("mean_to_be_between", "fare", max_value=5, severity="info"),
        _on("values_to_not_match_regex", "comment", regex="owned"),
        _on("values_to_be_in_set", "comment", value_set=["fine", 1]),
        _on("values_to_be_of_type", "<b>&'\"", type_="int64"),
    ],
}  # fmt: skip
VERSION = DatasetVersion(
    uri="s3://lake/" + "very-long-folder-name" * 8 + "/trips",
    version=17,
    dataset_digest="sha256:" + "0123456789abcdef" * 4,
    row_count=40,
    columns={},
)


def page(*, private: tuple[str, ...] = (), quarantine: bool = False, suite: dict[str, Any] = SUITE) -> Page:
    report = validate_frame(ROWS, suite)
    results = hide_values(report["results"], private)
    engines = [one["meta"]["engine"] for one in results]
    outcome = {
        "dataset": to_dict(VERSION),
        "window": {"start": "2024-01-01T00:00:00+00:00", "end": "2024-02-01T00:00:00+00:00"},
        "success": quarantine or report["success"],
        "suite_name": suite["name"],
        "row_count": 40,
        "evaluated": len(results),
        "failed": sum(not one["success"] for one in results),
        "failed_critical": sum(map(gates, results)),
        "engines": {engine: engines.count(engine) for engine in sorted(set(engines))},
        "headline": tell_verdict(results, 40),
        "quarantined": 4 if quarantine else 0,
        "quarantine": to_dict(VERSION) | {"version": 3} if quarantine else None,
    }
    past = PastVerdict(
        recorded_at=datetime(2024, 1, 2, tzinfo=UTC),
        version=16,
        window=None,
        success=False,
        headline=HOSTILE[0],
    )
    return describe_validation(
        outcome,
        results,
        judged=VERSION,
        notes=[item.get("notes") for item in suite["expectations"]],
        row_ids={} if "trip_id" in private else {position: f"id-{position}" for position in range(40)},
        id_column=None if "trip_id" in private else "trip_id",
        history=[past] * 3,
    )  # fmt: skip


def text_of(made: Page) -> str:
    return made.to_markdown().replace("\\", "")


class TestContent:
    def test_what_was_judged_asked_and_found(self) -> None:
        told = text_of(page())
        for wanted in (
            VERSION.uri, "17", VERSION.dataset_digest, "2024-01-01T00:00:00+00:00 to 2024-02-01", "8 judged; 4 critical and 2 other ones failed", "| 8.88158 |",
            "great_expectations (2), polars (6)",
            "| column values to be between (fare) | min_value 0; mostly 0.99 | 2 unexpected (5.26 %) | 2 | critical | polars | REVIEW: 2 of 10000",
            "| column values to be in set (comment) | value_set fine, 1 | 7 unexpected (17.5 %) |  | critical | great expectations |",
            "| column mean to be between (fare) | max_value 5 |", "| table row count to be between | min_value 1; max_value 1000 | 40 |",
            "| id-2 | -4.0 |", "not accepted",
        ):  # fmt: skip
            assert wanted in told, wanted
        assert page().verdict == "failed"

    def test_rows_that_were_set_aside(self) -> None:
        made = page(quarantine=True)
        assert made.verdict == "quarantined"
        assert "Rows set aside: 4 of 40 (10 %)" in text_of(made)

    def test_a_suite_that_holds(self) -> None:
        made = page(suite={"name": "small", "expectations": SUITE["expectations"][:1]})
        assert made.verdict == "passed"
        assert "Expectations that failed" not in text_of(made)

    def test_values_of_private_columns_are_not_shown(self) -> None:
        told = text_of(page(private=("comment", "trip_id")))
        assert "id-" not in told.replace("example", "")
        assert "img src" not in told
        assert "長" not in told
        assert "-4.0" in told  # a column that is not private
        assert "7 unexpected" in told
        assert "a column is private" in told

    def test_it_is_bounded(self) -> None:
        bad = [_on("values_to_be_in_set", "comment", value_set=[f"v{n}"] * 50) for n in range(300)]
        made = page(suite={"name": "large", "expectations": bad})
        assert "(the first 200 of 300)" in text_of(made)
        assert len(made.to_html()) < 1_000_000


def test_nothing_in_it_is_loaded_or_run() -> None:
    written = page().to_html()
    assert "<script" not in written
    assert "default-src 'none'" in written
    assert not re.search(r"<(link|img|iframe|object|embed|base|form|a)\b", written)
    assert not re.search(r"""<[^>]*\s(src|href|srcset|on\w+)\s*=""", written)
    assert not re.search(r"url\(|@import", written)


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    if not CHROMIUM.exists():
        pytest.skip(f"no browser at {CHROMIUM}; apt-get install chromium")
    with open_tab(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


class TestInABrowser:
    """Chromium's own account of what the page asked for and how it lies."""

    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        path = tmp_path / "validation.html"
        path.write_text(page(quarantine=True).to_html(), encoding="utf-8")
        return path

    @pytest.mark.parametrize("dark", [False, True])
    @pytest.mark.parametrize("width", [320, 390, 1200])
    def test_it_fits(self, tab: Tab, file: Path, width: int, dark: bool) -> None:
        tab.open(file, width=width, dark=dark)
        wide = """[...document.querySelectorAll('*')].filter(one => one.getBoundingClientRect().right > innerWidth + 1
                  || one.scrollWidth > one.clientWidth + 1 && one.clientWidth > 0).map(one => one.outerHTML.slice(0, 200))"""
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert tab.evaluate(wide) == []
        assert tab.evaluate("getComputedStyle(document.body).color") == (
            "rgb(255, 255, 255)" if dark else "rgb(0, 0, 0)"
        )

    def test_no_request_leaves(self, tab: Tab, file: Path) -> None:
        tab.requests.clear()
        tab.open(file)
        assert tab.evaluate("document.querySelectorAll('td').length") > 50
        assert tab.requests == [file.as_uri()]

    def test_hostile_values_are_text(self, tab: Tab, file: Path) -> None:
        tab.open(file)
        assert tab.evaluate("document.title") == "trips: validation"
        shown = tab.evaluate("document.body.innerText")
        assert HOSTILE[0] in shown
        assert HOSTILE[2] in shown
        assert "שלום עולם gnp.exe" in shown  # the mark that turns text around is gone
        assert "長" * 100 in shown
        assert tab.evaluate("document.querySelectorAll('script, img, td style, td b').length") == 0
