"""The score in words: lines for a terminal, a page for a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from airflow_mlops.core.ml_test.ml_tests import Part, find_test
from airflow_mlops.core.page import Page, Section, Table

if TYPE_CHECKING:
    from airflow_mlops.core.ml_test.ml_test_score import Evidence, MLTestScore, TestPoints

_PARTS = {
    Part.DATA: "Data",
    Part.MODEL: "Model",
    Part.INFRASTRUCTURE: "Infrastructure",
    Part.MONITORING: "Monitoring",
}


def score_text(score: MLTestScore) -> str:
    """Write a score for a terminal: the sum, each test with its points and why, and what to do."""
    version = f"version {score.model_version}" if score.model_version else "no version serves"
    parts = ", ".join(f"{_PARTS[Part(name)].lower()} {points:g}" for name, points in score.parts.items())
    lines = [
        f"ML Test Score of {score.model_name} ({version}): {score.score:g} of 7, {score.interpretation}",
        f"the least of: {parts}",
    ]
    for one in score.tests:
        lines += ["", f"{one.points:<3g}  {one.test_id:<9}  {one.title}", f"     {one.sentence}"]
        lines += [f"     found wrong: {one.concern}"] if one.concern else []
        lines += [f"     by {proof}" for proof in map(_told, one.evidence)]
        lines += [f"     to do: {one.missing}"] if one.missing else []
    return "\n".join(lines) + "\n"


def describe_score(score: MLTestScore) -> Page:
    """Compose the page of a score, in plain words."""
    version = f"version {score.model_version}" if score.model_version else "no version serves"
    weakest = ", ".join(_PARTS[Part(name)] for name, points in score.parts.items() if points == score.score)
    overview = Section(
        title="The score",
        facts=(
            ("Score", f"{score.score:g} of 7"),
            ("Which means", score.interpretation),
            *((_PARTS[Part(name)], f"{points:g} of 7") for name, points in score.parts.items()),
        ),
        notes=(
            f"The score is that of the weakest part ({weakest}): work there raises it, work elsewhere does not.",
            "A test gives 1 when it is automated and repeated, 0.5 when it was done by hand and written down, or is not kept up, "
            "0 when nothing shows that it is done. A point is for testing, whatever the test found.",
        ),
    )
    concerns = tuple(f"{one.test_id}: {one.concern}" for one in score.tests if one.concern)
    found = Section(title="What the tests found wrong", notes=concerns)
    sections = [
        Section(title=f"{title}: {score.parts[part]:g} of 7", tables=(_table(score.tests, part),))
        for part, title in _PARTS.items()
    ]
    weakest_first = sorted(score.tests, key=lambda one: score.parts[find_test(one.test_id).part])
    missing = tuple((one.test_id, one.missing) for one in weakest_first if one.missing)
    to_do = Section(
        title="What is missing",
        tables=(
            (
                "What to do for the rest of the points, the weakest part first",
                Table(header=("Test", "Do"), rows=missing),
            ),
        )
        if missing
        else (),
    )
    return Page(
        title=f"{score.model_name}: ML Test Score",
        lead=f"{score.score:g} of 7 ({version}, {score.at:%Y-%m-%d}): {score.interpretation}.",
        verdict=None,
        sections=tuple(section for section in (overview, found, *sections, to_do) if not section.empty),
    )


def _table(tests: Sequence[TestPoints], part: Part) -> tuple[str, Table]:
    mine = [one for one in tests if find_test(one.test_id).part is part]
    return "Tests", Table(
        header=("Test", "Points", "Why", "Evidence"),
        rows=tuple(
            (f"{one.test_id}: {one.title}", f"{one.points:g}", one.sentence, _evidence(one.evidence))
            for one in mine
        ),
    )


def _evidence(evidence: Sequence[Evidence]) -> str:
    return "; ".join(map(_told, evidence)) or "-"


def _told(evidence: Evidence) -> str:
    at = f", {evidence.at:%Y-%m-%d %H:%M}" if evidence.at else ""
    return f"{evidence.source}{at}, {evidence.by}"
