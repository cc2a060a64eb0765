"""What this package costs Airflow: CPU seconds of imports and of parsing each reference Dag.

Each figure is the median of fresh processes, measured side by side with what it is compared with.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REPEATS = 5

MODULES = "; ".join(
    f"import airflow_mlops.{package}.{module.stem}"
    for package in ("operators", "sensors", "triggers", "hooks")
    for module in sorted((ROOT / "airflow_mlops" / package).glob("[a-z]*.py"))
)
SDK = "import airflow.sdk; from airflow.sdk import DAG, BaseOperator, BaseSensorOperator, BaseHook; import airflow.triggers.base"
CPU = "; import resource; u = resource.getrusage(resource.RUSAGE_SELF); print(u.ru_utime + u.ru_stime, u.ru_maxrss)"
PARSE = """
import time
from airflow.dag_processing.dagbag import DagBag
import airflow.sdk
start = time.process_time()
bag = DagBag({path!r})
assert len(bag.dags) == 1 and not bag.import_errors, bag.import_errors
print(time.process_time() - start, 0)
"""


def measure(code: str) -> tuple[float, float]:
    """Run code in a fresh process; it prints CPU seconds and peak memory in kB."""
    with tempfile.TemporaryDirectory() as home:
        environment = {**os.environ, "AIRFLOW_HOME": home, "AIRFLOW__CORE__LOAD_EXAMPLES": "False"}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
        )
    seconds, memory = done.stdout.split()[-2:]
    return float(seconds), float(memory) / 1024.0


def medians(*codes: str) -> list[tuple[float, float]]:
    """Measure several codes in turn, so that what else the machine does meets all of them alike."""
    rounds = [[measure(code) for code in codes] for _ in range(REPEATS)]
    return [
        (statistics.median(r[i][0] for r in rounds), statistics.median(r[i][1] for r in rounds))
        for i in range(len(codes))
    ]


def main() -> None:
    """Print both tables."""
    (bare, bare_mb), (ours, ours_mb) = medians(SDK + CPU, f"{SDK}; {MODULES}{CPU}")
    print(f"{'import':<42}{'CPU s':>8}{'peak MB':>10}")
    print(f"{'airflow.sdk':<42}{bare:>8.2f}{bare_mb:>10.0f}")
    print(f"{'airflow.sdk and all of airflow_mlops':<42}{ours:>8.2f}{ours_mb:>10.0f}")
    print(f"{'added by airflow_mlops':<42}{ours - bare:>8.2f}{ours_mb - bare_mb:>10.0f}\n")
    print(f"{'parse':<42}{'CPU s':>8}")
    for path in sorted((ROOT / "dags").glob("*.py")):
        (seconds, _), *_ = medians(PARSE.format(path=str(path)))
        print(f"{path.name:<42}{seconds:>8.2f}")


if __name__ == "__main__":
    main()
