"""What the demo tells at its end: a table, a picture and a file of it."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


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
        decision = item.outcome + (
            f" -> version {item.promoted_version} promoted" if item.promoted_version else ""
        )
        lines.append(
            f"{item.window:<9}{item.rows:>7}  {item.model_version:>7}  {item.live_error:>9.2f}  {item.first_error:>15.2f}  {decision}"
        )
        if item.outcome != "nothing":
            lines += textwrap.wrap(
                item.reason, width - 11, initial_indent=" " * 11, subsequent_indent=" " * 11
            )
    return "\n".join(lines)


def draw(windows: Sequence[WindowStory], path: Path) -> None:
    """Draw the error per window of the live model and of the first one, with the promotions marked."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    names = [item.window for item in windows]
    live, first = [item.live_error for item in windows], [item.first_error for item in windows]
    figure, axes = plt.subplots(figsize=(9, 4.6), dpi=140, layout="constrained")
    # Two colors of the Okabe-Ito palette, told apart by the color-blind; the lines also differ in style.
    axes.plot(names, first, color="#D55E00", linestyle="--", marker="o", linewidth=1.8)
    axes.plot(names, live, color="#0072B2", marker="o", linewidth=2.4)
    gap = abs(first[-1] - live[-1]) > 0.05
    axes.annotate(
        "first model, kept",
        (len(names) - 1, first[-1]),
        (8, 0),
        textcoords="offset points",
        color="#D55E00",
        va="center",
    )
    if gap:
        axes.annotate(
            "live model",
            (len(names) - 1, live[-1]),
            (8, 0),
            textcoords="offset points",
            color="#0072B2",
            va="center",
        )
    top = max(*first, *live)
    for index, item in enumerate(windows):
        if item.promoted_version:
            axes.axvline(index + 0.5, color="0.55", linewidth=1, linestyle=":")
            axes.annotate(
                f"retrained:\nversion {item.promoted_version}",
                (index + 0.5, top),
                (4, 0),
                textcoords="offset points",
                fontsize=8.5,
                color="0.3",
                va="top",
            )
    axes.set_ylim(bottom=0)
    axes.set_xlim(right=len(names) - 1 + 1.7)
    axes.set_ylabel("mean absolute error, dollars")
    axes.set_title(
        "Error per month: the live model and the first one on the same trips", loc="left", fontsize=11
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9")
    axes.tick_params(axis="x", labelsize=8.5)
    figure.savefig(path)
    plt.close(figure)
