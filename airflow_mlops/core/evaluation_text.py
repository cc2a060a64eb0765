"""An evaluation as a page of Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from airflow_mlops.core.evaluation import EvaluationReport, MetricComparison, MetricInterval, Rival
    from airflow_mlops.core.fairness import FairnessReport
    from airflow_mlops.core.promotion import Check
    from airflow_mlops.core.slices import SliceReport


def describe_evaluation(
    report: EvaluationReport,
    *,
    verdict: str,
    reason: str,
    checks: Sequence[Check],
    slices: SliceReport | None = None,
    groups: Sequence[FairnessReport] = (),
) -> str:
    """Tell what was compared, on what, and what follows.

    :param report: the numbers.
    :param verdict: what was concluded.
    :param reason: why, in a sentence.
    :param checks: everything that was looked at.
    :param slices: of challenger against champion.
    :param groups: per column that was asked for.
    """
    parts = [
        f"# {str(verdict).replace('_', ' ').capitalize()}\n\n{reason}.",
        _table(("check", "outcome", "what was found"), [(c.name, str(c.outcome), c.reason) for c in checks]),
        "## Metrics\n\n" + _metrics(report),
    ]
    if slices is not None:
        parts.append("## Slices\n\n" + _slices(slices))
    parts += [f"## Groups by {_cell(group.column)}\n\n" + _groups(group) for group in groups]
    return "\n\n".join(parts) + "\n"


def _metrics(report: EvaluationReport) -> str:
    names = list(dict.fromkeys(name for item in report.metrics for name in item.baselines))
    head = ("metric", "better", "challenger", "champion", *names, "improvement", "p", "detectable")
    rows = [_metric_row(item, names) for item in report.metrics]
    notes = [
        f"On {report.row_count} rows in {report.block_count} blocks of neighbors. In brackets: {report.confidence:.0%} "
        "bootstrap intervals. Improvement over the champion (over the first guess when there is none) in units of the "
        "metric; *p*: one-sided, paired; *detectable*: the improvement these rows show with 80 % power at 5 %. The first "
        "metric decides.",
        *(f"* {_cell(name)} was not measured: {_cell(why)}" for name, why in report.not_measured.items()),
    ]
    return "\n".join([_table(head, rows), "", *notes])


def _metric_row(item: MetricComparison, names: Sequence[str]) -> tuple[str, ...]:
    rival = item.champion or next(iter(item.baselines.values()), None)
    return (
        item.metric,
        "higher" if item.greater_is_better else "lower",
        _interval(item.challenger),
        _interval(item.champion.value) if item.champion else "",
        *(_interval(item.baselines[name].value) if name in item.baselines else "" for name in names),
        *_judged(rival),
    )


def _judged(rival: Rival | None) -> tuple[str, str, str]:
    if rival is None:
        return "", "", ""
    detectable = rival.minimum_detectable_difference
    return (
        _interval(rival.difference),
        f"{rival.p_value:.2g}",
        f"{detectable:.3g}" if detectable is not None else "",
    )


def _interval(measured: MetricInterval) -> str:
    if measured.low is None or measured.high is None:
        return f"{measured.value:.4g}"
    return f"{measured.value:.4g} ({measured.low:.4g} to {measured.high:.4g})"


def _slices(slices: SliceReport) -> str:
    rows = [
        (
            str(item),
            str(item.row_count),
            f"{item.challenger:.4g}",
            f"{item.champion:.4g}",
            f"{item.regression:+.1%}" if item.regression is not None else "",
            f"{item.p_value:.2g}",
        )
        for item in slices.worst
    ]
    head = ("where", "rows", f"{slices.loss}, challenger", "champion", "worse by", "adjusted p")
    return f"{slices.looked_at} slices were looked at; the ones that did worst:\n\n" + _table(head, rows)


def _groups(group: FairnessReport) -> str:
    head = ("group", "rows", "mean loss", "selection rate", "true positive rate", "false positive rate")
    rows = [
        (
            item.group,
            str(item.row_count),
            f"{item.mean_loss:.4g}",
            _share(item.selection_rate),
            _share(item.true_positive_rate),
            _share(item.false_positive_rate),
        )
        for item in group.groups
    ]
    return _table(head, rows)


def _share(value: float | None) -> str:
    return f"{value:.3f}" if value is not None else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(text: str) -> str:
    """Keep what comes from data or from a user inside its cell, and out of the page's markup."""
    for sign, safe in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "\\|"), ("\n", " "), ("`", "'")):
        text = text.replace(sign, safe)
    return text
