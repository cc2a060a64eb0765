"""The command ``airflow-mlops``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and run the command."""
    args = _parser().parse_args(argv)
    if args.command == "demo":
        from airflow_mlops.demo.runner import run

        return run(data=args.data, workspace=args.workspace, keep_up=not args.exit, seed=args.seed)
    return _ledger(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="airflow-mlops", description="The closed model loop on Apache Airflow."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="run the whole loop on this machine")
    demo.add_argument("--data", type=Path, help="Parquet file of taxi trips (default: simulated)")
    demo.add_argument("--exit", action="store_true", help="end when the story is told, instead of staying up")
    demo.add_argument(
        "--workspace", type=Path, default=Path(".demo"), help="folder for everything (default: .demo)"
    )
    demo.add_argument("--seed", type=int, default=0, help="seed of the simulator")
    ledger = commands.add_parser("ledger", help="read the ledger")
    ledger.add_argument("url", help="SQLAlchemy URL, such as sqlite:////folder/ledger.db")
    ledger.add_argument("--model", help="only entries of this model")
    ledger.add_argument("--limit", type=int, default=20, help="newest entries to show (default: 20)")
    return parser


def _ledger(args: argparse.Namespace) -> int:
    from airflow_mlops.exceptions import MLOpsError
    from airflow_mlops.ledger import Ledger

    try:
        with Ledger.open(args.url) as ledger:
            for entry in reversed(ledger.entries(model_name=args.model, limit=args.limit)):
                sys.stdout.write(f"{entry.recorded_at:%Y-%m-%d %H:%M:%S}  {entry.kind:<20} {entry.summary}\n")
    except MLOpsError as err:
        sys.stderr.write(f"{err}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
