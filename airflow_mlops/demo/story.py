"""What the demo tells at its end: a table, a picture and a file of it."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_FIRST, _LIVE = "#D55E00", "#0072B2"
_WORDS = {"retrain": "retraining decided", "bring_back": "earlier model brought back"}
_NOTE = {"fontsize": 8.5, "color": "0.3", "ha": "center", "va": "bottom"}


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowStory:
    """One window of the story.

    :param window: its name.
    :param rows: predictions made in it.
    :param model_version: version that made them.
    :param live_error: mean absolute error of the service's answers, dollars.
    :param first_error: error of the first model on the same rows, dollars.
    :param outcome: what was decided.
    :param reason: why.
    :param promoted_version: version that was promoted after this window; ``None``: none.
    """

    window: str
    rows: int
    model_version: str
    live_error: float
    first_error: float
    outcome: str
    reason: str
    promoted_version: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Story:
    """The whole run.

    :param links: name to address.
    :param seconds: name of a stage to how long it took.
    :param peak_memory_mb: most memory all processes held together.
    """

    windows: tuple[WindowStory, ...]
    links: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_mb: float = 0.0
    details: dict[str, Any] = field(default_factory=dict)


def table(windows: Sequence[WindowStory], *, width: int = 110) -> str:
    """Lay the windows out as text; the reason of a decision goes under its line."""
    head = f"{'window':<9}{'trips':>7}  {'version':>7}  {'MAE live':>9}  {'MAE first model':>15}  decision"
    lines = [head, "-" * min(width, len(head) + 20)]
    for item in windows:
        decision = item.outcome + (f" -> version {item.promoted_version}" if item.promoted_version else "")
        lines.append(
            f"{item.window:<9}{item.rows:>7}  {item.model_version:>7}  {item.live_error:>9.2f}  {item.first_error:>15.2f}  {decision}"
        )
        if item.outcome != "nothing":
            lines += textwrap.wrap(
                item.reason, width - 11, initial_indent=" " * 11, subsequent_indent=" " * 11
            )
    return "\n".join(lines)


def draw(windows: Sequence[WindowStory], path: Path, *, change: tuple[str, str] | None = None) -> None:
    """Draw the error per window of the live model and of the first one, with the change and the promotions marked.

    :param change: window in which the world changed, and what changed, in a few words.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9.5, 4.8), dpi=140, layout="constrained")
    _draw_errors(axes, windows)
    _draw_decisions(axes, windows, change)
    axes.set_ylabel("mean absolute error, dollars")
    axes.set_title(
        "Error per month: the live model and the first one on the same trips", loc="left", fontsize=11
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.92")
    axes.tick_params(axis="x", labelsize=8.5)
    figure.savefig(path)
    plt.close(figure)


def _draw_errors(axes: Any, windows: Sequence[WindowStory]) -> None:
    names = [item.window for item in windows]
    live, first = [item.live_error for item in windows], [item.first_error for item in windows]
    # Two colors of the Okabe-Ito palette, told apart by the color-blind; the lines also differ in style.
    axes.plot(names, first, color=_FIRST, linestyle="--", marker="o", linewidth=1.8, zorder=2)
    axes.plot(names, live, color=_LIVE, marker="o", linewidth=2.4, zorder=3)
    _label(axes, len(names) - 1, first[-1], "first model, kept", _FIRST)
    if abs(first[-1] - live[-1]) > 0.05:
        _label(axes, len(names) - 1, live[-1], "live model", _LIVE)
    axes.set_ylim(0, 1.3 * max(*first, *live))
    axes.set_xlim(-0.4, len(names) - 1 + 1.5)


def _draw_decisions(axes: Any, windows: Sequence[WindowStory], change: tuple[str, str] | None) -> None:
    """Mark the change and what was decided at their window, promotions between the windows."""
    for index, item in enumerate(windows):
        words = [change[1]] if change and change[0] == item.window else []
        if item.outcome in _WORDS:
            words.append(_WORDS[item.outcome])
            axes.plot(index, item.live_error, "o", color=_LIVE, markersize=13, fillstyle="none", zorder=4)
        position = (index, item.live_error)
        axes.annotate(
            "\n".join(words), position, (-12, 4), textcoords="offset points", **(_NOTE | {"ha": "right"})
        )
        if item.promoted_version:
            axes.axvline(index + 0.5, ymax=0.86, color="0.55", linewidth=1, linestyle=":")
            text = f"version {item.promoted_version}\npromoted"
            axes.text(index + 0.5, 0.875, text, transform=axes.get_xaxis_transform(), **_NOTE)


def _label(axes: Any, x: float, y: float, text: str, color: str) -> None:
    axes.annotate(text, (x, y), (8, 0), textcoords="offset points", color=color, va="center")
