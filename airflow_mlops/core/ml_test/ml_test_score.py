"""ML Test Score: what counts as evidence, and how points become a score.

Source: Breck, Cai, Nielsen, Salib and Sculley, "The ML Test Score: A Rubric for ML Production Readiness and Technical Debt
Reduction", IEEE Big Data 2017, sections II to VI (the tests) and VI (the score).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from airflow_mlops.core.ml_test.ml_tests import TESTS, Part, find_test

if TYPE_CHECKING:
    from airflow_mlops.core.ml_test.facts import Fact, ModelFacts

#: Nothing; done by hand and written down, or not kept up; automated and repeated.
POINTS = (0.0, 0.5, 1.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScorePolicy:
    """When evidence still counts (rules of thumb; the paper gives none).

    :param maximum_windows: a check of a window counts as recurring while the window is among the newest so many.
    :param maximum_days: and no older than this.
    :param release_days: what was found out about the version that serves counts for so long.
    :param attestation_days: how long a person's word counts, unless it says otherwise.
    :raises ValueError: a number that is not above zero.
    """

    maximum_windows: int = 3
    maximum_days: float = 62.0
    release_days: float = 365.0
    attestation_days: float = 365.0

    def __post_init__(self) -> None:
        for name in ("maximum_windows", "maximum_days", "release_days", "attestation_days"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"{name} is {getattr(self, name)}: no evidence would ever count; give more than 0"
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """What a point rests on.

    :param source: ledger entry, artifact or link.
    :param at: when it was written; ``None``: not known.
    :param by: who wrote it.
    """

    source: str
    at: datetime | None
    by: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What a rule found.

    :param points: one of :data:`POINTS`.
    :param sentence: why so many points.
    :param evidence: what they rest on.
    :param concern: what the test found wrong the last time; a test that fails is still a test that is done.
    :raises ValueError: points that rest on nothing.
    """

    points: float
    sentence: str
    evidence: tuple[Evidence, ...] = ()
    concern: str | None = None

    def __post_init__(self) -> None:
        if self.points not in POINTS or (self.points and not self.evidence):
            raise ValueError(
                f"{self.points:g} points with {len(self.evidence)} pieces of evidence: {self.sentence}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class TestPoints:
    """One test's points.

    :param missing: what to do for the rest; ``None``: nothing is missing.
    """

    __test__ = False  # no test of pytest's

    test_id: str
    title: str
    points: float
    sentence: str
    evidence: tuple[Evidence, ...]
    concern: str | None
    missing: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class MLTestScore:
    """A model's score.

    :param model_version: the champion that was scored.
    :param at: when.
    :param score: the smallest of the four sections' sums, in ``[0, 7]``.
    :param interpretation: what the paper says to such a score.
    :param parts: each section's sum.
    :param tests: all 28.
    """

    model_name: str
    model_version: str | None
    at: datetime
    score: float
    interpretation: str
    parts: dict[str, float]
    tests: tuple[TestPoints, ...]


def interpret(score: float) -> str:
    """Say what a score means, after the paper's table.

    >>> interpret(0.0)
    'more of a research project than a productionized system'
    >>> interpret(5.0)
    'strong levels of automated testing and monitoring, appropriate for mission-critical systems'
    """
    if score <= 0.0:
        return "more of a research project than a productionized system"
    for most, words in (
        (1.0, "not totally untested, but serious holes in reliability are to be expected"),
        (2.0, "a first pass at basic productionization, but additional investment may be needed"),
        (3.0, "reasonably tested, but more of the tests and procedures may be automated"),
        (5.0, "strong levels of automated testing and monitoring, appropriate for mission-critical systems"),
    ):
        if score <= most:
            return words
    return "exceptional levels of automated testing and monitoring"


def add_up(facts: ModelFacts, findings: Mapping[str, Finding]) -> MLTestScore:
    """Turn findings into the score.

    :param findings: by test; one for each of the 28.
    """
    tests = tuple(
        TestPoints(
            test_id=test.test_id,
            title=test.title,
            points=(found := findings[test.test_id]).points,
            sentence=found.sentence,
            evidence=found.evidence,
            concern=found.concern,
            missing=test.remedy.replace("score MODEL", f"score {facts.model_name}")
            if found.points < 1.0
            else None,
        )
        for test in TESTS
    )
    parts = {
        str(part): sum(one.points for one in tests if find_test(one.test_id).part is part) for part in Part
    }
    score = min(parts.values())
    return MLTestScore(
        model_name=facts.model_name,
        model_version=facts.champion,
        at=facts.now,
        score=score,
        interpretation=interpret(score),
        parts=parts,
        tests=tests,
    )


def note(fact: Fact) -> Evidence:
    """Name a ledger entry."""
    return Evidence(source=f"ledger entry {fact.entry_id} ({fact.kind})", at=fact.at, by=fact.actor)
