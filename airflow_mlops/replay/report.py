"""Reports of replays: a table, a picture, and all of it as JSON."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from airflow_mlops.core.codec import to_dict
from airflow_mlops.ledger import ACTING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from airflow_mlops.replay.result import ReplayResult

_CHAMPION, _FIRST, _PROMOTED = "#1f77b4", "#b0b0b0", "#d62728"


def write_report(results: Sequence[ReplayResult], folder: Path) -> None:
    """Write ``results.json``, ``table.md`` and a picture per stream."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = [
        to_dict(result) | {"value": result.value, "first_value": result.first_value} for result in results
    ]
    (folder / "results.json").write_text(json.dumps(plain, indent=1))
    (folder / "table.md").write_text(table(results))
    for stream in dict.fromkeys(result.stream for result in results):
        draw([result for result in results if result.stream == stream], folder / f"{stream}.png")


def table(results: Sequence[ReplayResult]) -> str:
    """Give a Markdown table, a row per stream and policy."""
    lines = [
        "| stream | policy | metric | mean over all rows | never retrained | promotions | trainings | windows |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {item.stream} | {item.policy} | {item.metric} | {item.value:.4g} | {item.first_value:.4g} | {item.promotions} "
        f"| {item.trainings} | {len(item.windows)} |"
        for item in results
    ]
    return "\n".join(lines) + "\n"


def draw(results: Sequence[ReplayResult], path: Path) -> None:
    """Draw the metric per window, one panel per policy; promotions, and models that were turned down, are marked."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(
        len(results), 1, figsize=(9, 1.2 + 2.2 * len(results)), sharex=True, sharey=True, squeeze=False
    )
    for axes, result in zip(panels[:, 0], results, strict=True):
        _draw_panel(axes, result)
    figure.suptitle(f"{results[0].stream}: {results[0].metric} per window")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_panel(axes: Any, result: ReplayResult) -> None:
    times = [item.window.start for item in result.windows]
    axes.plot(times, [item.first_value for item in result.windows], color=_FIRST, label="first model")
    axes.plot(times, [item.value for item in result.windows], color=_CHAMPION, label="champion", marker=".")
    for item in result.windows:
        if item.promoted or item.outcome in ACTING:
            color = _PROMOTED if item.promoted else _FIRST
            axes.axvline(item.window.end, color=color, linewidth=0.8, linestyle=":")
    axes.set_title(
        f"{result.policy}: {result.value:.4g}, {result.promotions} promotions (dotted red), {result.trainings} trainings",
        fontsize=9,
        loc="left",
    )
    axes.legend(fontsize=8, frameon=False)
