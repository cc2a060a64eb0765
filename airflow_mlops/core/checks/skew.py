"""Train/serve skew: requests a model was never trained for, whatever their distribution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from airflow_mlops.core.profiles.profile_columns import CategoricalProfile, ColumnProfile, NumericProfile

if TYPE_CHECKING:
    from airflow_mlops.core.profiles.profile import Profile

#: Share of requests from which a finding counts (rule of thumb: a model answers one request in a hundred blindly).
SKEW_SHARE = 0.01
#: New categories that are named in a sentence.
NAMED = 3

SkewKind = Literal["missing", "nulls", "unseen", "out_of_range", "infinite"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Skew:
    """Requests unlike anything in training.

    :param feature: input.
    :param kind: ``missing`` (never sent), ``nulls`` (more often null than in training), ``unseen`` (categories that were not
        in training, or too rare there to be known by name), ``out_of_range`` (beyond the smallest or largest training value) or ``infinite``.
    :param reference_share: share of the training rows, in ``[0, 1]``.
    :param current_share: share of the requests.
    :param sentence: the finding in words.
    """

    feature: str
    kind: SkewKind
    reference_share: float
    current_share: float
    sentence: str


def find_skew(reference: Profile, current: Profile, *, share: float = SKEW_SHARE) -> tuple[Skew, ...]:
    """Compare requests with the training rows at deployment.

    :param reference: profile of the training rows.
    :param current: profile of the requests, with the same cells.
    :param share: share of the requests from which a finding counts.
    """
    return tuple(
        finding
        for column in current.columns
        for finding in _of_column(reference.column(column.name), column)
        if finding.current_share - finding.reference_share >= share
    )


def _of_column(reference: ColumnProfile, current: ColumnProfile) -> list[Skew]:
    if not current.row_count:
        return []  # asked of versions that did not take it, or kept out of the log
    shares = [side.null_count / max(side.row_count, 1) for side in (reference, current)]
    if current.null_count == current.row_count:
        return [_skew("missing", current, shares[0], shares[1], "is never sent")]
    found = [
        _skew("nulls", current, shares[0], shares[1], f"null in {shares[1]:.1%}, {shares[0]:.1%} in training")
    ]
    rows = max(current.row_count, 1)
    if isinstance(current, NumericProfile) and isinstance(reference, NumericProfile):
        outside, infinite = current.outside_count / rows, current.infinite_count / rows
        limits = f"[{reference.minimum:.4g}, {reference.maximum:.4g}]" if reference.count else "nothing"
        found.append(
            _skew("out_of_range", current, 0.0, outside, f"{outside:.1%} outside of the training's {limits}")
        )
        found.append(_skew("infinite", current, 0.0, infinite, f"infinite in {infinite:.1%}"))
    if isinstance(current, CategoricalProfile) and isinstance(reference, CategoricalProfile):
        before, now = (side.other_count / max(side.row_count, 1) for side in (reference, current))
        found.append(_skew("unseen", current, before, now, _unseen(reference, current, before, now)))
    return found


def _unseen(reference: CategoricalProfile, current: CategoricalProfile, before: float, now: float) -> str:
    """Say what is known of categories without a cell: those of the training are known only together, and may be among them."""
    if reference.other_count:
        return (
            f"{now:.1%} in categories beyond the {len(reference.layout.categories)} most frequent ones, {before:.1%} in training: "
            "rare, or new"
        )
    names = sorted(current.unseen, key=lambda name: (-current.unseen[name], name))[:NAMED]
    return f"{now:.1%} new categories, such as {', '.join(names)}"


def _skew(kind: SkewKind, column: ColumnProfile, reference: float, current: float, words: str) -> Skew:
    return Skew(
        feature=column.name,
        kind=kind,
        reference_share=reference,
        current_share=current,
        sentence=f"{column.name}: {words}",
    )
