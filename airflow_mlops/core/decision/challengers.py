"""Challengers: whether a freshly trained model is worth a promotion, from what its predecessors were worth.

A model that has learned from all rows up to now has seen every labelled row there is, so nothing is left to test it on.
What can be tested is the way it was made. After every window models are trained in the shadow, by a few *recipes* (recent
rows weighing more, all rows alike), and one window later they are held against the champion on rows that neither had seen.
A recipe whose models keep beating the champion earns its newest model a promotion.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import pairwise
from statistics import fmean, stdev
from typing import Any

import numpy as np
from numpy.typing import NDArray

from airflow_mlops.core.comparison.resampling import common_factor, degrees_of_freedom, t_quantile, upper_tail
from airflow_mlops.core.windows import Window

Array = NDArray[Any]

#: Windows of evidence that are looked back on; with the default memory an older one counts for less than a fourteenth.
LOOK_BACK = 12

#: Windows that tell how the recipes rank, what a champion has lost since its promotion, and that its world was over.
_REMEMBERED = 25

#: Windows before one that a decision is handed at most.
MOST_WINDOWS = 1_000

#: Windows before one that tell how much the loss varies between windows.
FEWEST_LEVELS = 3

#: Recipes: all rows, a row's weight halving with every window of age; and all rows alike.
RECENT, ALL = "recent", "all"
RECIPES = (RECENT, ALL)


@dataclass(frozen=True, kw_only=True, slots=True)
class Gap:
    """How much worse an older model was than a newer one, or an earlier champion than the best of today, on the same rows.

    :param older: version.
    :param newer: version.
    :param mean: mean loss of the older one minus that of the newer one, in units of the loss.
    :param standard_error: of the mean, with neighboring rows taken as related; ``None`` with too few rows to tell.
    """

    older: str
    newer: str
    mean: float
    standard_error: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Contender:
    """A model that had seen no row of the window.

    :param version: its version.
    :param recipe: how it was made; ``None`` for a champion that was made in another way.
    :param trained_until: first instant after its training rows.
    :param loss: its mean loss in the window.
    """

    version: str
    recipe: str | None
    trained_until: datetime
    loss: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ChallengerCheck:
    """Models side by side on one window.

    :param window: the window.
    :param row_count: labelled rows.
    :param champion: version of the champion; one of the contenders.
    :param simple_loss: mean loss of a guess that knows nothing: the median, or the most frequent label.
    :param contenders: the champion, and of each recipe the newest model and the one before.
    :param gaps: the champion and each older model against each recipe's newest one, and the best earlier champion against the best of
        these.
    :param earlier: champions of the past.
    """

    window: Window
    row_count: int
    champion: str
    simple_loss: float
    contenders: tuple[Contender, ...]
    gaps: tuple[Gap, ...]
    earlier: tuple[Contender, ...] = ()

    def after(self, change: datetime) -> ChallengerCheck:
        """Leave out the models that know only what was before a change: they tell nothing of how models age since."""
        there = [one for one in self.contenders if one.trained_until > change or one.version == self.champion]
        return replace(self, contenders=tuple(there))

    def contender(self, version: str) -> Contender | None:
        """Find a model that was compared."""
        return next((item for item in self.contenders if item.version == version), None)

    def newest(self, recipe: str | None) -> Contender | None:
        """Give a recipe's newest model."""
        return next(iter(self._by_age(recipe)), None)

    def previous(self, recipe: str | None) -> Contender | None:
        """Give the model before a recipe's newest."""
        return next(iter(self._by_age(recipe)[1:]), None)

    def gap(self, older: Contender | None, newer: Contender | None) -> Gap | None:
        """Find how two of them compare."""
        if older is None or newer is None:
            return None
        wanted = (older.version, newer.version)
        return next((item for item in self.gaps if (item.older, item.newer) == wanted), None)

    @property
    def recipes(self) -> list[str]:
        """Recipes that have a model here."""
        return list(dict.fromkeys(item.recipe for item in self.contenders if item.recipe))

    @property
    def best_loss(self) -> float:
        """Loss of the best of the newest models; of the champion, where there are no others."""
        newest = [found.loss for recipe in self.recipes if (found := self.newest(recipe))]
        return min(newest or [one.loss for one in self.contenders])

    @property
    def best_today(self) -> Contender:
        """Give the best of the champion and the newest models."""
        today = [self.contender(self.champion), *map(self.newest, self.recipes)]
        return min((one for one in today if one is not None), key=lambda one: one.loss)

    def _by_age(self, recipe: str | None) -> list[Contender]:
        made = [item for item in self.contenders if item.recipe == recipe]
        return sorted(made, key=lambda item: item.trained_until, reverse=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class ChallengerPolicy:
    """When a fresh model is worth a promotion.

    The defaults were chosen on flat parts of the results, once for all streams: ``docs/explanation/retraining-policy.md``.

    :param minimum_gain: what a promotion has to win back, as a share of what the model is worth: of the loss it saves
        against a guess that knows nothing.
    :param sufficient_gain: share of the present loss that is always enough; it matters where a model is so good that
        little is left of the loss.
    :param significance: largest probability of so large a gain by chance (one-sided).
    :param memory: what a window's evidence counts for one window later, in ``(0, 1]``.
    :param alarm_change: relative rise of the newest models' loss, from one window to the next, that is an alarm.
    :param alarm_significance: and its largest probability, given how much the loss varied between windows before.
    :param steady_margin: where models of all rows alike lead by more than this share of the loss, the world stands still.
    :param close_race: a recipe no further behind the best than this share of the loss is trained in every window.
    :param seldom: the others are trained in every so-manieth.
    """

    minimum_gain: float = 0.08
    sufficient_gain: float = 0.15
    significance: float = 0.05
    memory: float = 0.8
    alarm_change: float = 0.3
    alarm_significance: float = 0.01
    steady_margin: float = 0.02
    close_race: float = 0.05
    seldom: int = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class ChallengerVerdict:
    """What follows from the checks.

    :param recipe: the best way of making a model at present.
    :param promote: whether its next model is worth a promotion.
    :param alarm: whether the world changed at once, so that older rows may mislead.
    :param gain: loss that it is expected to save in the next window; ``None`` when there is nothing to tell it from.
    :param standard_error: of the gain.
    :param required: what a promotion has to win back.
    :param train: recipes worth a training now.
    :param reason: one sentence.
    """

    recipe: str
    promote: bool
    alarm: bool
    gain: float | None
    standard_error: float | None
    required: float
    train: tuple[str, ...]
    reason: str


def measure_gap(older: str, newer: str, losses: Array, newer_losses: Array) -> Gap:
    """Compare two models row by row.

    :param losses: of the older one, in time order, shape ``(n,)``.
    :param newer_losses: of the newer one on the same rows.
    """
    differences = np.asarray(losses - newer_losses, dtype=np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        error = float(np.std(differences)) / math.sqrt(len(differences)) * common_factor(differences)
        mean = float(differences.mean())
    return Gap(older=older, newer=newer, mean=mean, standard_error=error if math.isfinite(error) else None)


def judge_challengers(
    checks: Sequence[ChallengerCheck], policy: ChallengerPolicy, *, cost: float | None = None
) -> ChallengerVerdict:
    """Tell whether the next model of the best recipe is worth a promotion.

    The gain of a promotion is what the champion lost to the recipe's newest models. A champion that is itself a newest
    model lost nothing yet; then it is what one window of age has cost its recipe's models so far. Gains of several windows are
    averaged, older ones counting for less. What was lost since the last promotion is added up until it pays for the next one: who
    rents until the rent would have bought the thing never pays more than twice the least possible (Karlin et al.,
    "Competitive snoopy caching", Algorithmica 3, 1988). Not so where the world stands still: what a fresh model gains there
    by having more of the same rows would not have grown, and only the next window's gain counts.

    :param checks: of successive windows, oldest first, all with the present champion's world: those before the last
        alarm that led to a promotion are left out by the caller.
    :param cost: of a promotion, in units of the loss summed over rows; a window like the latest has to be able to pay for
        it. ``None``: the policy's shares stand for it.
    :raises ValueError: there is no check.
    """
    if not checks:
        raise ValueError("no window has been compared: there is nothing to judge challengers by")
    compared, checks = len(checks), checks[-_REMEMBERED:]
    latest = checks[-1]
    ranking = _rank(checks, policy) or {RECENT: 0.0, ALL: 0.0}
    recipe = min(ranking, key=lambda name: ranking[name])
    required = _required(latest, policy, cost)
    evidence = _evidence(checks, recipe, policy)
    alarm = world_changed(checks, policy)
    train = tuple(
        name
        for name, behind in ranking.items()
        if name == recipe
        or behind <= ranking[recipe] + policy.close_race
        or _is_turn(name, compared, latest, policy)
    )
    if evidence is None:
        reason = f"no model of recipe {recipe!r} has met the champion, version {latest.champion}, yet"
        return ChallengerVerdict(
            recipe=recipe,
            promote=False,
            alarm=alarm,
            gain=None,
            standard_error=None,
            required=required,
            train=train,
            reason=reason,
        )
    gain, error, freedom = evidence
    lost = 0.0 if _steady(ranking, policy) else _lost_since_promotion(checks, recipe)
    sure = gain > t_quantile(1.0 - policy.significance, freedom) * error
    promote = sure and lost + gain > required
    return ChallengerVerdict(
        recipe=recipe,
        promote=promote,
        alarm=alarm,
        gain=gain,
        standard_error=error,
        required=required,
        train=train,
        reason=_reason(latest, recipe, gain, error, lost, required, sure=sure),
    )


def came_back(
    checks: Sequence[ChallengerCheck], policy: ChallengerPolicy, *, since: datetime | None = None
) -> Contender | None:
    """Find an earlier champion that does much better again than every model of today: the world that it knew is back.

    How much is much is what makes an alarm; that the best of several is looked at is not corrected for. Not one whose world was over a window after it became champion last: who changes
    with every window that is like another one is wrong in each.

    Source: Widmer and Kubat, "Learning in the presence of concept drift and hidden contexts", Machine Learning 23, 1996 (what
    was learned in a context is kept for its return).

    :param checks: of successive windows, oldest first, also of those before a change.
    :param since: where the present world begins; models that know only what was before are not of today.
    """
    checks = checks[-_REMEMBERED:]
    found = _much_better_again(checks[-1].after(since) if since else checks[-1], policy)
    if found is None:
        return None
    begun = [
        check for before, check in pairwise(checks) if before.champion != check.champion == found.version
    ]
    return found if not begun or _lasted(begun[-1], found.version, policy) else None


def _much_better_again(check: ChallengerCheck, policy: ChallengerPolicy) -> Contender | None:
    if not check.earlier:
        return None
    best, today = min(check.earlier, key=lambda one: one.loss), check.best_today
    gap = check.gap(best, today)
    if gap is None or gap.standard_error is None:
        return None
    surely = t_quantile(1.0 - policy.alarm_significance, degrees_of_freedom(check.row_count))
    much = (1.0 + policy.alarm_change) * best.loss < today.loss
    return best if much and -gap.mean > surely * gap.standard_error else None


def _lasted(check: ChallengerCheck, version: str, policy: ChallengerPolicy) -> bool:
    """Tell whether a model was not much worse than the best one."""
    there = [*check.contenders, *check.earlier]
    loss = next((one.loss for one in there if one.version == version), None)
    best = min((one.loss for one in there), default=math.inf)
    return loss is None or loss <= (1.0 + policy.alarm_change) * best


def _is_turn(recipe: str, compared: int, latest: ChallengerCheck, policy: ChallengerPolicy) -> bool:
    """Tell whether it is the turn of a recipe that is far behind: in every so-manieth window of this world.

    Who is handed as many windows as ever are can't go by their number any more, but by the age of the recipe's newest model.
    """
    if compared < MOST_WINDOWS:
        return compared % policy.seldom == 0
    newest, length = latest.newest(recipe), latest.window.end - latest.window.start
    return newest is None or latest.window.end - newest.trained_until >= policy.seldom * length


def _required(latest: ChallengerCheck, policy: ChallengerPolicy, cost: float | None) -> float:
    """Give the loss per row that a promotion has to win back."""
    if cost is not None:
        return cost / latest.row_count
    level = latest.best_loss
    worth = max(latest.simple_loss - level, 0.1 * level)
    return min(policy.minimum_gain * worth, policy.sufficient_gain * level)


def _rank(checks: Sequence[ChallengerCheck], policy: ChallengerPolicy) -> dict[str, float]:
    """Average how far each recipe's newest models were behind the best one, relative to its loss; older windows count for less."""
    behind: dict[str, float] = {}
    for recipe in (name for name in checks[-1].recipes if name in RECIPES):
        total = weights = 0.0
        for age, check in enumerate(reversed(checks)):
            found = check.newest(recipe)
            if found is not None and check.best_loss > 0.0:
                total += policy.memory**age * (found.loss / check.best_loss - 1.0)
                weights += policy.memory**age
        behind[recipe] = total / weights if weights else 0.0
    return behind


def _steady(ranking: dict[str, float], policy: ChallengerPolicy) -> bool:
    """Tell whether old rows teach as well as new ones: models that count all alike lead clearly."""
    others = [behind for name, behind in ranking.items() if name != ALL]
    return ALL in ranking and bool(others) and min(others) > ranking[ALL] + policy.steady_margin


def _evidence(
    checks: Sequence[ChallengerCheck], recipe: str, policy: ChallengerPolicy
) -> tuple[float, float, float] | None:
    """Average the gaps that tell the gain of a promotion, with its standard error and that one's degrees of freedom.

    Source: Welch, "The generalization of 'Student's' problem", Biometrika 34, 1947 (degrees of freedom of a sum of errors).
    """
    champion = checks[-1].contender(checks[-1].champion)
    if champion is None:
        return None
    newest = checks[-1].newest(champion.recipe)
    fresh = newest is not None and newest.trained_until <= champion.trained_until
    reign = _present_reign(checks)
    gaps = []
    for age, check in enumerate(reversed(checks[-LOOK_BACK:])):
        target = check.newest(recipe)
        own = check.gap(check.contender(champion.version), target) if age < reign else None
        aging = check.gap(check.previous(champion.recipe), target) if fresh else None
        freedom = degrees_of_freedom(check.row_count)
        gaps += [(policy.memory**age, gap, freedom) for gap in (own, aging) if gap is not None]
    if not gaps:
        return None
    total = sum(weight for weight, _, _ in gaps)
    mean = sum(weight * gap.mean for weight, gap, _ in gaps) / total
    if any(gap.standard_error is None for _, gap, _ in gaps):
        return mean, math.inf, 1.0
    parts = [((weight * (gap.standard_error or 0.0) / total) ** 2, freedom) for weight, gap, freedom in gaps]
    variance = math.fsum(part for part, _ in parts)
    terms = math.fsum(part**2 / freedom for part, freedom in parts)
    return mean, math.sqrt(variance), variance**2 / terms if terms > 0.0 else 1.0


def _lost_since_promotion(checks: Sequence[ChallengerCheck], recipe: str) -> float:
    """Add up what the champion lost to the recipe's newest models."""
    version = checks[-1].champion
    gaps = [
        check.gap(check.contender(version), check.newest(recipe))
        for check in checks[-_present_reign(checks) :]
        if check.champion == version
    ]
    return sum(max(gap.mean, 0.0) for gap in gaps if gap is not None)


def _present_reign(checks: Sequence[ChallengerCheck]) -> int:
    """Count the newest checks that tell of the champion as it is now: what made it leave once is over where it came back."""
    version, left = checks[-1].champion, False
    for age, check in enumerate(reversed(checks)):
        left = left or check.champion != version
        if left and check.champion == version:
            return next(age for age, one in enumerate(reversed(checks)) if one.champion != version)
    return len(checks)


def world_changed(checks: Sequence[ChallengerCheck], policy: ChallengerPolicy) -> bool:
    """Tell a change of the world from the usual ups and downs: by a prediction interval for the next window's loss.

    :param checks: of successive windows, oldest first; the last one is asked about, and the twelve before it.

    Source: Hahn and Meeker, "Statistical Intervals", 1991, section 4.7 (one future observation of a normal sample).
    """
    *before, now = [check.best_loss for check in checks[-LOOK_BACK - 1 :]]
    if len(before) < FEWEST_LEVELS or now <= (1.0 + policy.alarm_change) * fmean(before):
        return False
    spread = stdev(before) * math.sqrt(1.0 + 1.0 / len(before))
    return (
        spread == 0.0
        or upper_tail((now - fmean(before)) / spread, len(before) - 1.0) < policy.alarm_significance
    )


def _reason(
    check: ChallengerCheck,
    recipe: str,
    gain: float,
    error: float,
    lost: float,
    required: float,
    *,
    sure: bool,
) -> str:
    whom, them = f"version {check.champion}", f"the newest models of recipe {recipe!r}"
    if not sure:
        return f"{them} are not better than {whom} beyond chance ({gain:.3g} ± {error:.2g} a row)"
    costs = (
        f"it lost {lost:.3g} a row to them since its promotion and would lose {gain:.3g} ± {error:.2g} in the next window"
        if lost > 0.0
        else f"it would lose {gain:.3g} ± {error:.2g} a row to them in the next window"
    )
    if lost + gain > required:
        return f"{them} beat {whom}: {costs}, and a promotion has to win back {required:.3g}"
    return f"{them} are better than {whom}, but not worth a promotion yet: {costs}, less than the {required:.3g} to win back"
