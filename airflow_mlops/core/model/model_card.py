"""Model cards: what a model is, learned from what, how good, for whom not, and where it comes from; Markdown and HTML.

Source: Mitchell et al., "Model Cards for Model Reporting", FAT* 2019, section 4 (the parts of a card).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from airflow_mlops.core.comparison.resampling import describe_p
from airflow_mlops.core.page import Interval, Page, Section, Table, link_address, markdown, section_markdown

if TYPE_CHECKING:
    from airflow_mlops.core.model.package import PackageManifest

#: Most rows a table shows; all of them are in the run.
_ROWS = 60


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """A parameter of the training that was another one for the champion.

    :param name: the parameter.
    :param champion: its value then; ``None``: it had none.
    :param challenger: its value now.
    """

    name: str
    champion: str | None
    challenger: str | None


def describe_model(
    manifest: PackageManifest,
    *,
    model_name: str,
    run_id: str,
    package_digest: str,
    evaluation: Mapping[str, Any] | None = None,
    training: Mapping[str, str] | None = None,
    changes: Sequence[Change] = (),
    signed_by: str | None = None,
) -> Page:
    """Compose a card from what is known; what was not measured is said, not left out.

    :param manifest: of the package.
    :param model_name: registered model.
    :param run_id: MLflow run of the training.
    :param package_digest: names the package.
    :param evaluation: result of the evaluation, with all of ``evaluation.json`` where it wrote one; ``None``: there was
        none. Keys that are absent are said to be not measured.
    :param training: parameters of the training run.
    :param changes: what was done differently for the champion.
    :param signed_by: id of the key that signed it.
    """
    found = _Evaluation(evaluation or {})
    kind = "a number" if manifest.task == "regression" else f"one of {_listed(manifest.classes or ())}"
    fields = _listed(manifest.signature.names)
    return Page(
        title=model_name,
        lead=f"Predicts {manifest.target} ({kind}) from {fields}.",
        verdict=found.verdict,
        sections=tuple(
            section
            for section in (
                _quality(manifest, found),
                _limits(manifest, found),
                _slices(found),
                _changed(changes),
                _data(manifest),
                _method(manifest, training or {}),
                _lineage(manifest, run_id, package_digest, signed_by),
            )
            if not section.empty
        ),
    )


def describe_evaluation(evaluation: Mapping[str, Any]) -> Page:
    """Compose the page of an evaluation: the verdict and all it follows from.

    :param evaluation: its result.
    """
    found = _Evaluation(evaluation)
    sections = (_compared(found), _slices(found), Section(title="Limits", notes=tuple(_unmeasured(found))))
    return Page(
        title=f"{evaluation.get('model_name', 'Model')}: evaluation",
        lead=str(evaluation.get("reason", "")),
        verdict=found.verdict,
        sections=tuple(section for section in sections if not section.empty),
    )


def describe_request(
    *,
    model_name: str,
    model_version: str,
    evaluation: Mapping[str, Any],
    changes: Sequence[Change],
    links: Mapping[str, str],
    alias: str = "champion",
    taken_back: str | None = None,
) -> str:
    """Write what a person who approves a version wants to see, as Markdown.

    :param evaluation: as :func:`describe_model` takes it.
    :param changes: what was done differently for the champion.
    :param links: label to address.
    :param alias: that is to be moved to it.
    :param taken_back: who took the version back, when and why, which comes first; ``None``: nobody did.
    """
    found = _Evaluation(evaluation)
    pages = [
        f"[{markdown(label)}]({link_address(url)})"
        for label, url in links.items()
        if url.startswith(("http://", "https://"))
    ]
    parts = [
        *([f"**It was rolled back:** {markdown(taken_back)}\n"] if taken_back else []),
        f"Shall version {markdown(model_version)} of **{markdown(model_name)}** become {markdown(alias)}?\n",
        *(section_markdown(section) for section in (_compared(found), _slices(found)) if not section.empty),
        "\n".join(f"* {markdown(note)}" for note in _unmeasured(found)),
    ]
    changed = _changed(changes)
    if not changed.empty:
        parts.append(section_markdown(changed))
    if pages:
        parts.append(f"\n{' · '.join(pages)}\n")
    return "\n".join(parts)


class _Evaluation:
    """An evaluation's result as this and later releases write it, read without trusting its shape."""

    def __init__(self, result: Mapping[str, Any]) -> None:
        report = _mapping(result.get("report"))
        self.result = {**report, **result}
        self.there = bool(result)
        self.verdict = str(result["verdict"]) if result.get("verdict") else None
        measured = [_mapping(report.get("deciding")), *_mappings(report.get("others"))]
        self.metrics = [item for item in measured if item.get("metric")]
        self.not_measured = _mapping(report.get("not_measured"))
        self.checks = _mappings(self.result.get("checks"))
        slices = self.result.get("slices")
        # An older release wrote no number.
        self.slices_looked_at = slices is not None and bool(_mapping(slices).get("looked_at", True))
        self.slices = _mappings(_mapping(slices).get("worst"))
        self.slice_loss = str(_mapping(slices).get("loss") or "loss")
        groups = self.result.get("groups")
        self.groups = _mappings(groups if isinstance(groups, list | tuple) else [groups])


def _quality(manifest: PackageManifest, found: _Evaluation) -> Section:
    holdout = manifest.holdout
    unseen = f"rows it was not trained on{_between(holdout.window_start, holdout.window_end)}"
    if manifest.has_learned_from_holdout:
        unseen = f"rows{_between(holdout.window_start, holdout.window_end)}, by a twin that was not trained on them; this model was"
    new = (
        f"{holdout.metric} when it was new",
        f"{_number(holdout.value)} on {holdout.row_count} {unseen}",
    )
    compared = _compared(found)
    return replace(compared, facts=(new, *compared.facts))


def _compared(found: _Evaluation) -> Section:
    """Say what the evaluation concluded, from which numbers and checks."""
    facts: list[tuple[str, str]] = []
    if found.there:
        champion = found.result.get("champion_version")
        facts += [
            ("Verdict", _words(found.verdict or "none")),
            ("Reason", str(found.result.get("reason", ""))),
            ("Compared with", f"version {champion}" if champion else "a simple guess; there was no champion"),
        ]
        measured = _MEASURED.get(str(found.result.get("measured")))
        if measured:
            facts.append(("Measured", measured))
        if found.result.get("row_count"):
            facts.append(("Rows", f"{found.result['row_count']}, the same for all"))
    tables = []
    if found.checks:
        checked = tuple(
            (str(item.get("name", "")), _words(str(item.get("outcome", ""))), _told(item))
            for item in found.checks
        )
        tables.append(("Checks", Table(header=("Check", "Outcome", ""), rows=checked[:_ROWS])))
    if found.metrics:
        guesses = list(
            dict.fromkeys(name for item in found.metrics for name in _mapping(item.get("baselines")))
        )
        rows = [_metric_row(item, guesses) for item in found.metrics]
        rows += [
            (str(name), f"not measured: {why}", *("" for _ in range(5 + len(guesses))))
            for name, why in found.not_measured.items()
        ]
        confidence = found.result.get("confidence")
        with_interval = f" ({confidence:.0%} interval)" if isinstance(confidence, float) else ""
        header = ("Metric", "Better", f"This model{with_interval}", "Champion", *map(_heading, guesses))
        judged = (*header, "Improvement", "p", "Detectable")
        tables.append(("Measured on the same rows", Table(header=judged, rows=tuple(rows[:_ROWS]))))
    return Section(
        title="How good it is",
        facts=tuple(facts),
        notes=(_HOW_MEASURED,) if found.metrics else (),
        tables=tuple(tables),
        intervals=_drawn(found.metrics[0]) if found.metrics else (),
    )


#: What was measured, where it was not the model itself.
_MEASURED = {
    "twin": "its twin, made in the same way without these rows; the model has learned from them, and all numbers are the twin's",
    "predecessors": "older models, made in the same way; this one has learned from all rows there are, and was tested on none",
}

_HOW_MEASURED = (
    "Improvement is over the champion, or over the first guess where there is none; p is one-sided and paired; detectable is the "
    "improvement these rows show with 80 % power at the level asked for (5 % where none was). The first metric decides."
)


def _metric_row(item: Mapping[str, Any], guesses: Sequence[str]) -> tuple[str, ...]:
    baselines = _mapping(item.get("baselines"))
    rival = _rival(item)
    uplift = f"{_share(rival.get('uplift'))} {_range(rival.get('difference'))}".strip()
    return (
        str(item["metric"]),
        "higher" if item.get("greater_is_better") else "lower",
        _interval(item.get("challenger")),
        _interval(_mapping(item.get("champion")).get("value")),
        *(_interval(_mapping(baselines.get(name)).get("value")) for name in guesses),
        uplift,
        _p(rival.get("p_value")),
        _number(rival.get("minimum_detectable_difference")),
    )


def _rival(item: Mapping[str, Any]) -> Mapping[str, Any]:
    """Give what the challenger is judged against: the champion, else the first of the guesses."""
    return _mapping(item.get("champion")) or next(
        (_mapping(guess) for guess in _mapping(item.get("baselines")).values()), {}
    )


def _heading(name: str) -> str:
    return f"{name[:1].upper()}{name[1:]}"


def _changed(changes: Sequence[Change]) -> Section:
    rows = tuple((change.name, change.champion or "-", change.challenger or "-") for change in changes)
    table = Table(header=("Parameter", "Champion", "This model"), rows=rows[:_ROWS])
    return Section(title="What was done differently", tables=(("Since the champion", table),) if rows else ())


def _limits(manifest: PackageManifest, found: _Evaluation) -> Section:
    trained = manifest.trained_on
    notes = [
        f"Learned from {trained.rows} rows{_between(trained.window_start, trained.window_end)}: for rows unlike those, such as "
        "later ones after a change, nothing is promised. Watch drift and error.",
    ]
    strict = [field.name for field in manifest.signature.inputs if not field.nullable]
    if strict:
        notes.append(f"Takes no missing values in {_listed(strict)}.")
    if manifest.serving_form == "pickle":
        notes.append(
            "Stored as a pickle: loading it runs whatever code it names, with all rights of the process. Whoever can sign models "
            "can run code where it is accepted."
        )
    if manifest.task == "classification":
        notes.append("Answers only with labels it was trained on; a new kind of row gets one of them.")
    if not found.there:
        notes.append("It was registered without an evaluation: it was compared with no champion.")
    detectable = _rival(found.metrics[0]).get("minimum_detectable_difference") if found.metrics else None
    if _finite(detectable):
        notes.append(
            f"An improvement of {found.metrics[0]['metric']} by {_number(detectable)} would be found with these rows four times out of five; "
            "a smaller one less often."
        )
    notes += [
        f"{str(item.get('name', 'a check')).capitalize()}: not measured. {_told(item)}".rstrip()
        for item in found.checks
        if item.get("outcome") == "not_measured"
    ]
    return Section(title="Limits", notes=(*notes, *_unmeasured(found)))


def _unmeasured(found: _Evaluation) -> list[str]:
    notes = []
    if not found.slices_looked_at:
        notes.append("Whether it is worse for some kinds of rows than for others was not measured.")
    if not found.groups:
        notes.append("Whether it treats groups of people alike was not measured.")
    for group in found.groups:
        small = [_too_few(item) for item in _mappings(group.get("unmeasured"))]
        if small:
            notes.append(
                f"Not measured for groups of {group.get('column', 'people')}, as they are of too few rows: {', '.join(small)}."
            )
    return notes


def _too_few(group: Mapping[str, Any]) -> str:
    rate = f", {group['rate']}" if group.get("rate") else ""
    return f"{group.get('group', '')}{rate} ({_number(group.get('row_count'))} rows)"


def _slices(found: _Evaluation) -> Section:
    tables = []
    rows: tuple[tuple[str, ...], ...]
    if found.slices:
        rows = tuple(
            (
                _where(item.get("where")),
                _number(item.get("row_count")),
                _interval(item.get("challenger")),
                _interval(item.get("champion")),
                _share(item.get("regression")),
                _p(item.get("p_value")),
            )
            for item in found.slices
        )
        loss = found.slice_loss
        columns = ("Rows where", "Rows", loss.capitalize(), f"Champion's {loss}", "Worse by", "p (adjusted)")
        tables.append(
            ("Slices that changed for the worse the most", Table(header=columns, rows=rows[:_ROWS]))
        )
    for group in found.groups:
        members = _mappings(group.get("groups"))
        names = [name for name in dict.fromkeys(key for item in members for key in item) if name != "group"]
        rows = tuple(
            (str(item.get("group", "")), *(_number(item.get(name)) for name in names)) for item in members
        )
        header = (str(group.get("column", "Group")), *(_words(name) for name in names))
        if rows:
            tables.append((f"Groups of {header[0]}", Table(header=header, rows=rows[:_ROWS])))
    return Section(title="Slices and groups", tables=tuple(tables))


def _data(manifest: PackageManifest) -> Section:
    trained = manifest.trained_on
    inputs = tuple(
        (field.name, field.type, "yes" if field.nullable else "no") for field in manifest.signature.inputs
    )
    example = ", ".join(f"{name} = {value}" for name, value in manifest.known_rows[0].items())
    return Section(
        title="Data",
        facts=(
            ("Dataset", f"{trained.dataset_uri}, version {trained.dataset_version}"),
            ("Content digest", trained.dataset_digest),
            ("Rows", f"{trained.rows}{_between(trained.window_start, trained.window_end)}"),
            ("Target", manifest.target),
            ("A simple guess", f"{_number(trained.simple_prediction)}, whatever the row"),
            ("Example", f"{example} gives {_number(manifest.known_predictions[0])}"),
        ),
        tables=(("Inputs", Table(header=("Input", "Type", "May be missing"), rows=inputs[:_ROWS])),),
    )


def _method(manifest: PackageManifest, training: Mapping[str, str]) -> Section:
    parameters = tuple((name, value) for name, value in sorted(training.items()) if value not in ("", "None"))
    tables = (
        (("Training", Table(header=("Parameter", "Value"), rows=parameters[:_ROWS])),) if parameters else ()
    )
    return Section(
        title="Method",
        facts=(("Task", manifest.task), ("Served as", f"{manifest.serving_form}: {manifest.serving_reason}")),
        tables=tables,
    )


def _lineage(manifest: PackageManifest, run_id: str, package_digest: str, signed_by: str | None) -> Section:
    versions = ", ".join(f"{name} {version}" for name, version in sorted(manifest.environment.items()))
    files = tuple(sorted(manifest.files.items()))
    return Section(
        title="Where it comes from",
        facts=(
            ("MLflow run", run_id),
            ("Package", package_digest),
            ("Signed by", f"key {signed_by}" if signed_by else "nobody"),
            *((("Built with", versions),) if versions else ()),
        ),
        tables=(("Files", Table(header=("File", "SHA-256"), rows=files[:_ROWS])),),
    )


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _mappings(value: Any) -> list[Mapping[str, Any]]:
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list | tuple) else []


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _number(value: Any) -> str:
    """Write a number short, anything else as it is; what is not there as a dash."""
    if value is None:
        return "-"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:.4g}" if isinstance(value, float) else str(value)
    return str(value)


def _share(value: Any) -> str:
    return f"{value:+.1%}" if _finite(value) else "-"


def _p(value: Any) -> str:
    return describe_p(value).removeprefix("p ").removeprefix("= ") if _finite(value) else _number(value)


def _interval(value: Any) -> str:
    """Write ``2.53 (2.48 to 2.59)`` of a metric with an interval, or a plain number."""
    found = _mapping(value)
    if not found:
        return _number(value)
    told = _number(found.get("value"))
    if _finite(found.get("low")) and _finite(found.get("high")):
        told += f" ({_number(found['low'])} to {_number(found['high'])})"
    return told


def _range(value: Any) -> str:
    """Write ``(0.12 to 0.18)``."""
    found = _mapping(value)
    if not (_finite(found.get("low")) and _finite(found.get("high"))):
        return ""
    return f"({_number(found['low'])} to {_number(found['high'])})"


def _drawn(item: Mapping[str, Any]) -> tuple[Interval, ...]:
    given = [
        ("This model", _mapping(item.get("challenger"))),
        ("Champion", _mapping(_mapping(item.get("champion")).get("value"))),
        *(
            (_heading(str(name)), _mapping(_mapping(guess).get("value")))
            for name, guess in _mapping(item.get("baselines")).items()
        ),
    ]
    return tuple(
        Interval(label=label, value=found["value"], low=found["low"], high=found["high"])
        for label, found in given
        if all(_finite(found.get(name)) for name in ("value", "low", "high"))
    )


def _told(item: Mapping[str, Any]) -> str:
    return str(item.get("reason") or "")


def _where(value: Any) -> str:
    if isinstance(value, Mapping):
        return " and ".join(f"{column} {part}" for column, part in value.items())
    return _number(value)


def _between(start: Any, end: Any) -> str:
    return f", {start:%Y-%m-%d %H:%M} to {end:%Y-%m-%d %H:%M} UTC" if start and end else ""


def _words(name: str) -> str:
    return name.replace("_", " ")


def _listed(names: Iterable[str], most: int = 12) -> str:
    every = list(names)
    more = f" and {len(every) - most} more" if len(every) > most else ""
    return ", ".join(every[:most]) + more
