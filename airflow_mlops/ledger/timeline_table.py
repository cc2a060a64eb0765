"""Timelines as text: a table for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from airflow_mlops.ledger.entries import ACTING

if TYPE_CHECKING:
    from airflow_mlops.ledger.timeline_values import (
        EstimatedMetric,
        ModelOverview,
        RealizedMetric,
        Timeline,
        TimelineWindow,
        WindowDecision,
        WindowDrift,
    )

_NOTHING = "-"


def timeline_text(timeline: Timeline) -> str:
    """Write a line per window, then what happened, then what was decided and why."""
    name = timeline.model_name
    if not timeline.windows and not timeline.events:
        return f"The ledger knows nothing of {name} in this range.\n"
    lines = [*_table(_HEADER, [_row(window) for window in timeline.windows])]
    if timeline.events:
        lines += ["", "Events"]
        lines += [
            f"{event.at:%Y-%m-%d %H:%M}  {event.kind:<10}  {event.summary}" for event in timeline.events
        ]
    reasons = [(item.window, item.decision) for item in timeline.windows if item.decision is not None]
    if reasons:
        lines += ["", "Decisions"]
        lines += [f"{window}  {decision.outcome}: {decision.reason}" for window, decision in reasons]
    if timeline.older is not None:
        lines += ["", f"There are older windows: --until {timeline.older.start:%Y-%m-%dT%H:%M:%S}"]
    return "\n".join(lines) + "\n"


def overview_text(models: Sequence[ModelOverview]) -> str:
    """Write a line per model."""
    if not models:
        return "The ledger knows of no model yet.\n"
    rows = [
        (
            model.model_name,
            model.champion or _NOTHING,
            f"{model.champion_since:%Y-%m-%d %H:%M}" if model.champion_since else _NOTHING,
            model.state.replace("_", " "),
            str(model.last.window) if model.last else _NOTHING,
            _value(model.last.realized) if model.last else _NOTHING,
            str(model.open_retraining.window or model.open_retraining.key)
            if model.open_retraining
            else _NOTHING,
        )
        for model in models
    ]
    header = ("model", "champion", "since", "state", "last window", "metric", "open retraining")
    return "\n".join(_table(header, rows)) + "\n"


_HEADER = ("window", "champion", "metric", "promised", "grade", "estimated", "inputs", "decision")


def _row(window: TimelineWindow) -> tuple[str, ...]:
    realized = window.realized
    promised = realized.promised if realized else None
    return (
        str(window.window),
        window.champion or _NOTHING,
        _value(realized),
        f"{promised:.4g}" if promised is not None else _NOTHING,
        _grade(realized),
        _estimate(window.estimated),
        _inputs(window.drift),
        _decided(window.decision),
    )


def _value(realized: RealizedMetric | None) -> str:
    if realized is None or realized.value is None:
        return _NOTHING
    return f"{realized.metric} {realized.value:.4g}{_ends(realized.interval)}"


def _ends(interval: tuple[float, float] | None) -> str:
    return f" ({interval[0]:.4g} to {interval[1]:.4g})" if interval else ""


def _grade(realized: RealizedMetric | None) -> str:
    if realized is None:
        return _NOTHING
    word = "degraded" if realized.degraded else "fine" if realized.measured else "not measured"
    so_far = "" if realized.labelled_share >= 1.0 else f", {realized.labelled_share:.0%} labelled"
    return f"{word}{so_far}{'' if realized.final else ', provisional'}"


def _estimate(estimated: EstimatedMetric | None) -> str:
    if estimated is None:
        return _NOTHING
    trust = "" if estimated.trusted else ", not trusted"
    return f"{estimated.value:.4g}{_ends(estimated.interval)}{trust}"


def _inputs(drift: WindowDrift | None) -> str:
    if drift is None:
        return _NOTHING
    if not drift.drifted_count:
        return "as before"
    moved = [
        f"{item.column} {item.share_of_shift:.0%}" if item.share_of_shift else item.column
        for item in drift.columns
        if item.drifted
    ][:2]
    word = "drifted" if drift.drifted else "moved"
    return f"{word}, {drift.drifted_count} of {drift.feature_count}: {', '.join(moved)}"


def _decided(decision: WindowDecision | None) -> str:
    if decision is None:
        return _NOTHING
    if decision.outcome not in ACTING:
        return decision.outcome
    version = f" version {decision.promoted_version}" if decision.promoted_version else ""
    return f"{decision.outcome}: {decision.result or 'open'}{version}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[place]) for row in [header, *rows]) for place in range(len(header))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [header, *rows]
    ]
