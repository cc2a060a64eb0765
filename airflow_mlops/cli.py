"""The command ``airflow-mlops``."""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from airflow_mlops.services import Services

#: More windows, entries or days than there are.
_MOST = 1_000_000_000


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, run the command and give its exit code."""
    args = _parser().parse_args(argv)
    commands = {
        "demo": _demo,
        "replay": _replay,
        "ledger": _ledger,
        "who-was-champion": _who_was_champion,
        "timeline": _timeline,
        "score": _score,
        "what-if": _what_if,
        "signing-key": _signing_key,
        "stop-service": _stop_service,
    }
    return commands[args.command](args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="airflow-mlops", description="The closed model loop on Apache Airflow."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="run the whole loop on this machine")
    demo.add_argument(
        "--data", type=Path, metavar="FILE", help="Parquet file of taxi trips (default: simulated)"
    )
    demo.add_argument("--exit", action="store_true", help="end when the story is told, instead of staying up")
    demo.add_argument(
        "--workspace",
        type=Path,
        default=Path(".demo"),
        metavar="DIR",
        help="folder for everything (default: .demo)",
    )
    demo.add_argument(
        "--windows", type=_count, metavar="N", help="months to live through (default: all there are)"
    )
    demo.add_argument("--seed", type=int, default=0, help="seed of the simulator (default: 0)")
    _add_replay(
        commands.add_parser("replay", help="live through a stream of the past with a retraining policy")
    )
    _add_ledger(
        commands.add_parser(
            "ledger", help="print the newest entries of the ledger, or bring its schema up to date"
        )
    )
    _add_timeline(
        commands.add_parser(
            "timeline", help="print what happened to a model window by window, or how all models stand"
        )
    )
    _add_score(
        commands.add_parser(
            "score", help="print the ML Test Score of a model, or write down that a person vouches for a test"
        )
    )
    _add_what_if(
        commands.add_parser(
            "what-if", help="print what another retraining policy would have decided; nothing is written"
        )
    )
    who = commands.add_parser(
        "who-was-champion", help="print which version of a model was champion at a time"
    )
    who.add_argument("model", metavar="MODEL", help="registered model")
    who.add_argument(
        "--at", type=_time, metavar="TIME", help="ISO 8601, UTC unless it says otherwise (default: now)"
    )
    who.add_argument("--alias", default="champion", help="another alias (default: champion)")
    who.add_argument("--ledger", metavar="URL", help="SQLAlchemy URL (default: $AIRFLOW_MLOPS_LEDGER_URL)")
    commands.add_parser("signing-key", help="make a key that model packages are signed with")
    stop = commands.add_parser("stop-service", help="end the model service that a task has started")
    stop.add_argument("folder", type=Path, metavar="DIR", help="serving folder")
    return parser


def _add_replay(replay: argparse.ArgumentParser) -> None:
    replay.add_argument(
        "streams", type=Path, nargs="+", metavar="STREAM.toml", help="what a stream is, and the model for it"
    )
    replay.add_argument(
        "--data", type=Path, metavar="DIR", help="folder of the data (default: that of each STREAM.toml)"
    )
    replay.add_argument(
        "--shuffle",
        type=int,
        metavar="SEED",
        help="deal the rows out at random: a stream in which nothing changes",
    )
    replay.add_argument(
        "--policy",
        action="append",
        metavar="NAME",
        help="challengers (the default), never, always, always_all, on_degradation, on_drift, gated, or import path module:function of yours; "
        "may be given several times",
    )
    replay.add_argument("--windows", type=_count, metavar="N", help="at most so many windows (default: all)")
    replay.add_argument(
        "--trial",
        type=_share,
        default=0.0,
        metavar="SHARE",
        help="a version promoted on held-out rows alone is rolled out in the shadow: for this share of the next window the version before "
        "it still answers, both are compared on the labels that come, and it is taken back if it is worse (default: 0, it serves at once)",
    )
    replay.add_argument(
        "--workspace",
        type=Path,
        default=Path(".replay"),
        metavar="DIR",
        help="folder for everything (default: .replay)",
    )


def _add_ledger(ledger: argparse.ArgumentParser) -> None:
    ledger.add_argument(
        "url",
        nargs="?",
        metavar="URL",
        help="SQLAlchemy URL, such as sqlite:////folder/ledger.db (default: $AIRFLOW_MLOPS_LEDGER_URL)",
    )
    ledger.add_argument("--model", metavar="NAME", help="only entries of this model")
    ledger.add_argument("--limit", type=_count, default=20, metavar="N", help="newest entries (default: 20)")
    ledger.add_argument(
        "--migrate", action="store_true", help="only create the schema or bring it up to date"
    )


def _add_timeline(timeline: argparse.ArgumentParser) -> None:
    timeline.add_argument(
        "model", nargs="?", metavar="MODEL", help="registered model (default: all, a line each)"
    )
    timeline.add_argument(
        "--since",
        type=_time,
        metavar="TIME",
        help="windows from then on (ISO 8601, UTC unless it says otherwise)",
    )
    timeline.add_argument("--until", type=_time, metavar="TIME", help="windows that begin before")
    timeline.add_argument(
        "--limit", type=_count, default=60, metavar="N", help="newest windows of the range (default: 60)"
    )
    timeline.add_argument("--json", action="store_true", help="all that is known, as JSON")
    timeline.add_argument(
        "--ledger", metavar="URL", help="SQLAlchemy URL (default: $AIRFLOW_MLOPS_LEDGER_URL)"
    )


def _add_what_if(what_if: argparse.ArgumentParser) -> None:
    what_if.add_argument("model", metavar="MODEL", help="registered model")
    what_if.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a parameter of the policy, such as budget=2 or challengers.minimum_gain=0.1; may be given several times",
    )
    what_if.add_argument(
        "--decide",
        default="airflow_mlops.core.decision.retraining:decide_retraining",
        metavar="MODULE:FUNCTION",
        help="a decision of yours (default: ours)",
    )
    what_if.add_argument("--json", action="store_true", help="every window, as JSON")
    what_if.add_argument(
        "--ledger", metavar="URL", help="SQLAlchemy URL (default: $AIRFLOW_MLOPS_LEDGER_URL)"
    )


def _add_score(score: argparse.ArgumentParser) -> None:
    score.add_argument("model", metavar="MODEL", help="registered model")
    form = score.add_mutually_exclusive_group()
    for name in ("json", "html", "markdown"):
        form.add_argument(
            f"--{name}",
            dest="form",
            action="store_const",
            const=name,
            help=f"as {name}, instead of plain text",
        )
    score.add_argument(
        "--attest", metavar="TEST", help="write down that --by vouches for a test, such as data-5"
    )
    score.add_argument("--by", metavar="NAME", help="who vouches for it")
    score.add_argument("--evidence", metavar="LINK", help="address of what can be looked at")
    score.add_argument(
        "--automated", action="store_true", help="a job does it again and again, and LINK leads to it"
    )
    score.add_argument("--days", type=_count, metavar="N", help="how long it counts (default: 365)")
    score.add_argument("--ledger", metavar="URL", help="SQLAlchemy URL (default: $AIRFLOW_MLOPS_LEDGER_URL)")


def _replay(args: argparse.Namespace) -> int:
    from airflow_mlops.replay.runner import run

    return run(
        args.streams,
        policies=args.policy or ["challengers"],
        workspace=args.workspace,
        data=args.data,
        shuffle=args.shuffle,
        windows=args.windows,
        trial=args.trial,
    )


def _demo(args: argparse.Namespace) -> int:
    from airflow_mlops.demo.runner import run

    return run(
        data=args.data,
        workspace=args.workspace,
        keep_up=not args.exit,
        seed=args.seed,
        windows=args.windows,
    )


def _ledger(args: argparse.Namespace) -> int:
    from airflow_mlops.exceptions import MLOpsError
    from airflow_mlops.ledger import Ledger
    from airflow_mlops.services import Services

    try:
        with Ledger.open(
            args.url or Services.from_environment().require("ledger_url"), create=args.migrate
        ) as ledger:
            if args.migrate:
                sys.stdout.write("The ledger's schema is up to date.\n")
                return 0
            for entry in reversed(ledger.entries(model_name=args.model, limit=args.limit)):
                sys.stdout.write(f"{entry.recorded_at:%Y-%m-%d %H:%M:%S}  {entry.kind:<20} {entry.summary}\n")
    except MLOpsError as err:
        sys.stderr.write(f"{err}\n")
        return 1
    return 0


def _stop_service(args: argparse.Namespace) -> int:
    from airflow_mlops.integrations.bentoml import LocalServer
    from airflow_mlops.serving.local import LocalEndpoint

    server = LocalServer(args.folder, port=0)
    if server.running() is None:
        sys.stderr.write(f"No service of {args.folder} runs on this machine.\n")
        return 1
    with LocalEndpoint(server).exclusive():  # not in the middle of a deployment
        running = server.running()
        server.stop()
    if running is not None:
        sys.stdout.write(f"The service at {running.url} has ended; the next deployment starts it again.\n")
    return 0


def _who_was_champion(args: argparse.Namespace) -> int:
    from airflow_mlops.exceptions import MLOpsError
    from airflow_mlops.ledger import Ledger
    from airflow_mlops.services import Services

    at = args.at or datetime.now(tz=UTC)
    try:
        with Ledger.open(
            args.ledger or Services.from_environment().require("ledger_url"), create=False
        ) as ledger:
            found = ledger.who_was_champion(args.model, at, alias=args.alias)
    except MLOpsError as err:
        sys.stderr.write(f"{err}\n")
        return 1
    if found is None:
        sys.stderr.write(f"{args.model} had no {args.alias} at {at:%Y-%m-%d %H:%M:%S %Z}.\n")
        return 1
    until = f"until {found.until:%Y-%m-%d %H:%M:%S}" if found.until else "to this day"
    sys.stdout.write(
        f"version {found.model_version}, from {found.since:%Y-%m-%d %H:%M:%S} {until} (UTC)\n"
        f"moved there by {found.actor}: {found.summary}\n"
    )
    return 0


def _timeline(args: argparse.Namespace) -> int:
    from airflow_mlops.core.codec import to_dict
    from airflow_mlops.exceptions import MLOpsError
    from airflow_mlops.ledger import Ledger
    from airflow_mlops.ledger.timeline import read_overview, read_timeline
    from airflow_mlops.ledger.timeline_table import overview_text, timeline_text
    from airflow_mlops.services import Services

    try:
        with Ledger.open(
            args.ledger or Services.from_environment().require("ledger_url"), create=False
        ) as ledger:
            if args.model is None:
                models = read_overview(ledger)
                shown = _json([to_dict(model) for model in models]) if args.json else overview_text(models)
            else:
                found = read_timeline(
                    ledger, args.model, since=args.since, until=args.until, limit=args.limit
                )
                shown = _json(to_dict(found)) if args.json else timeline_text(found)
    except MLOpsError as err:
        sys.stderr.write(f"{err}\n")
        return 1
    sys.stdout.write(shown)
    return 0


def _what_if(args: argparse.Namespace) -> int:
    from airflow_mlops.core.codec import to_dict
    from airflow_mlops.exceptions import MLOpsError
    from airflow_mlops.ledger import Ledger
    from airflow_mlops.replay.what_if import policy_of, what_if, what_if_text
    from airflow_mlops.services import Services

    try:
        policy = policy_of(args.set)
        with Ledger.open(
            args.ledger or Services.from_environment().require("ledger_url"), create=False
        ) as ledger:
            found = what_if(ledger, args.model, policy, decide=args.decide)
    except (MLOpsError, ValueError) as err:
        sys.stderr.write(f"{err}\n")
        return 1
    sys.stdout.write(_json(to_dict(found)) if args.json else what_if_text(found))
    return 0


def _score(args: argparse.Namespace) -> int:
    from airflow_mlops.exceptions import MLOpsError
    from airflow_mlops.services import Services

    services = Services.from_environment()
    services = replace(services, ledger_url=args.ledger or services.ledger_url)
    try:
        shown = _attest(args, services) if args.attest else _scored(args, services)
    except (MLOpsError, ValueError) as err:
        sys.stderr.write(f"{err}\n")
        return 1
    sys.stdout.write(shown)
    return 0


def _scored(args: argparse.Namespace, services: Services) -> str:
    from airflow_mlops.core.codec import to_dict
    from airflow_mlops.core.ml_test.score_page import describe_score, score_text
    from airflow_mlops.steps.ml_test_score import score_model

    if args.by or args.evidence or args.automated or args.days:
        raise ValueError("--by, --evidence, --automated and --days belong to --attest: name the test")
    score = score_model(args.model, services, now=datetime.now(tz=UTC))
    if args.form == "json":
        return _json(to_dict(score))
    if args.form == "html":
        return describe_score(score).to_html()
    return describe_score(score).to_markdown() if args.form == "markdown" else score_text(score)


def _attest(args: argparse.Namespace, services: Services) -> str:
    from airflow_mlops.steps.ml_test_score import attest

    if args.form:
        raise ValueError(f"--{args.form} prints a score, --attest writes to the ledger: one at a time")
    entry = attest(
        args.model,
        services,
        test_id=args.attest,
        by=args.by or "",
        evidence=args.evidence or "",
        automated=args.automated,
        days=args.days,
        now=datetime.now(tz=UTC),
    )
    return f"{entry.summary}; it counts until {entry.payload['expires_at'][:10]}\n"


def _json(value: object) -> str:
    return f"{json.dumps(value, indent=2)}\n"


def _time(text: str) -> datetime:
    """Read a time; without an offset it is UTC.

    :raises argparse.ArgumentTypeError: it is none.
    """
    try:
        at = datetime.fromisoformat(text)
    except ValueError as err:
        raise argparse.ArgumentTypeError(f"{text!r} is no time such as 2026-03-01T12:00:00") from err
    return at.astimezone(UTC) if at.tzinfo else at.replace(tzinfo=UTC)


def _signing_key(args: argparse.Namespace) -> int:
    from airflow_mlops.core.model.signing import SigningKey, key_id_of

    key = SigningKey.generate()
    sys.stdout.write(
        f"private key (Password of the signing connection): {key.to_text()}\n"
        f"public key (Extra public_keys, where packages are only verified): {key.public_text()}\n"
        f"key id: {key_id_of(key.public_key)}\n"
    )
    return 0


def _count(text: str) -> int:
    """Read a whole number from 1, that a database takes.

    :raises argparse.ArgumentTypeError: it is none.
    """
    if not text.isdecimal() or not 1 <= int(text) <= _MOST:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 to {_MOST:,}")
    return int(text)


def _share(text: str) -> float:
    """Read a share from 0 to below 1.

    :raises argparse.ArgumentTypeError: it is none.
    """
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0.0 <= share < 1.0:
        raise argparse.ArgumentTypeError(f"{text!r} is no share from 0 to below 1")
    return share


if __name__ == "__main__":
    sys.exit(main())
