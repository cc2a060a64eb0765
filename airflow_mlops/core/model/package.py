"""Model packages: the manifest that says what a model is, where it comes from, and which bytes belong to it."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal

from airflow_mlops.core.codec import canonical_json, from_dict, to_dict
from airflow_mlops.core.model.signature import ModelSignature
from airflow_mlops.core.model.signing import SIGNATURE_FILE
from airflow_mlops.core.windows import Window

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Name of the manifest inside a package folder; beside the signature the one file that ``files`` does not list.
MANIFEST_FILE = "package.json"

#: A manifest holds a few rows and names; one that is larger is no manifest.
MAXIMUM_MANIFEST_BYTES = 4 * 1024**2
#: Files of a package together, as stored and as unpacked: a model that is loaded must fit into memory several times.
MAXIMUM_PACKAGE_BYTES = 2 * 1024**3

#: How far a prediction may be from the known one. Wide enough for float32 against float64 (measured: at most
#: 2e-5 over the estimators that convert), far too narrow for another model.
KNOWN_RELATIVE_TOLERANCE = 1e-4
#: For predictions around zero, which are sums of larger numbers: a share of the largest of the known ones.
KNOWN_SHARE_TOLERANCE = 1e-6

Task = Literal["regression", "classification"]
#: Forms that are data; a pickle is a program.
SafeForm = Literal["onnx", "sklearn"]
ServingForm = SafeForm | Literal["pickle"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedOn:
    """The rows a model was trained on.

    :param dataset_digest: content digest of the dataset version.
    :param dataset_uri: table URI.
    :param dataset_version: Delta version number.
    :param time_column: column that places a row in the window; ``None`` when the table has no time.
    :param window_start: first instant of the training window; ``None`` when the table has no time.
    :param window_end: first instant after it.
    :param rows: training rows.
    :param recipe: name of the way it was made, under which models of different age are compared.
    :param method_digest: of all that was asked for besides the rows, and of the code: of one recipe are only models that have the
        same; ``None``: an older release made it.
    :param simple_prediction: what a model that knows nothing would always answer: of the training rows the median, the mean or
        a quantile, as the training's metric wants it, or the most frequent label. Every challenger has to beat it.
    :param constants: what it would answer by other metrics: median, mean and quantiles of the training rows' target; empty for labels.
    :param class_shares: share of each label among the training rows; empty for a regression.
    """

    dataset_digest: str
    dataset_uri: str
    dataset_version: int
    time_column: str | None = None
    window_start: datetime | None = None
    window_end: datetime | None = None
    rows: int
    simple_prediction: float | str
    constants: tuple[float, ...] = ()
    class_shares: dict[str, float] = field(default_factory=dict)
    recipe: str | None = None
    method_digest: str | None = None

    @property
    def window(self) -> Window | None:
        """The training window; ``None`` when the table has no time."""
        if self.time_column is None or self.window_start is None or self.window_end is None:
            return None
        return Window(start=self.window_start, end=self.window_end)


@dataclass(frozen=True, kw_only=True, slots=True)
class Holdout:
    """What the model scored on rows it was not trained on, when it was new; one that was fitted again on all rows: its twin.

    :param metric: name, such as ``mae``.
    :param value: the metric.
    :param standard_deviation: of the per-row losses; with ``row_count`` it gives the metric's uncertainty.
    :param row_count: rows scored.
    :param window_start: first instant of the holdout window; ``None`` when the rows were drawn at random.
    :param window_end: first instant after it.
    """

    metric: str
    value: float
    standard_deviation: float | None = None
    row_count: int
    window_start: datetime | None = None
    window_end: datetime | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class PackageManifest:
    """What a package folder holds; its digest names the package.

    :param task: what the output is.
    :param signature: fields in and out.
    :param serving_form: ``onnx`` (served by onnxruntime), ``sklearn`` (a skops file) or ``pickle``, which a process loads only when
        it was told to for this very model: what stands here is a claim, and opens nothing.
    :param serving_reason: why this form, in one sentence.
    :param model_file: the model's file name; one of ``files``.
    :param files: every file but the manifest, name to hex SHA-256.
    :param target: name of the target column.
    :param classes: labels as text, in the model's order; ``None`` for a regression.
    :param probabilities: whether the model gives a probability per class; a second output of one that does not is a
        distance or a margin, and nothing reads it.
    :param known_rows: input rows whose predictions are known; at least one.
    :param known_predictions: what the model must answer for them.
    :param trained_on: the training rows.
    :param holdout: the score of the model when it was new.
    :param environment: versions it was built with (``python``, ``scikit-learn``, ...).
    :param format: version of this layout.
    :raises ValueError: when the parts contradict each other, or a file name leaves the folder.
    """

    task: Task
    signature: ModelSignature
    serving_form: ServingForm
    serving_reason: str
    model_file: str
    files: dict[str, str]
    target: str
    classes: tuple[str, ...] | None = None
    probabilities: bool = True
    known_rows: tuple[dict[str, Any], ...]
    known_predictions: tuple[float | str, ...]
    trained_on: TrainedOn
    holdout: Holdout
    environment: dict[str, str] = field(default_factory=dict)
    format: Literal[1] = 1

    def __post_init__(self) -> None:
        for name in self.files:
            if not is_plain_name(name) or name in {MANIFEST_FILE, SIGNATURE_FILE}:
                raise ValueError(f"files: {name!r} is not the name of a file inside the package")
        if self.model_file not in self.files:
            raise ValueError(f"model_file {self.model_file!r} is not listed in files")
        if not self.known_rows or len(self.known_rows) != len(self.known_predictions):
            raise ValueError(
                f"{len(self.known_rows)} known rows and {len(self.known_predictions)} known predictions: "
                "a package needs the same number of both, at least one"
            )
        if (self.task == "classification") != bool(self.classes):
            raise ValueError(f"task {self.task!r} does not fit classes {self.classes!r}")

    @property
    def has_learned_from_holdout(self) -> bool:
        """Whether it was fitted again on all rows, so that ``holdout`` is the score of its twin."""
        trained, held_out = self.trained_on.window, self.holdout.window_start
        return trained is not None and held_out is not None and held_out < trained.end

    def to_bytes(self) -> bytes:
        """Give the bytes of ``package.json``: canonical, so equal manifests have equal digests."""
        return canonical_json(to_dict(self)).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> PackageManifest:
        """Inverse of :meth:`to_bytes`.

        :raises ValueError: when it is no JSON, or naming each field that does not fit.
        """
        return from_dict(cls, json.loads(data))

    def known_mismatch(self, predictions: Sequence[float | str]) -> str | None:
        """Compare the predictions for the known rows with the known ones.

        :param predictions: what the loaded model answered, in order.
        :returns: what differs, or ``None`` when the model is the one that was packaged.
        """
        if len(predictions) != len(self.known_predictions):
            return f"{len(predictions)} predictions for {len(self.known_predictions)} known rows"
        numbers = [abs(known) for known in self.known_predictions if not isinstance(known, str)]
        near_zero = KNOWN_SHARE_TOLERANCE * max([1.0, *numbers])
        for index, (given, known) in enumerate(zip(predictions, self.known_predictions, strict=True)):
            if not _same(given, known, near_zero):
                return f"known row {index} gives {given!r}, expected {known!r}"
        return None


def _same(given: float | str, known: float | str, near_zero: float) -> bool:
    if isinstance(given, str) or isinstance(known, str):
        return given == known
    return math.isclose(
        given, known, rel_tol=KNOWN_RELATIVE_TOLERANCE, abs_tol=near_zero
    )  # NaN is close to nothing, so a model that answers NaN never passes


def file_digest(data: bytes) -> str:
    """Give the hex SHA-256 of a file's bytes, as ``files`` holds it.

    >>> file_digest(b"")[:16]
    'e3b0c44298fc1c14'
    """
    return hashlib.sha256(data).hexdigest()


def package_digest(manifest_bytes: bytes) -> str:
    """Give the digest that names a package: it covers the manifest, and through it every file.

    >>> package_digest(b"")[:23]
    'sha256:e3b0c44298fc1c14'
    """
    return f"sha256:{file_digest(manifest_bytes)}"


def is_plain_name(name: str) -> bool:
    """Tell whether a name is safe as one path component: no separator, no ``..``, not hidden.

    >>> [is_plain_name(name) for name in ("model.onnx", "../model.onnx", ".hidden", "")]
    [True, False, False, False]
    """
    return bool(name) and not name.startswith(".") and not any(sign in name for sign in "/\\\0")
