"""Rules of the ML Test Score: what in the ledger and in MLflow shows that a test is done, and how often."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from itertools import combinations
from statistics import StatisticsError, correlation, fmean
from typing import Any

from airflow_mlops.core.ml_test.attestation import attested
from airflow_mlops.core.ml_test.facts import Fact, ModelFacts
from airflow_mlops.core.ml_test.ml_test_score import Evidence, Finding, MLTestScore, ScorePolicy, add_up, note
from airflow_mlops.core.ml_test.ml_tests import TESTS

Rule = Callable[[ModelFacts, ScorePolicy], Finding]

#: Entries a finding names.
_SHOWN = 2
#: Versions from which on promised and realized metrics can be said to go together.
_VERSIONS = 3
#: Relative difference up to which two trainings came to the same.
_SAME = 1e-6
#: A feature is worth something when the loss without it rises by so many standard deviations.
_BEYOND_CHANCE = 2.0


def score_facts(facts: ModelFacts, policy: ScorePolicy) -> MLTestScore:
    """Apply every rule; a person's word counts where it is more than what is measured."""
    findings = {}
    for test in TESTS:
        rule = _RULES.get(test.test_id)
        measured = (
            rule(facts, policy)
            if rule
            else Finding(points=0.0, sentence="only a person can know, and nobody has vouched for it")
        )
        said = attested(facts, test.test_id) if test.attestable and test.test_id != "model-1" else None
        better = said is not None and (said.points > measured.points or rule is None)
        findings[test.test_id] = replace(said, concern=measured.concern) if said and better else measured
    return add_up(facts, findings)


def _schema(facts: ModelFacts, policy: ScorePolicy) -> Finding:
    done = _latest_first([fact for fact in facts.of("validation") if fact.payload.get("evaluated")])
    found = _recurring(facts, policy, done, "the suite of the model's table is judged")
    failed = done and not done[0].payload.get("success")
    return replace(found, concern=f"the newest rows broke it: {done[0].summary}" if failed else None)


def _beneficial(facts: ModelFacts, policy: ScorePolicy) -> Finding:
    found = _released(facts, policy, facts.of("explanation"), "each feature's worth is measured")
    worth = facts.run.importances
    if found.points == 0.0:
        return found
    if not worth:
        return _not_seen(facts, found, "explanation/importance.json")
    idle = [name for name, (gain, deviation) in worth.items() if gain <= _BEYOND_CHANCE * deviation]
    told = f"{found.sentence}; {len(worth) - len(idle)} of {len(worth)} features are worth something"
    concern = f"without effect beyond chance, so better left out: {_listed(idle)}" if idle else None
    return replace(
        found, sentence=told, evidence=(*found.evidence, _artifact(facts, "importance.json")), concern=concern
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
    graded = [fact for fact in _graded(facts) if fact.payload.get("reference_value") is not None]
    found = _recurring(facts, policy, graded, "what was promised at training is held against what came")
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
    found = _released(facts, policy, searched, "hyperparameters are searched")
    mine = next((fact for fact in searched if fact.subject in facts.champion_runs), None)
    more = f"; the champion is the best of {mine.payload['trials']} parameter sets" if mine else ""
    return replace(found, sentence=found.sentence + more)


def _staleness(facts: ModelFacts, policy: ScorePolicy) -> Finding:
    aged = _latest_first([fact for fact in facts.of("challenger_check") if _cost_of_age(fact) is not None])
    found = _recurring(
        facts, policy, aged, "models of different age are held against each other on the same rows"
    )
    cost = _cost_of_age(aged[0]) if aged else None
    return replace(found, sentence=f"{found.sentence}; {cost}") if cost else found


def _cost_of_age(fact: Fact) -> str | None:
    """Say what the older one of two models of a recipe lost in a window; ``None`` where no two were compared."""
    by_recipe: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for one in (fact.payload.get("check") or {}).get(
        "contenders", ()
    ):  # without a check the champion had seen the window
        if one.get("recipe"):
            by_recipe[one["recipe"]].append(one)
    for recipe, models in by_recipe.items():
        old, *_, new = sorted(models, key=lambda one: str(one["trained_until"]))
        if old["trained_until"] != new["trained_until"]:
            return (
                f"of recipe {recipe!r}, version {old['version']} lost {old['loss']:.4g} and the newer version "
                f"{new['version']} {new['loss']:.4g} in {fact.window}"
            )
    return None


def _simpler(facts: ModelFacts, policy: ScorePolicy) -> Finding:
    return _checked(facts, policy, "baseline", "every training is held against a guess that knows nothing")


def _slices(facts: ModelFacts, policy: ScorePolicy) -> Finding:
    done = [fact for fact in facts.of("evaluation") if (fact.payload.get("slices") or {}).get("looked_at")]
    return _checked(facts, policy, "slices", "slices of the rows are held against the champion", done)


def _inclusion(facts: ModelFacts, policy: ScorePolicy) -> Finding:
    """Give half for numbers that nobody has set a limit for: they are written down, and stop nothing."""
    done = [fact for fact in facts.of("evaluation") if fact.payload.get("groups")]
    found = _checked(facts, policy, "groups by", "groups of people are compared", done)
    mine = [fact for fact in done if fact.subject in facts.champion_runs]
    limited = mine and all("(limit " in check["reason"] for check in _checks(mine[0], "groups by"))
    return replace(found, points=0.5) if found.points == 1.0 and not limited else found


def _reproducible(facts: ModelFacts, policy: ScorePolicy) -> Finding:
    """Look for trainings of the same rows, weighted alike, by the same method in runs of their own."""
    same: dict[str, list[Fact]] = defaultdict(list)
    for fact in facts.of("training"):
        if fact.payload.get("training_digest") is not None:
            same[_asked_for(fact)].append(fact)
    pairs = [
        pair
        for group in same.values()
        for pair in combinations(group, 2)
        if pair[0].subject != pair[1].subject
    ]
    if not pairs:
        return Finding(points=0.0, sentence="no training was ever repeated")
    newest = max(pairs, key=lambda pair: pair[0].entry_id)
    proof = tuple(note(fact) for fact in newest)
    if not _agree(*newest):
        values = " and ".join(str(fact.payload.get("metric_value")) for fact in newest)
        told = f"the same training came to different models: {newest[0].payload.get('metric')} {values}"
        return Finding(points=0.0, sentence=told, evidence=proof, concern=told)
    told = f"runs {newest[1].subject} and {newest[0].subject} were the same training and came to the same"
    if _age(facts, newest[0]) > policy.release_days:
        return Finding(
            points=0.5, sentence=f"{told}, but {_age(facts, newest[0]):.0f} days ago: stale", evidence=proof
        )
    if len(pairs) < 2 or not newest[0].of_a_dag:
        return Finding(points=0.5, sentence=f"{told}; once is not recurring", evidence=proof)
    return Finding(points=1.0, sentence=f"{told}; {len(pairs)} pairs in all", evidence=proof)


def _asked_for(fact: Fact) -> str:
    dataset = fact.payload.get("dataset") or {}
    names = ("training", "holdout", "training_digest")
    return repr([dataset.get("dataset_digest"), *(fact.payload.get(name) for name in names)])


def _agree(first: Fact, second: Fact) -> bool:
    if first.payload.get("package_digest") == second.payload.get("package_digest"):
        return True
    one, other = (fact.payload.get("metric_value") for fact in (first, second))
    return _finite(one) and _finite(other) and math.isclose(float(one or 0), float(other or 0), rel_tol=_SAME)


def _validated(facts: ModelFacts, policy: ScorePolicy) -> Finding:
    """Ask for the verdict that the champion came by; what was promoted by hand went past the gate."""
    promotions = [fact for fact in facts.of("promotion") if fact.payload.get("alias") == "champion"]
    mine = next((fact for fact in promotions if fact.subject == facts.champion), None)
    if facts.champion is None or mine is None:
        return Finding(points=0.0, sentence="nothing was promoted")
    gated = [fact for fact in promotions if fact.payload.get("verdict") == "promote"]
    decided = _answered(facts, mine)
    if mine in gated and decided is not None and decided.payload.get("outcome") == "bring_back":
        what = "an earlier champion comes back where it did much better again than every model of today"
        return _released(facts, policy, gated, what, mine=mine, more=(decided,))
    run = mine.payload.get("evaluated_run_id")
    verdicts = [fact for fact in facts.of("evaluation") if fact.payload.get("verdict") == "promote"]
    earned = next((fact for fact in verdicts if run is not None and fact.subject == run), None)
    if mine.payload.get("verdict") != "promote" or earned is None:
        return Finding(
            points=0.0,
            sentence=f"version {facts.champion} serves without an evaluation that let it through: {mine.summary}",
            evidence=(note(mine),),
        )
    if not any(_checks(earned, name) for name in ("champion", "baseline")):
        return _untested(facts, mine, earned)
    return _released(
        facts, policy, gated, "only what its evaluation lets through is promoted", mine=mine, more=(earned,)
    )


def _answered(facts: ModelFacts, promotion: Fact) -> Fact | None:
    """Find the decision that a promotion answers."""
    key = promotion.payload.get("decision_key")
    return next((one for one in facts.of("retraining_decision") if key and one.key == key), None)


def _untested(facts: ModelFacts, mine: Fact, earned: Fact) -> Finding:
    """Judge a champion that learned from all rows, so that none was left to test it on: half where its predecessors were tested."""
    decided = _answered(facts, mine)
    told = f"version {facts.champion} was not tested itself"
    proof = (note(mine), note(earned))
    if decided is None or decided.payload.get("promote_on") != "predecessors":
        return Finding(points=0.0, sentence=f"{told}, nor were its predecessors", evidence=proof)
    return Finding(
        points=0.5,
        sentence=f"{told}: it learned from all rows there were; it was promoted on tests of its predecessors",
        evidence=(*proof, note(decided)),
    )


def _debuggable(facts: ModelFacts, policy: ScorePolicy) -> Finding:
    found = _released(facts, policy, facts.of("explanation"), "single answers are explained")
    if found.points == 0.0:
        return found
    if not facts.run.explained_rows:
        return _not_seen(facts, found, "explanation/rows.json")
    return replace(
        found,
        sentence=f"{found.sentence}; {facts.run.explained_rows} rows, each with what every input did to the answer",
        evidence=(*found.evidence, _artifact(facts, "rows.json")),
    )


def _canaried(facts: ModelFacts, policy: ScorePolicy) -> Finding:
    """Give a whole point for a version that has passed a rollout under traffic, by a Dag, before it answered everything."""
    mine = [fact for fact in facts.of("rollout") if facts.champion and fact.subject == facts.champion]
    passed = [fact for fact in mine if fact.payload["event"]["what"] == "finished" and fact.of_a_dag]
    looked = [fact for fact in mine if fact.payload["event"]["what"] == "looked"]
    if passed and looked:
        return Finding(
            points=1.0,
            sentence=f"version {facts.champion} was compared with the one before it under the same traffic "
            f"({passed[0].payload['strategy']}), and passed on {passed[0].at:%Y-%m-%d}",
            evidence=(note(looked[0]), note(passed[0])),
        )
    tried = [fact for fact in facts.of("deployment") if facts.champion and fact.subject == facts.champion]
    if not tried:
        return Finding(points=0.0, sentence="no deployment of the champion is known")
    return Finding(
        points=0.5,
        sentence=f"version {facts.champion} answered known rows rightly where it serves, before any traffic; no canary "
        "took a share of it",
        evidence=(note(tried[0]),),
    )


def _rolled_back(facts: ModelFacts, policy: ScorePolicy) -> Finding:
    back = next((one for one in facts.of("rollback") if one.payload.get("alias") == "champion"), None)
    if back is None:
        return Finding(points=0.0, sentence="no rollback was ever done or rehearsed")
    version = str(back.payload.get("model_version"))
    served = [
        one for one in facts.of("deployment") if one.subject == version and one.entry_id > back.entry_id
    ]
    told = f"version {version} came back on {back.at:%Y-%m-%d}"
    if not served:
        return Finding(points=0.5, sentence=f"{told}, but was never deployed again", evidence=(note(back),))
    proof = (note(back), note(served[-1]))
    minutes = (served[-1].at - back.at) / timedelta(minutes=1)
    told += f" and served {minutes:.0f} minutes later"
    if _age(facts, back) > policy.release_days:
        return Finding(
            points=0.5, sentence=f"{told}: {_age(facts, back):.0f} days ago, stale", evidence=proof
        )
    if not (back.of_a_dag and served[-1].of_a_dag):
        return Finding(points=0.5, sentence=f"{told}, done by hand", evidence=proof)
    return Finding(points=1.0, sentence=told, evidence=proof)


def _invariants(facts: ModelFacts, policy: ScorePolicy) -> Finding:
    """Both sides are needed for the whole point: the tables, and what is asked of the service."""
    tables, asked = _schema(facts, policy), _skewed(facts, policy)
    both = (tables.points, asked.points)
    points = 1.0 if min(both) == 1.0 else 0.5 if max(both) > 0.0 else 0.0
    return Finding(
        points=points,
        sentence=f"tables: {tables.sentence}; requests: {asked.sentence}",
        evidence=(*tables.evidence[:1], *asked.evidence[:1]),
        concern=tables.concern,
    )


def _skewed(facts: ModelFacts, policy: ScorePolicy) -> Finding:
    done = _latest_first(
        [fact for fact in facts.of("drift_check") if "skew" in fact.payload and fact.payload.get("row_count")]
    )
    found = _recurring(facts, policy, done, "requests are held against the training rows")
    skew = done[0].payload["skew"] if done else ()
    names = [str(item["feature"]) for item in skew]
    return replace(found, concern=f"unlike anything in training: {_listed(names)}" if names else None)


def _stale(facts: ModelFacts, policy: ScorePolicy) -> Finding:
    decided = _latest_first(facts.of("retraining_decision"))
    found = _recurring(facts, policy, decided, "whether to retrain is decided window by window")
    return replace(found, sentence=f"{found.sentence}; {decided[0].summary}") if decided else found


def _stable(facts: ModelFacts, policy: ScorePolicy) -> Finding:
    """Training measures the held-out error, grading the served one; neither takes an answer that is no number."""
    trained = next((one for one in facts.of("training") if one.subject in facts.champion_runs), None)
    sound = trained is not None and _finite(trained.payload.get("metric_value"))
    served = _recurring(facts, policy, _graded(facts), "graded answers are finite numbers")
    in_training = (
        "the champion gave finite answers on its held-out rows"
        if sound
        else "no finite held-out error of the champion is known"
    )
    points = 1.0 if sound and served.points == 1.0 else 0.5 if sound or served.points else 0.0
    proof = (note(trained),) if trained is not None and sound else ()
    return Finding(
        points=points,
        sentence=f"training: {in_training}; serving: {served.sentence}",
        evidence=(*proof, *served.evidence[:1]),
    )


def _computing(facts: ModelFacts, policy: ScorePolicy) -> Finding:
    done = [fact for fact in facts.of("evaluation") if fact.payload.get("artifact")]
    return _checked(
        facts, policy, "artifact", "size, time and memory of the package are measured and limited", done
    )


def _quality(facts: ModelFacts, policy: ScorePolicy) -> Finding:
    known = _latest_first(
        [
            fact
            for fact in facts.of("performance_check")
            if fact.payload.get("measured") or fact.payload.get("estimate_trusted")
        ]
    )
    found = _recurring(facts, policy, known, "the champion's answers are graded, or their error estimated")
    worse = known and (known[0].payload.get("degraded") or known[0].payload.get("estimate_degraded"))
    return replace(found, concern=known[0].summary if worse else None)


_RULES: dict[str, Rule] = {
    "data-1": _schema,
    "data-2": _beneficial,
    "model-1": _reviewed,
    "model-2": _offline_online,
    "model-3": _tuned,
    "model-4": _staleness,
    "model-5": _simpler,
    "model-6": _slices,
    "model-7": _inclusion,
    "infra-1": _reproducible,
    "infra-4": _validated,
    "infra-5": _debuggable,
    "infra-6": _canaried,
    "infra-7": _rolled_back,
    "monitor-2": _invariants,
    "monitor-3": _skewed,
    "monitor-4": _stale,
    "monitor-5": _stable,
    "monitor-6": _computing,
    "monitor-7": _quality,
}


def _recurring(facts: ModelFacts, policy: ScorePolicy, done: Sequence[Fact], what: str) -> Finding:
    """Judge what has to be done window after window.

    :param done: the checks, those of the newest window first.
    :param what: happens, in words.
    """
    if not done:
        return Finding(points=0.0, sentence=f"no sign that {what}")
    proof = tuple(note(fact) for fact in done[:_SHOWN])
    fresh = [fact for fact in done if _fresh(facts, policy, fact)]
    if not fresh:
        told = (
            f"{what}: last for {_for(done[0])}, {_age(facts, done[0]):.0f} days ago; stale, so not recurring"
        )
        return Finding(points=0.5, sentence=told, evidence=proof)
    scheduled = [fact for fact in done if fact.scheduled]
    if not any(fact.scheduled for fact in fresh):
        told = f"{what}, last for {_for(fresh[0])}; but by hand: {fresh[0].actor}"
        return Finding(points=0.5, sentence=told, evidence=proof)
    if len({fact.window or fact.at for fact in scheduled}) < 2:
        return Finding(points=0.5, sentence=f"{what}: once so far, which is not recurring", evidence=proof)
    newest = next(fact for fact in fresh if fact.scheduled)
    return Finding(points=1.0, sentence=f"{what}, last for {_for(newest)}", evidence=proof)


def _released(
    facts: ModelFacts,
    policy: ScorePolicy,
    done: Sequence[Fact],
    what: str,
    *,
    mine: Fact | None = None,
    more: Sequence[Fact] = (),
) -> Finding:
    """Judge what has to be done for every version.

    A task of the releasing Dag does it whoever starts the Dag; that it recurs is shown by a run nobody started, or by a
    second version.

    :param done: entries, newest first; by default the champion's is the one about its run.
    :param mine: the champion's.
    :param more: further evidence.
    """
    mine = mine or next((fact for fact in done if fact.subject in facts.champion_runs), None)
    if mine is None:
        if not done or facts.champion is None:
            return Finding(points=0.0, sentence=f"no sign that {what}")
        told = f"{what} for other versions, not for version {facts.champion}, which serves"
        return Finding(points=0.5, sentence=told, evidence=(note(done[0]),))
    proof = tuple(note(fact) for fact in (mine, *more))
    told = f"{what}, also for version {facts.champion}"
    if _age(facts, mine) > policy.release_days:
        told += f"; that was {_age(facts, mine):.0f} days ago: stale, so not recurring"
        return Finding(points=0.5, sentence=told, evidence=proof)
    if not mine.of_a_dag:
        return Finding(points=0.5, sentence=f"{told}; by hand: {mine.actor}", evidence=proof)
    if not mine.scheduled and len({fact.subject for fact in done if fact.of_a_dag}) < 2:
        told += "; once so far, in a run that a person started, which is not recurring"
        return Finding(points=0.5, sentence=told, evidence=proof)
    return Finding(points=1.0, sentence=told, evidence=proof)


def _checked(
    facts: ModelFacts, policy: ScorePolicy, name: str, what: str, done: Sequence[Fact] | None = None
) -> Finding:
    """Judge a check of the evaluation; one that could not be measured is none.

    :param name: what the check's name begins with.
    :param done: evaluations that can have it; default all.
    """
    made = [
        fact
        for fact in (facts.of("evaluation") if done is None else done)
        if (checks := _checks(fact, name)) and all(one["outcome"] != "not_measured" for one in checks)
    ]
    found = _released(facts, policy, made, what)
    mine = next((fact for fact in made if fact.subject in facts.champion_runs), None)
    if mine is None:
        return found
    checks = _checks(mine, name)
    failed = [str(one["reason"]) for one in checks if one["outcome"] == "fail"]
    told = f"{found.sentence}: {'; '.join(str(one['reason']) for one in checks)}"
    return replace(found, sentence=told, concern="; ".join(failed) or None)


def _checks(fact: Fact, name: str) -> list[Mapping[str, Any]]:
    return [one for one in fact.payload.get("checks", ()) if str(one["name"]).startswith(name)]


def _graded(facts: ModelFacts) -> list[Fact]:
    return _latest_first(
        [
            fact
            for fact in facts.of("performance_check")
            if fact.payload.get("measured") and _finite(fact.payload.get("value"))
        ]
    )


def _latest_first(done: Sequence[Fact]) -> list[Fact]:
    """Sort by window, as an older one may be graded later; of several entries about one the newest first."""
    return sorted(
        done, key=lambda fact: (fact.window.end if fact.window else fact.at, fact.entry_id), reverse=True
    )


def _not_seen(facts: ModelFacts, found: Finding, file: str) -> Finding:
    why = facts.run.trouble or f"the champion's run holds no {file}"
    return replace(found, points=0.5, sentence=f"{found.sentence}; by the ledger alone: {why}")


def _artifact(facts: ModelFacts, name: str) -> Evidence:
    return Evidence(
        source=f"MLflow run {facts.run.run_id}, explanation/{name}", at=None, by="the explanation"
    )


def _fresh(facts: ModelFacts, policy: ScorePolicy, fact: Fact) -> bool:
    """Tell whether it is recent: no older than the policy's days, and of one of the newest windows."""
    if _age(facts, fact) > policy.maximum_days:
        return False
    newest = facts.windows[: policy.maximum_windows]
    return fact.window is None or not newest or fact.window.end > newest[-1].start


def _age(facts: ModelFacts, fact: Fact) -> float:
    return (facts.now - fact.at) / timedelta(days=1)


def _for(fact: Fact) -> str:
    return str(fact.window) if fact.window else f"{fact.at:%Y-%m-%d}"


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _listed(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
