"""Change detection: windows until a false alarm, and until a true one, on simulated streams.

``python benchmarks/change.py`` writes the table of docs/explanation/change.md to standard output (about two minutes).
"""

from __future__ import annotations

import argparse
import json
import sys

import numpy as np

from airflow_mlops.core.change import ChangePolicy, WindowLoss, effective_count, evidence_path

ROWS = 1000


def window_means(random: np.random.Generator, count: int, *, scatter: float, memory: float) -> np.ndarray:
    """Give true levels of windows about 1, which remember each other by ``memory``."""
    noise = random.standard_normal(count)
    level = np.empty(count)
    state = noise[0]
    for place in range(count):
        state = noise[place] if place == 0 else memory * state + np.sqrt(1 - memory**2) * noise[place]
        level[place] = 1.0 + scatter * state
    return level


def rows_of(random: np.random.Generator, mean: float, *, memory: float, heavy: bool) -> np.ndarray:
    """Give absolute losses of this mean; of neighbors that err alike by ``memory``, or with heavy tails."""
    noise = random.standard_t(3, ROWS) if heavy else random.standard_normal(ROWS)
    if memory:
        from scipy.signal import lfilter

        noise = lfilter([np.sqrt(1 - memory**2)], [1.0, -memory], noise)
    losses = np.abs(noise)
    return losses * mean / np.sqrt(2 / np.pi) if not heavy else losses * mean / 1.1027


def stream(
    random: np.random.Generator, count: int, settings: dict[str, float], *, shift: float, at: int
) -> tuple[WindowLoss, list[WindowLoss]]:
    """Give window losses, worse by ``shift`` from window ``at`` on, and what was promised."""
    level = window_means(random, count, scatter=settings["scatter"], memory=settings["between"])
    level[at:] *= 1.0 + shift
    windows = []
    for place, mean in enumerate([1.0, *level]):
        losses = rows_of(random, max(mean, 0.05), memory=settings["within"], heavy=bool(settings["heavy"]))
        windows.append(
            WindowLoss(
                label=str(place),
                model_version="1",
                mean=float(losses.mean()),
                standard_deviation=float(losses.std()),
                effective_count=effective_count(losses),
            )
        )
    return windows[0], windows[1:]


def first_alarm(promised: WindowLoss, windows: list[WindowLoss], start: int = 0) -> int | None:
    """Give the number of the first window, from ``start`` on, at which a change is called."""
    threshold = 1.0 / ChangePolicy().false_alarm_rate
    path = evidence_path(windows, promised=promised)
    return next((place for place in range(start, len(path)) if path[place] >= threshold), None)


SETTINGS = {
    "independent rows": {"scatter": 0.0, "between": 0.0, "within": 0.0, "heavy": 0},
    "rows that err alike (autocorrelation 0.9)": {"scatter": 0.0, "between": 0.0, "within": 0.9, "heavy": 0},
    "heavy tails (Student's t, 3 degrees)": {"scatter": 0.0, "between": 0.0, "within": 0.0, "heavy": 1},
    "windows scatter by 10 %": {"scatter": 0.1, "between": 0.0, "within": 0.0, "heavy": 0},
    "windows scatter by 10 %, autocorrelation 0.5": {
        "scatter": 0.1,
        "between": 0.5,
        "within": 0.0,
        "heavy": 0,
    },
    "windows scatter by 10 %, autocorrelation 0.8": {
        "scatter": 0.1,
        "between": 0.8,
        "within": 0.0,
        "heavy": 0,
    },
}


def main() -> None:
    """Simulate and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=40, help="streams per setting")
    parser.add_argument("--windows", type=int, default=100, help="windows per stream without a change")
    options = parser.parse_args()
    table = {}
    for name, settings in SETTINGS.items():
        random = np.random.default_rng(0)
        seen, alarms = 0, 0
        for _ in range(options.streams):
            promised, windows = stream(random, options.windows, settings, shift=0.0, at=0)
            found = first_alarm(promised, windows)
            seen += options.windows if found is None else found + 1
            alarms += found is not None
        delays = {}
        for shift in (0.1, 0.2, 0.5, 1.0):
            waits = []
            for _ in range(options.streams):
                promised, windows = stream(random, 30, settings, shift=shift, at=10)
                found = first_alarm(promised, windows, start=10)
                waits.append(20 if found is None else found - 10)
            delays[f"{shift:.0%}"] = {
                "median windows": float(np.median(waits)) + 1,
                "found": round(float(np.mean(np.array(waits) < 20)), 2),
            }
        table[name] = {"windows": seen, "false alarms": alarms, "delays": delays}
        sys.stdout.write(f"{name}: {json.dumps(table[name])}\n")
        sys.stdout.flush()
    sys.stdout.write(
        f"nominal: one false alarm in {1 / ChangePolicy().false_alarm_rate:.0f} windows or fewer\n"
    )


if __name__ == "__main__":
    main()
