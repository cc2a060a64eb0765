"""ML Test Score: what the 28 tests are, what counts as evidence, and how points become a score.

Source: Breck, Cai, Nielsen, Salib and Sculley, "The ML Test Score: A Rubric for ML Production Readiness and Technical Debt
Reduction", IEEE Big Data 2017, sections II to VI (the tests) and VI (the score).
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any
from urllib.parse import urlsplit

from airflow_mlops.core.page import Page, Section, Table
from airflow_mlops.core.windows import Window

#: How the id of a Dag run begins that Airflow started by itself; a backfill is asked for by a person.
_UNATTENDED = ("scheduled__", "asset_triggered__", "operator_triggered__")

#: Nothing; done by hand and written down, or not kept up; automated and repeated.
POINTS = (0.0, 0.5, 1.0)


class Part(StrEnum):
    """The four sections; the weakest is the score."""

    DATA = "data"
    MODEL = "model"
    INFRASTRUCTURE = "infra"
    MONITORING = "monitor"


@dataclass(frozen=True, kw_only=True, slots=True)
class MLTest:
    """One of the 28.

    :param test_id: section and number in the paper, such as ``data-5``.
    :param title: what is to hold.
    :param remedy: what to do where it is missing.
    :param attestable: whether a person may vouch for it, as this package can't know, or not all of it.
    """

    test_id: str
    title: str
    remedy: str
    attestable: bool = False

    @property
    def part(self) -> Part:
        """Its section."""
        return Part(self.test_id.partition("-")[0])


_ATTEST = "check it, then say so: airflow-mlops score MODEL --attest {} --by NAME --evidence LINK (--automated where a job does it)"


def _person(test_id: str, title: str, first: str = "") -> MLTest:
    return MLTest(test_id=test_id, title=title, remedy=f"{first}{_ATTEST.format(test_id)}", attestable=True)


TESTS = (
    MLTest(
        test_id="data-1",
        title="Feature expectations are captured in a schema",
        remedy="add ValidateDatasetOperator with a suite to the Dag that ingests the model's table, and schedule it",
    ),
    MLTest(
        test_id="data-2",
        title="All features are beneficial",
        remedy="add ExplainModelOperator behind the training: it measures what each feature is worth",
    ),
    _person("data-3", "No feature's cost is too much"),
    _person("data-4", "Features adhere to meta-level requirements"),
    _person("data-5", "The data pipeline has appropriate privacy controls"),
    _person("data-6", "New features can be added quickly"),
    _person("data-7", "All input feature code is tested"),
    _person(
        "model-1",
        "Model specs are reviewed and submitted",
        "train from a clean git checkout, so that the run names the commit; that it was reviewed, a person says: ",
    ),
    MLTest(
        test_id="model-2",
        title="Offline and online metrics correlate",
        remedy="schedule CheckPerformanceOperator with labels; from three versions on, what was promised is held against what came",
    ),
    MLTest(
        test_id="model-3",
        title="All hyperparameters have been tuned",
        remedy="give TrainModelOperator a search over more than one parameter set",
    ),
    MLTest(
        test_id="model-4",
        title="The impact of model staleness is known",
        remedy="add CompareChallengersOperator to the Dag that monitors: models of different age on the same rows show what age costs",
    ),
    MLTest(
        test_id="model-5",
        title="A simpler model is not better",
        remedy="evaluate every training with EvaluateModelOperator: it has to beat a simple guess beyond chance",
    ),
    MLTest(
        test_id="model-6",
        title="Model quality is sufficient on all important data slices",
        remedy="leave `slices` of EvaluateModelOperator unset (all inputs) or name columns; slices are held against a champion, "
        "so the first version of a model has none",
    ),
    MLTest(
        test_id="model-7",
        title="The model has been tested for considerations of inclusion",
        remedy="name the columns with groups of people in `groups` of EvaluateModelOperator, and set maximum_group_difference",
    ),
    _person(
        "infra-1",
        "Training is reproducible",
        "train the same rows and parameters again into another experiment (TrainModelOperator, `experiment`) and let the ledger "
        "compare, or ",
    ),
    _person("infra-2", "Model specification code is unit tested"),
    _person("infra-3", "The full ML pipeline is integration tested"),
    MLTest(
        test_id="infra-4",
        title="Model quality is validated before attempting to serve it",
        remedy="promote with PromoteModelOperator behind EvaluateModelOperator, not by hand",
    ),
    MLTest(
        test_id="infra-5",
        title="The model allows debugging by observing step by step on a single example",
        remedy="add ExplainModelOperator behind the training with explained_rows above zero: it tells what each input did to an answer",
    ),
    _person(
        "infra-6",
        "Models are tested via a canary process before they enter production serving",
        "deploy with strategy='canary' (DeployModelOperator); where another canary takes a share of the traffic, ",
    ),
    MLTest(
        test_id="infra-7",
        title="Models can be quickly and safely rolled back to a previous serving version",
        remedy="rehearse it once a year: RollBackModelOperator, then DeployModelOperator",
    ),
    _person("monitor-1", "Dependency changes result in notification"),
    MLTest(
        test_id="monitor-2",
        title="Data invariants hold in training and serving inputs",
        remedy="schedule ValidateDatasetOperator on the table and CheckDriftOperator on what is asked of the service",
    ),
    MLTest(
        test_id="monitor-3",
        title="Training and serving features compute the same values",
        remedy="schedule CheckDriftOperator: it looks for requests unlike anything in training",
    ),
    MLTest(
        test_id="monitor-4",
        title="Models are not too stale",
        remedy="schedule DecideRetrainingOperator",
    ),
    MLTest(
        test_id="monitor-5",
        title="The model is numerically stable",
        remedy="train with TrainModelOperator and schedule CheckPerformanceOperator: both refuse answers that are no numbers",
    ),
    MLTest(
        test_id="monitor-6",
        title="Computing performance has not regressed",
        remedy="evaluate every training with EvaluateModelOperator: it starts the package in a process of its own and holds size, "
        "time and memory against artifact_limits",
    ),
    MLTest(
        test_id="monitor-7",
        title="Prediction quality has not regressed on served data",
        remedy="schedule CheckPerformanceOperator, with labels, or without them where estimates have proved right",
    ),
)

_BY_ID = {test.test_id: test for test in TESTS}


def find_test(test_id: str) -> MLTest:
    """Find a test.

    :raises ValueError: there is none of this name.
    """
    if test_id not in _BY_ID:
        raise ValueError(f"there is no test {test_id!r}; there are {', '.join(_BY_ID)}")
    return _BY_ID[test_id]


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
class Fact:
    """A ledger entry, as the rules read it.

    :param kind: of the entry.
    :param entry_id: its number.
    :param key: unique within the kind.
    :param subject: what it is about within the model: a run, a version, a table.
    :param actor: ``dag_id/dag_run_id/task_id``, or a person.
    """

    kind: str
    entry_id: int
    key: str
    subject: str | None
    window: Window | None
    payload: dict[str, Any]
    summary: str
    actor: str
    at: datetime

    @property
    def of_a_dag(self) -> bool:
        """Whether a Dag wrote it."""
        return self.actor.count("/") >= 2

    @property
    def scheduled(self) -> bool:
        """Whether a Dag wrote it that no person started; as in Airflow, a run with an id of its own was started by hand."""
        return self.of_a_dag and self.actor.partition("/")[2].startswith(_UNATTENDED)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFacts:
    """What MLflow says of the run that made the champion.

    :param run_id: the run; ``None``: MLflow was not, or could not be asked.
    :param git_commit: commit of the code; ``None``: not known.
    :param git_clean: whether all of the code was in it.
    :param importances: per feature what the loss gains without it, and the deviation of that; empty: not measured.
    :param explained_rows: rows whose answers are shared out among the features.
    :param trouble: why nothing, or not all, is known.
    """

    run_id: str | None = None
    git_commit: str | None = None
    git_clean: bool = False
    importances: dict[str, tuple[float, float]] = field(default_factory=dict)
    explained_rows: int = 0
    trouble: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    """All that the rules read.

    :param champion: version; ``None``: nothing was promoted.
    :param champion_runs: runs that made its package.
    :param windows: the newest ones that anybody looked at, newest first.
    :param facts: entries about the model and its tables, newest first.
    :param run: what MLflow says.
    """

    model_name: str
    now: datetime
    champion: str | None = None
    champion_runs: frozenset[str] = frozenset()
    windows: tuple[Window, ...] = ()
    facts: tuple[Fact, ...] = ()
    run: RunFacts = field(default_factory=RunFacts)

    def of(self, kind: str) -> list[Fact]:
        """List the entries of a kind, newest first."""
        return [fact for fact in self.facts if fact.kind == kind]


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


# -- attestations: what a person says -------------------------------------------------------------------------

ATTESTATION = "attestation"

#: A hundred years: longer than anybody vouches for anything.
_MOST_DAYS = 36_525


def attestation_payload(
    *, test_id: str, by: str, evidence: str, automated: bool, at: datetime, days: float
) -> dict[str, Any]:
    """Give what the ledger keeps of a person's word.

    :param test_id: the test that is vouched for.
    :param by: a name.
    :param evidence: link to what can be looked at.
    :param automated: a job does it again and again, and the link leads to it.
    :param at: when it is said.
    :param days: how long it counts.
    :raises ValueError: the test is one that is measured, the name is empty, the evidence is no link, or it would never count.
    """
    test = find_test(test_id)
    if not test.attestable:
        raise ValueError(f"{test_id} is not taken on anybody's word, as it is measured here: {test.remedy}")
    if not by.strip():
        raise ValueError(f"{test_id} is vouched for by nobody: give a name with --by")
    _require_link(evidence)
    if not 0.0 < days <= _MOST_DAYS:
        raise ValueError(
            f"an attestation can't count for {days:g} days: give more than 0 and at most {_MOST_DAYS:,}"
        )
    return {
        "test": test_id,
        "by": by.strip(),
        "evidence": evidence,
        "automated": automated,
        "expires_at": (at + timedelta(days=days)).isoformat(),
    }


def _require_link(evidence: str) -> None:
    """See that it is an address everybody may read; the ledger keeps it for ever."""
    try:
        link = urlsplit(evidence)
    except ValueError:
        link = urlsplit("")
    if link.scheme not in {"https", "http"} or not link.hostname or set(evidence) & set(string.whitespace):
        raise ValueError(
            f"evidence {evidence!r} is no link: give the address of what can be looked at, such as https://wiki.example/review-12"
        )
    if link.username is not None or link.password is not None:
        raise ValueError(
            f"the evidence at {link.hostname} holds a login: give the address without it, as the ledger keeps it for ever"
        )


def attested(facts: ModelFacts, test_id: str) -> Finding | None:
    """Give what a person's newest word is worth; ``None``: nobody said anything."""
    said = next((fact for fact in facts.of(ATTESTATION) if fact.payload["test"] == test_id), None)
    if said is None:
        return None
    by, expires = said.payload["by"], datetime.fromisoformat(said.payload["expires_at"])
    proof = (Evidence(source=str(said.payload["evidence"]), at=said.at, by=by), note(said))
    if expires <= facts.now:
        return Finding(
            points=0.0,
            sentence=f"{by} vouched for it on {said.at:%Y-%m-%d}; that expired on {expires:%Y-%m-%d}",
            evidence=proof,
        )
    how = "automated and repeated" if said.payload["automated"] else "done by hand and written down"
    return Finding(
        points=1.0 if said.payload["automated"] else 0.5,
        sentence=f"{how}, says {by} on {said.at:%Y-%m-%d}, good until {expires:%Y-%m-%d}",
        evidence=proof,
    )


def note(fact: Fact) -> Evidence:
    """Name a ledger entry."""
    return Evidence(source=f"ledger entry {fact.entry_id} ({fact.kind})", at=fact.at, by=fact.actor)


# -- for people -------------------------------------------------------------------------------------------------

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
