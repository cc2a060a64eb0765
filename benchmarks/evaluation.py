"""What a comparison costs: 1,000,000 rows, 1,000 paired resamples, challenger, champion and a simple guess.

Also of 3 labels (20,000 rows) and of 200 (2,000 rows). A part of a name as argument runs only the lines that have it.

Beside it, in turn, each in a fresh process of one thread: the same test by scipy.stats.bootstrap on the rows (a peer; at 1,000,000
rows it takes minutes, so it gets 50 resamples and is shown per 1,000), and scikit-learn's metrics computed once without any resampling
(about the physical limit: every row is read once per metric). Wall and CPU seconds, peak memory.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys

ROWS, ROUNDS = 1_000_000, 3

DATA = f"""
import json, resource, sys, time
import numpy as np
rng = np.random.default_rng(0)
n = {ROWS}
target = rng.gamma(4.0, 4.0, n)
new, old = target + rng.normal(0, 2.0, n), target + rng.normal(0, 2.1, n)
label = (rng.random(n) < 0.3).astype(int)
p_new, p_old = (1 / (1 + np.exp(-(rng.normal(0, 1, n) + 2.0 * label - 1.0))) for _ in range(2))
columns = {{f"x{{i}}": rng.normal(size=n) for i in range(8)}} | {{"zone": rng.integers(0, 200, n).astype(str)}}
"""

LABELS = """
from airflow_mlops.core.comparison.metrics import DEFAULT_METRICS
from airflow_mlops.core.comparison.predictions import Predictions
def answers(p): return Predictions(values=(p > 0.5).astype(int), probabilities=np.column_stack([1 - p, p]), classes=("0", "1"))
"""

SEVERAL = """
from airflow_mlops.core.comparison.evaluation import compare_models
from airflow_mlops.core.comparison.metrics import DEFAULT_METRICS
from airflow_mlops.core.comparison.predictions import Predictions
import scipy.special, scipy.fft
def several(rows, count):
    names = np.array([f"c{number:03d}" for number in range(count)], dtype=object)
    truth = rng.integers(0, count, rows)
    def model():
        scores = rng.normal(size=(rows, count))
        scores[np.arange(rows), truth] += 1.5
        given = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
        return Predictions(values=names[given.argmax(axis=1)], probabilities=given, classes=tuple(names))
    guess = Predictions(values=np.full(rows, names[0]), probabilities=np.full((rows, count), 1.0 / count), classes=tuple(names))
    return dict(target=names[truth], challenger=model(), champion=model(), baselines={"guess": guess})
"""

BEGIN = """
started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF)
base = before.ru_maxrss
"""

COST = """
usage = resource.getrusage(resource.RUSAGE_SELF)
cpu = usage.ru_utime + usage.ru_stime - before.ru_utime - before.ru_stime
print(json.dumps([time.monotonic() - started, cpu, (usage.ru_maxrss - base) / 1024]))
"""

VARIANTS = {
    "numbers: ours, 4 metrics": """
from airflow_mlops.core.comparison.evaluation import compare_models
from airflow_mlops.core.comparison.metrics import DEFAULT_METRICS, Predictions
import scipy.special
"""
    + BEGIN
    + """
compare_models(target=target, challenger=Predictions(values=new), champion=Predictions(values=old),
    baselines={"guess": Predictions(values=np.full(n, 16.0))}, metrics=DEFAULT_METRICS["regression"])
""",
    "numbers: scipy.stats.bootstrap, MAE alone": "from scipy import stats\n"
    + BEGIN
    + """
worse, better = np.abs(old - target), np.abs(new - target)
stats.bootstrap((worse - better,), np.mean, n_resamples=50, method="percentile", batch=5, random_state=0)
""",
    "numbers: scikit-learn, once, 4 metrics": "from sklearn import metrics\n"
    + BEGIN
    + """
for answers in (new, old, np.full(n, 16.0)):
    for metric in (metrics.mean_absolute_error, metrics.root_mean_squared_error, metrics.mean_absolute_percentage_error, metrics.r2_score):
        metric(target, answers)
""",
    "labels: ours, 10 metrics": LABELS
    + "from airflow_mlops.core.comparison.evaluation import compare_models\nimport scipy.special\n"
    + BEGIN
    + """
compare_models(target=label, challenger=answers(p_new), champion=answers(p_old), baselines={"guess": answers(np.full(n, 0.3))},
    metrics=DEFAULT_METRICS["classification"])
""",
    "3 labels, 20,000 rows: ours, 10 metrics": SEVERAL
    + "asked = several(20_000, 3)\n"
    + BEGIN
    + """
compare_models(**asked, metrics=DEFAULT_METRICS["classification"])
""",
    "200 labels, 2,000 rows: ours, 10 metrics": SEVERAL
    + "asked = several(2_000, 200)\n"
    + BEGIN
    + """
compare_models(**asked, metrics=DEFAULT_METRICS["classification"])
""",
    "labels: scikit-learn, once, 9 metrics": "from sklearn import metrics\n"
    + BEGIN
    + """
for p in (p_new, p_old, np.full(n, 0.3)):
    hard = (p > 0.5).astype(int)
    for metric in (metrics.accuracy_score, metrics.balanced_accuracy_score, metrics.f1_score, metrics.recall_score):
        metric(label, hard)
    metrics.precision_score(label, hard, zero_division=0)
    for metric in (metrics.roc_auc_score, metrics.average_precision_score, metrics.log_loss, metrics.brier_score_loss):
        metric(label, p)
""",
    "groups: ours, 3 of them, 2 labels": LABELS
    + "from airflow_mlops.core.comparison.fairness import compare_groups\nimport polars\n"
    + "people, given = np.array(['a', 'b', 'c'], dtype=object)[rng.integers(0, 3, n)], answers(p_new).values.astype(str).astype(object)\n"
    + BEGIN
    + """
compare_groups("sex", people, target=label, predicted=given, losses=(p_new - label) ** 2, labels=("0", "1"))
""",
    "slices: ours, 9 columns and 36 pairs": "from airflow_mlops.core.comparison.resampling import Blocks\nfrom airflow_mlops.core.comparison.slices import SlicePolicy, find_worse_slices\nimport scipy.special\n"
    + BEGIN
    + """
found = find_worse_slices(columns, np.abs(new - target), np.abs(old - target), Blocks.draw(n, resamples=1).starts, SlicePolicy())
""",
}


def main() -> None:
    """Run every variant in turn and print medians."""
    chosen = {name: code for name, code in VARIANTS.items() if all(part in name for part in sys.argv[1:])}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    costs: dict[str, list[list[float]]] = {name: [] for name in chosen}
    for _ in range(ROUNDS):
        for name, code in chosen.items():
            done = subprocess.run(
                [sys.executable, "-c", DATA + code + COST],
                env=environment,
                capture_output=True,
                text=True,
                check=True,
            )
            costs[name].append(json.loads(done.stdout.splitlines()[-1]))
    print(f"{'':56} {'wall s':>8} {'CPU s':>8} {'MB more':>8}")
    for name, rounds in costs.items():
        wall, cpu, memory = (statistics.median(column) for column in zip(*rounds, strict=True))
        scale, note = (20, ", per 1,000") if "bootstrap" in name else (1, "")
        print(f"{name + note:56} {wall * scale:8.2f} {cpu * scale:8.2f} {memory:8.0f}")


if __name__ == "__main__":
    main()
