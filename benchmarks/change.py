"""Change detection: windows until a false alarm, and until a true one, on simulated streams.

``python benchmarks/change.py`` writes the figures of docs/how-to/late-labels.md to standard output (about two minutes), and with
``--real`` those on the real streams.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from airflow_mlops.core.monitoring.change import ChangePolicy, WindowLoss, effective_count, evidence_path

#: Rows per simulated window.
ROWS = 1000
DATA = Path(__file__).parent.parent.parent / "shared" / "data"


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
        windows.append(window_of(str(place), losses))
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


class RealStream(NamedTuple):
    """A real stream cut into windows, and how a model is made for it."""

    inputs: np.ndarray
    target: np.ndarray
    labels: np.ndarray
    first: int
    classify: bool
    model: Any

    def path(self, order: np.ndarray) -> tuple[list[float], list[str]]:
        """Train on the first rows of an order, and give the evidence and the name of each window after them."""
        cut = int(0.8 * self.first)
        self.model.fit(self.inputs[order[:cut]], self.target[order[:cut]])
        answers, truth = self.model.predict(self.inputs[order]), self.target[order]
        losses = (answers != truth).astype(float) if self.classify else np.abs(answers - truth)
        places = np.flatnonzero(np.append(True, self.labels[1:] != self.labels[:-1]))
        ends = np.append(places[1:], len(losses))
        windows = [
            window_of(str(self.labels[start]), losses[start:end])
            for start, end in zip(places, ends, strict=True)
            if start >= self.first
        ]
        promised = window_of("held out", losses[cut : self.first])
        return evidence_path(windows, promised=promised), [window.label for window in windows]


def window_of(label: str, losses: np.ndarray) -> WindowLoss:
    """Give what the search for a change reads of a window's losses."""
    return WindowLoss(
        label=label,
        model_version="1",
        mean=float(losses.mean()),
        standard_deviation=float(losses.std()),
        effective_count=effective_count(losses),
    )


def read_stream(name: str) -> RealStream:
    """Read a stream of ../shared/data, in time order."""
    import polars as pl
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

    about = json.loads((DATA / "expected.json").read_text())["datasets"][name]
    rows = pl.read_parquet(DATA / f"{name}.parquet")
    time = next(column for column, kind in rows.schema.items() if kind.is_temporal())
    rows = rows.sort(time)
    if name == "elec2":
        labels = np.array([f"block {place // 1344}" for place in range(rows.height)])
    else:
        labels = rows[time].dt.strftime("%Y-%m").to_numpy()
    places = np.flatnonzero(np.append(True, labels[1:] != labels[:-1]))
    classify = about["task"] == "clf"
    loss = {"loss": "absolute_error"} if name == "nyc_taxi" else {}
    return RealStream(
        inputs=rows.select(about["features_num"] + about["features_cat"]).cast(pl.Float64).to_numpy(),
        target=rows[about["target"]].to_numpy(),
        labels=labels,
        first=int(places[about["n_reference_windows"]]),
        classify=classify,
        model=HistGradientBoostingClassifier(random_state=0)
        if classify
        else HistGradientBoostingRegressor(random_state=0, **loss),
    )


def real_streams(shuffles: int = 5) -> None:
    """Print when a model that is never trained again is found to be worse, and the alarms on shuffled rows."""
    threshold = 1.0 / ChangePolicy().false_alarm_rate
    for name in ("elec2", "bike_sharing", "nyc_taxi"):
        real = read_stream(name)
        path, names = real.path(np.arange(len(real.target)))
        alarms = [label for label, evidence in zip(names, path, strict=True) if evidence >= threshold]
        shuffled = [
            evidence
            for seed in range(shuffles)
            for evidence in real.path(np.random.default_rng(seed).permutation(len(real.target)))[0]
        ]
        figures = {
            "windows": len(names),
            "first alarm": alarms[0] if alarms else None,
            "windows in alarm": len(alarms),
            "shuffled windows": len(shuffled),
            "of them in alarm": sum(evidence >= threshold for evidence in shuffled),
        }
        sys.stdout.write(f"{name}: {json.dumps(figures)}\n")
        sys.stdout.flush()


def main() -> None:
    """Simulate and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=40, help="streams per setting")
    parser.add_argument("--windows", type=int, default=100, help="windows per stream without a change")
    parser.add_argument("--real", action="store_true", help="the real streams of ../shared/data instead")
    options = parser.parse_args()
    if options.real:
        real_streams()
        return
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
