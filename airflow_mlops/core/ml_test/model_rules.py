"""Rules of the tests of data and of the model."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import StatisticsError, correlation, fmean
from typing import TYPE_CHECKING, Any

from airflow_mlops.core.ml_test.attestation import attested
from airflow_mlops.core.ml_test.findings import (
    Rule,
    checked,
    checks_named,
    explanation_file,
    graded_windows,
    latest_first,
    listed,
    not_seen,
    recurring,
    released,
)
from airflow_mlops.core.ml_test.ml_test_score import Evidence, Finding, ScorePolicy

if TYPE_CHECKING:
    from airflow_mlops.core.ml_test.facts import Fact, ModelFacts

#: Versions from which on promised and realized metrics can be said to go together.
_VERSIONS = 3

#: A feature is worth something when the loss without it rises by so many standard deviations.
_BEYOND_CHANCE = 2.0


def schema(facts: ModelFacts, policy: ScorePolicy) -> Finding:
    """Judge whether the suite of the model's table is judged window after window."""
    done = latest_first([fact for fact in facts.of("validation") if fact.payload.get("evaluated")])
    found = recurring(facts, policy, done, "the suite of the model's table is judged")
    failed = done and not done[0].payload.get("success")
    return replace(found, concern=f"the newest rows broke it: {done[0].summary}" if failed else None)


def _beneficial(facts: ModelFacts, policy: ScorePolicy) -> Finding:
    found = released(facts, policy, facts.of("explanation"), "each feature's worth is measured")
    worth = facts.run.importances
    if found.points == 0.0:
        return found
    if not worth:
        return not_seen(facts, found, "explanation/importance.json")
    idle = [name for name, (gain, deviation) in worth.items() if gain <= _BEYOND_CHANCE * deviation]
    told = f"{found.sentence}; {len(worth) - len(idle)} of {len(worth)} features are worth something"
    concern = f"without effect beyond chance, so better left out: {listed(idle)}" if idle else None
    return replace(
        found,
        sentence=told,
        evidence=(*found.evidence, explanation_file(facts, "importance.json")),
        concern=concern,
    )


def _reviewed(facts: ModelFacts, policy: ScorePolicy) -> Finding:
    """Half for code that is all in git; the rest by a person, as no review can be seen from here."""
    run, said = facts.run, attested(facts, "model-1")
    if run.run_id is None or run.git_commit is None:
        told = run.trouble or "the champion's run names no commit: it was not trained from a git checkout"
        return Finding(points=0.0, sentence=told)
    where = Evidence(
        source=f"MLflow run {run.run_id}, tags git_commit and git_dirty", at=None, by="the training"
    )
    if not run.git_clean:
        return Finding(
            points=0.0,
            sentence=f"the champion was trained from commit {run.git_commit:.12} with changes that are not in it",
            evidence=(where,),
        )
    told = f"the champion's code is commit {run.git_commit:.12}, without changes"
    if said is None or said.points == 0.0:
        more = f"; {said.sentence}" if said else "; whether anybody reviewed it is not known"
        return Finding(points=0.5, sentence=told + more, evidence=(where,))
    return Finding(
        points=said.points, sentence=f"{told}; reviews: {said.sentence}", evidence=(where, *said.evidence)
    )


def _offline_online(facts: ModelFacts, policy: ScorePolicy) -> Finding:
    graded = [fact for fact in graded_windows(facts) if fact.payload.get("reference_value") is not None]
    found = recurring(facts, policy, graded, "what was promised at training is held against what came")
    if not graded:
        return found
    realized: dict[str, list[float]] = defaultdict(list)
    promised: dict[str, float] = {}
    metric = graded[0].payload.get("metric")
    for fact in graded:
        if fact.payload.get("metric") == metric:
            version = str(fact.payload.get("model_version"))
            realized[version].append(fact.payload["value"])
            promised[version] = fact.payload["reference_value"]
    if len(realized) < _VERSIONS:
        told = f"{found.sentence}; of {len(realized)} versions, {_VERSIONS} are needed to say whether they go together"
        return replace(found, points=min(0.5, found.points), sentence=told)
    together = _correlation([promised[one] for one in realized], [fmean(each) for each in realized.values()])
    told = f"{found.sentence}; correlation over {len(realized)} versions: {together:.2f}"
    concern = "what a version promises says nothing of what it does" if not together > 0.0 else None
    return replace(found, sentence=told, concern=concern)


def _correlation(promised: Sequence[float], came: Sequence[float]) -> float:
    try:
        return correlation(promised, came)
    except StatisticsError:  # all the same: there is nothing to go together
        return math.nan


def _tuned(facts: ModelFacts, policy: ScorePolicy) -> Finding:
    searched = [fact for fact in facts.of("training") if (fact.payload.get("trials") or 0) > 1]
    found = released(facts, policy, searched, "hyperparameters are searched")
    mine = next((fact for fact in searched if fact.subject in facts.champion_runs), None)
    more = f"; the champion is the best of {mine.payload['trials']} parameter sets" if mine else ""
    return replace(found, sentence=found.sentence + more)


def _staleness(facts: ModelFacts, policy: ScorePolicy) -> Finding:
    aged = latest_first([fact for fact in facts.of("challenger_check") if _cost_of_age(fact) is not None])
    found = recurring(
        facts, policy, aged, "models of different age are held against each other on the same rows"
    )
    cost = _cost_of_age(aged[0]) if aged else None
    return replace(found, sentence=f"{found.sentence}; {cost}") if cost else found


def _cost_of_age(fact: Fact) -> str | None:
    """Say what the older one of two models of a recipe lost in a window; ``None`` where no two were compared."""
    by_recipe: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    # Without a check the champion had seen the window.
    for one in (fact.payload.get("check") or {}).get("contenders", ()):
        if one.get("recipe"):
            by_recipe[one["recipe"]].append(one)
    for recipe, models in by_recipe.items():
        ordered = sorted(models, key=lambda one: str(one["trained_until"]))
        old, new = ordered[0], ordered[-1]  # the same where a recipe has one model, as after the first window
        if old["trained_until"] != new["trained_until"]:
            return (
                f"of recipe {recipe!r}, version {old['version']} lost {old['loss']:.4g} and the newer version "
                f"{new['version']} {new['loss']:.4g} in {fact.window}"
            )
    return None


def _simpler(facts: ModelFacts, policy: ScorePolicy) -> Finding:
    return checked(facts, policy, "baseline", "every training is held against a guess that knows nothing")


def _slices(facts: ModelFacts, policy: ScorePolicy) -> Finding:
    done = [fact for fact in facts.of("evaluation") if (fact.payload.get("slices") or {}).get("looked_at")]
    return checked(facts, policy, "slices", "slices of the rows are held against the champion", done)


def _inclusion(facts: ModelFacts, policy: ScorePolicy) -> Finding:
    """Give half for numbers that nobody has set a limit for: they are written down, and stop nothing."""
    done = [fact for fact in facts.of("evaluation") if fact.payload.get("groups")]
    found = checked(facts, policy, "groups by", "groups of people are compared", done)
    mine = [fact for fact in done if fact.subject in facts.champion_runs]
    limited = mine and all("(limit " in check["reason"] for check in checks_named(mine[0], "groups by"))
    return replace(found, points=0.5) if found.points == 1.0 and not limited else found


MODEL_RULES: dict[str, Rule] = {
    "data-1": schema,
    "data-2": _beneficial,
    "model-1": _reviewed,
    "model-2": _offline_online,
    "model-3": _tuned,
    "model-4": _staleness,
    "model-5": _simpler,
    "model-6": _slices,
    "model-7": _inclusion,
}
