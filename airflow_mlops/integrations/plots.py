"""matplotlib: the pictures of an explanation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from airflow_mlops.core.model.explanation import Importance, PartialDependence

_BLUE, _GRAY = "#1f6feb", "#8b949e"
#: Panels of a picture; more can't be read.
MOST_FEATURES = 12


def draw_importances(importances: Sequence[Importance], metric: str, path: Path) -> None:
    """Draw one bar per feature, most important on top."""
    shown = list(importances[:MOST_FEATURES])[::-1]
    figure, axes = _figure(7.0, 1.2 + 0.32 * len(shown))
    axes.barh(
        [_literal(item.name) for item in shown],
        [item.increase for item in shown],
        xerr=[item.standard_deviation for item in shown],
        color=_BLUE,
        ecolor=_GRAY,
    )
    axes.set_xlabel(f"{_literal(metric)} gets worse by, when the feature is shuffled")
    figure.savefig(path)


def draw_partial_dependences(curves: Sequence[PartialDependence], output: str, path: Path) -> None:
    """Draw one panel per feature."""
    shown = curves[:MOST_FEATURES]
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure, panels = _figure(3.4 * columns, 2.6 * rows, rows, columns)
    flat = list(panels.flat) if hasattr(panels, "flat") else [panels]
    for panel, curve in zip(flat, shown, strict=False):
        if isinstance(curve.values[0], str):
            panel.bar([_literal(str(value)) for value in curve.values], curve.scores, color=_BLUE)
            panel.tick_params(axis="x", rotation=45)
        else:
            panel.plot(curve.values, curve.scores, color=_BLUE)
        panel.set_title(_literal(curve.name), fontsize=10)
    for panel in flat[len(shown) :]:
        panel.set_axis_off()
    figure.supylabel(f"mean {_literal(output)}", fontsize=10)
    figure.savefig(path)


def draw_contributions(
    names: Sequence[str],
    contributions: NDArray[Any],
    table: Mapping[str, NDArray[Any]],
    order: Sequence[str],
    path: Path,
) -> None:
    """Draw one dot per row and feature: how much it moved the answer, colored by the feature's rank in its column."""
    import numpy as np
    from matplotlib.cm import ScalarMappable

    shown = list(order[:MOST_FEATURES])[::-1]
    figure, axes = _figure(7.0, 1.4 + 0.38 * len(shown))
    rng = np.random.default_rng(0)
    for level, name in enumerate(shown):
        values = contributions[:, names.index(name)]
        _, ranks = np.unique(
            table[name].astype(str) if table[name].dtype == object else table[name], return_inverse=True
        )
        jitter = level + rng.uniform(-0.18, 0.18, len(values))
        axes.scatter(values, jitter, c=ranks / max(1, ranks.max()), cmap="coolwarm", s=9, linewidths=0)
    axes.set_yticks(range(len(shown)), [_literal(name) for name in shown])
    axes.axvline(0.0, color=_GRAY, linewidth=0.8)
    axes.set_xlabel("contribution to the answer (SHAP)")
    bar = figure.colorbar(ScalarMappable(cmap="coolwarm"), ax=axes, ticks=[0, 1])
    bar.ax.set_yticklabels(["low", "high"])
    bar.set_label("value of the feature")
    figure.savefig(path)


def _literal(text: str) -> str:
    """Give a name as it is to be drawn: what stands between two dollar signs would be read as a formula."""
    return text.replace("$", r"\$")


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    """Make a figure without pyplot: nothing global, safe in a task."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns)
