"""Cost of a drift check: profiles against Evidently's DataDriftPreset, each case in a process of its own, one after the other.

``python benchmarks/drift.py [case ...]`` makes its tables in a temporary folder (``TMPDIR`` says where) and prints CPU seconds of
the whole process, start and imports included, its peak of resident memory (``VmHWM``) and wall time. Cases:

* ``1M``: 1,000,000 rows against as many, 14 numbers and 4 categories; the reference profile is stored. Evidently beside it.
* ``5M``, ``20M``: the same against 5 and 20 million rows.
* ``100-columns``: 300,000 reference rows, profiled as well, against 30,000 rows.
* ``1000-columns``: 3,000,000 rows of 1,000 columns on both sides, the reference profiled as well (6 GB of Parquet).
* ``merge``: 10,000 stored partition profiles of 18 columns into one.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

NUMBERS = [f"n{number}" for number in range(14)]
CATEGORIES = [f"c{number}" for number in range(4)]
BLOCK = 250_000


def columns(random: np.random.Generator, rows: int, shift: float) -> dict[str, Any]:
    """Numbers of several shapes, and categories; a third of the columns moves."""
    made: dict[str, Any] = {}
    for number, name in enumerate(NUMBERS):
        values = (random.normal(size=rows), random.lognormal(size=rows), random.gamma(2.0, 3.0, rows))[
            number % 3
        ]
        made[name] = values + (shift if number % 3 == 0 else 0.0)
    for number, name in enumerate(CATEGORIES):
        made[name] = random.choice([f"v{k}" for k in range(5 + 10 * number)], rows)
    return made


def write(path: Path, rows: int, *, seed: int, shift: float = 0.0) -> None:
    """Write a table block by block."""
    import pyarrow.parquet as pq

    random, writer = np.random.default_rng(seed), None
    for _ in range(0, rows, BLOCK):
        block = pl.DataFrame(columns(random, min(rows, BLOCK), shift)).to_arrow()
        writer = writer or pq.ParquetWriter(path, block.schema)
        writer.write_table(block)
    if writer:
        writer.close()


def write_wide(path: Path, rows: int, width: int) -> None:
    """Write a wide table of numbers with four digits; its blocks repeat, every value is encoded all the same."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    random, block = np.random.default_rng(0), 100_000
    table = pa.table(
        {f"x{k}": np.round(random.normal(k % 7, 1.0, block), 3).astype(np.float32) for k in range(width)}
    )
    with pq.ParquetWriter(path, table.schema) as writer:
        for _ in range(0, rows, block):
            writer.write_table(table)


def store_reference(folder: Path) -> None:
    """Profile the reference, as training does."""
    from airflow_mlops.core.profiles.profile import ColumnKinds, profile_scan
    from airflow_mlops.core.profiles.profile_format import profile_to_json

    kinds = ColumnKinds(numeric=NUMBERS, categorical=CATEGORIES)
    profile = profile_scan(lambda: pl.scan_parquet(folder / "reference.parquet"), kinds)
    (folder / "reference.json").write_text(profile_to_json(profile))


def ours(folder: Path, table: str) -> str:
    """Check a table against the stored reference profile."""
    from airflow_mlops.core.monitoring.detectors import ColumnRows
    from airflow_mlops.core.monitoring.drift import compare_profiles
    from airflow_mlops.core.profiles.profile import profile_scan_like
    from airflow_mlops.core.profiles.profile_format import profile_from_json

    reference = profile_from_json((folder / "reference.json").read_text())
    read: list[str] = []

    def read_rows(name: str) -> ColumnRows:
        read.append(name)
        sides = (
            pl.read_parquet(folder / f"{side}.parquet", columns=[name])[name] for side in ("reference", table)
        )
        return ColumnRows(*(side.to_numpy() for side in sides))

    current = profile_scan_like(
        lambda names: pl.scan_parquet(folder / f"{table}.parquet").select(names), reference.layout
    )
    report = compare_profiles(reference, current, read_rows=read_rows)
    return f"{report.drifted_count} of {report.feature_count} drifted, {len(read)} columns read exactly"


def evidently(folder: Path, table: str) -> str:
    """Check the same with Evidently."""
    import pandas as pd
    from evidently import DataDefinition, Dataset, Report
    from evidently.presets import DataDriftPreset

    definition = DataDefinition(numerical_columns=NUMBERS, categorical_columns=CATEGORIES)
    sides = [
        Dataset.from_pandas(pd.read_parquet(folder / f"{side}.parquet"), data_definition=definition)
        for side in (table, "reference")
    ]
    result = Report([DataDriftPreset()]).run(*sides).dict()
    counted = next(item for item in result["metrics"] if "DriftedColumnsCount" in item["config"]["type"])
    return f"{counted['value']['count']:.0f} of 18 drifted"


def both_sides(reference_path: Path, current_path: Path, numeric: list[str]) -> str:
    """Profile both sides and check."""
    from airflow_mlops.core.monitoring.drift import compare_profiles
    from airflow_mlops.core.profiles.profile import ColumnKinds, profile_scan

    kinds = ColumnKinds(numeric=numeric)
    reference = profile_scan(lambda: pl.scan_parquet(reference_path), kinds)
    current = profile_scan(lambda: pl.scan_parquet(current_path), kinds, like=reference.layout)
    report = compare_profiles(reference, current)
    return f"{report.drifted_count} of {report.feature_count} drifted"


def merge(folder: Path) -> str:
    """Merge 10,000 stored profiles."""
    from airflow_mlops.core.profiles.profile import merge_profiles, profile_frame
    from airflow_mlops.core.profiles.profile_format import (
        profile_from_bytes,
        profile_from_json,
        profile_to_bytes,
    )

    reference = profile_from_json((folder / "reference.json").read_text())
    rows = pl.read_parquet(folder / "reference.parquet", n_rows=5_000)
    made = profile_frame(rows, numeric=NUMBERS, categorical=CATEGORIES, like=reference)
    data = profile_to_bytes(made, key="")
    partitions = folder / "partitions"
    partitions.mkdir()
    for number in range(10_000):
        (partitions / str(number)).write_bytes(data)
    started, wall = time.process_time(), time.monotonic()
    profiles = (
        profile_from_bytes(path.read_bytes(), reference.layout, key="") for path in partitions.iterdir()
    )
    merged = merge_profiles(profile for profile in profiles if profile is not None)
    spent, waited = time.process_time() - started, time.monotonic() - wall
    return f"{merged.row_count} rows; reading and merging alone {spent:.2f} CPU s, {waited:.2f} s; {len(data)} bytes each"


def run_child(case: str, folder: Path) -> None:
    """Do one case and print what it cost."""
    if case.startswith("evidently"):
        found = evidently(folder, "current")
    elif case == "merge":
        found = merge(folder)
    elif case.endswith("-columns"):
        width = int(case.split("-", maxsplit=1)[0])
        found = both_sides(
            folder / "wide.parquet", folder / "wide-current.parquet", [f"x{k}" for k in range(width)]
        )
    else:
        found = ours(folder, "current")
    spent = resource.getrusage(resource.RUSAGE_SELF)
    peak = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")
    )
    print(f"{spent.ru_utime + spent.ru_stime:.2f} {int(peak.split()[1]) / 1e6:.3f} {found}")


def measure(case: str, folder: Path) -> float:
    """Run a case in a process of its own, print its line, and give its CPU seconds."""
    started = time.monotonic()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DO_NOT_TRACK": "1"}
    done = subprocess.run(
        [sys.executable, __file__, "--child", case, str(folder)],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    spent, peak, found = done.stdout.strip().splitlines()[-1].split(" ", maxsplit=2)
    print(f"{case:<16}{spent:>10} CPU s{peak:>9} GB{time.monotonic() - started:>9.1f} s  {found}", flush=True)
    return float(spent)


def main(cases: list[str]) -> None:
    """Make the tables and measure."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if {"1M", "5M", "20M", "merge"} & set(cases):
            write(folder / "reference.parquet", 1_000_000, seed=0)
            store_reference(folder)
        for case in cases:
            if case == "1M":
                write(folder / "current.parquet", 1_000_000, seed=1, shift=0.15)
                mine = statistics.median(measure("1M", folder) for _ in range(3))
                print(f"{'':<16}{measure('evidently-1M', folder) / mine:>10.0f} times as much", flush=True)
            elif case in {"5M", "20M"}:
                write(folder / "current.parquet", int(case[:-1]) * 1_000_000, seed=1, shift=0.15)
                measure(case, folder)
            elif case == "100-columns":
                write_wide(folder / "wide.parquet", 300_000, 100)
                write_wide(folder / "wide-current.parquet", 30_000, 100)
                measure(case, folder)
            elif case == "1000-columns":
                write_wide(folder / "wide.parquet", 3_000_000, 1_000)
                (folder / "wide-current.parquet").unlink(missing_ok=True)
                (folder / "wide-current.parquet").hardlink_to(folder / "wide.parquet")
                measure(case, folder)
            else:
                measure(case, folder)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        run_child(sys.argv[2], Path(sys.argv[3]))
    else:
        main(sys.argv[1:] or ["1M", "5M", "20M", "100-columns", "1000-columns", "merge"])
