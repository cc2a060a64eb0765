"""Loading a model from its package, and predicting with it column by column."""

from __future__ import annotations

import io
import math
import os
import pickle
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from airflow_mlops.core.comparison.predictions import Predictions
from airflow_mlops.core.model.background import BACKGROUND_FILE, Background
from airflow_mlops.core.model.explanation import Table
from airflow_mlops.core.model.package import MAXIMUM_PACKAGE_BYTES, PackageManifest, is_plain_name
from airflow_mlops.exceptions import ArtifactIntegrityError
from airflow_mlops.integrations.onnx_file import asks_for_files
from airflow_mlops.serving.package import read_verified
from airflow_mlops.serving.requests import RequestDecoder

if TYPE_CHECKING:
    from airflow_mlops.core.model.explanation import Score
    from airflow_mlops.core.model.signing import Trust

#: Types a skops file may hold beside skops' own list of estimators, numbers and arrays. It is ours and fixed:
#: a list stored with the model could allow anything. All are plain parts of fitted estimators. skops
#: leaves tree nodes out because a crafted file could crash the process; ours are loaded only after their
#: digest was found to be the registered one.
ALLOWED_TYPES = (
    "airflow_mlops.integrations.feature_selector.FeatureSelector",  # so must the selector in it
    "airflow_mlops.integrations.label_codes.LabelCodedClassifier",  # the classifier in it must be on a list itself
    "functools.partial",  # binds arguments to a function that must be on a list itself
    "numpy.dtype",
    "scipy.interpolate._bsplines.BSpline",
    "sklearn._loss.loss.HalfTweedieLoss",
    "sklearn._loss.loss.HalfTweedieLossIdentity",
    "sklearn.calibration._CalibratedClassifier",
    "sklearn.calibration._SigmoidCalibration",
    "sklearn.ensemble._hist_gradient_boosting.predictor.TreePredictor",
    "sklearn.feature_selection._univariate_selection.f_classif",
    "sklearn.feature_selection._univariate_selection.f_regression",
    "sklearn.gaussian_process.kernels.ConstantKernel",
    "sklearn.gaussian_process.kernels.Product",
    "sklearn.gaussian_process.kernels.RBF",
    "sklearn.gaussian_process.kernels.Sum",
    "sklearn.gaussian_process.kernels.WhiteKernel",
    "sklearn.metrics._dist_metrics.EuclideanDistance64",
    "sklearn.metrics._scorer._PassthroughScorer",
    "sklearn.model_selection._split.KFold",
    "sklearn.model_selection._split.StratifiedKFold",
    "sklearn.neighbors._ball_tree.BallTree",
    "sklearn.neighbors._kd_tree.KDTree",
    "sklearn.neural_network._stochastic_optimizers.AdamOptimizer",
    "sklearn.neural_network._stochastic_optimizers.SGDOptimizer",
    "sklearn.tree._tree.Tree",
    "sklearn.utils._bunch.Bunch",
    "sklearn.utils.validation.check_array",
)

#: Variable that names further types, separated by commas: your own transformers, where tasks and service run.
TRUSTED_TYPES_VARIABLE = "AIRFLOW_MLOPS_TRUSTED_TYPES"

#: Variable that names the models, separated by commas, whose pickles this process may load. Only what was signed as one of them
#: by a key it trusts is.
PICKLED_MODELS_VARIABLE = "AIRFLOW_MLOPS_PICKLED_MODELS"

Columns = Mapping[str, Sequence[Any] | NDArray[Any]]
_Predictor = Callable[[Columns], NDArray[Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedModel:
    """A verified model, ready to predict; safe to use from several threads.

    :param manifest: what it is.
    :param predictor: columns in, one value per row out.
    :param probabilities: columns in, one probability per row and class out, in the order of the manifest's classes;
        ``None`` for a regression, and for a classifier that gives none.
    :param background: rows that "not knowing" is drawn from in an explanation; ``None``: the package has none.
    :ivar decoder: reads requests for it.
    """

    manifest: PackageManifest
    predictor: _Predictor
    probabilities: _Predictor | None = None
    background: Table | None = None
    decoder: RequestDecoder = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "decoder", RequestDecoder(self.manifest.signature))

    def predict_columns(self, columns: Columns) -> list[float] | list[str]:
        """Predict from columns.

        :param columns: one per input field, all of the same length: numbers as float (missing as NaN), text as
            ``str`` or ``None``.
        :returns: floats for a regression, labels as text for a classification.
        :raises ValueError: when the estimator itself refuses the values (such as NaN where it takes none).
        """
        output = self.predictor(columns)
        if self.manifest.task == "regression":
            numbers: list[float] = output.astype(np.float64).tolist()
            return numbers
        return [str(label) for label in output.tolist()]

    def predict_records(self, rows: Sequence[Mapping[str, Any]]) -> list[float] | list[str]:
        """Predict from records, after checking them against the signature.

        :raises SignatureMismatchError: naming the row and field that does not fit.
        """
        return self.predict_columns(self.manifest.signature.columns_from_records(rows))

    def answer(self, columns: Columns) -> Predictions:
        """Predict from columns, with the probabilities of the classes where the model gives them."""
        return Predictions(
            values=np.asarray(self.predict_columns(columns)),
            probabilities=self.probabilities(columns) if self.probabilities else None,
            classes=self.manifest.classes or (),
        )

    def score(self, label: str | None = None) -> Score:
        """Give the number that explanations are about.

        :param label: ``None`` for a regression, whose prediction it is. Of a classification the label whose probability it is;
            without probabilities it is 1 where the label is answered and 0 where another is.
        :raises ValueError: the model does not know the label, or answers with numbers.
        """
        classes, probabilities = self.manifest.classes or (), self.probabilities
        if label not in (classes or (None,)):
            raise ValueError(
                f"the model knows no label {label!r}; it knows {', '.join(classes) or 'numbers'}"
            )
        if label is None:
            return lambda table: np.asarray(self.predict_columns(table))
        if probabilities is None:
            return lambda table: (np.asarray(self.predict_columns(table)) == label).astype(float)
        place = classes.index(label)
        return lambda table: np.asarray(probabilities(table))[:, place]


def all_finite(answers: Sequence[Any]) -> bool:
    """Tell whether every answer is finite; labels are."""
    if answers and isinstance(answers[0], float):
        return all(map(math.isfinite, answers))
    return True


def allowed_types() -> set[str]:
    """Give the types a skops file may hold: ours, and those the people who run this process vouch for."""
    own = os.environ.get(TRUSTED_TYPES_VARIABLE, "").split(",")
    return {*ALLOWED_TYPES, *(name.strip() for name in own if name.strip())}


def pickled_models() -> set[str]:
    """Give the models whose pickles the people who run this process accept."""
    names = os.environ.get(PICKLED_MODELS_VARIABLE, "").split(",")
    return {name.strip() for name in names if name.strip()}


def load_model(
    folder: str | Path, expected_digest: str | None = None, *, trust: Trust | None = None
) -> ServedModel:
    """Verify a package, load its model and let it predict the known rows.

    :param folder: package folder.
    :param expected_digest: the registered package digest.
    :param trust: whose signature it must carry; ``None`` asks for none.
    :raises ArtifactIntegrityError: when a file differs, the signature is not the one wanted, the file holds what is not
        allowed, the known rows do not give the known predictions, or it is a pickle that this process was not told to load.
    """
    manifest, contents = read_verified(folder, expected_digest, trust=trust)
    background = _read_background(manifest, contents, Path(folder))
    signed_as = trust.model_name if trust else None
    return open_model(manifest, contents, Path(folder), signed_as=signed_as, background=background)


def open_model(
    manifest: PackageManifest,
    contents: Mapping[str, bytes],
    folder: Path,
    *,
    signed_as: str | None,
    background: Table | None = None,
) -> ServedModel:
    """Load a model from files that were verified, and let it predict the known rows.

    :param manifest: what it is; of the package, or of a second model in it.
    :param contents: the very bytes that were verified, by file name.
    :param folder: for messages.
    :param signed_as: the model as which a trusted key signed the package, which was verified; ``None``: nobody asked.
    :param background: rows that explanations are drawn against.
    :raises ArtifactIntegrityError: the file holds what is not allowed, the known rows do not give the known predictions, or
        it is a pickle that this process was not told to load.
    """
    path = folder / manifest.model_file
    data = contents[manifest.model_file]
    if manifest.serving_form == "onnx":
        predictor, probabilities = _load_onnx(data, manifest, path)
    elif manifest.serving_form == "sklearn":
        predictor, probabilities = _predictors(_load_skops(data, path), manifest)
    else:
        _require_pickle_accepted(path, signed_as)
        predictor, probabilities = _predictors(_load_pickle(data, path), manifest)
    model = ServedModel(
        manifest=manifest, predictor=predictor, probabilities=probabilities, background=background
    )
    try:
        answers = model.predict_records(manifest.known_rows)
    except Exception as err:
        raise ArtifactIntegrityError(f"{path} fails on the known rows of its package: {err}") from err
    mismatch = manifest.known_mismatch(answers)
    if mismatch:
        raise ArtifactIntegrityError(f"{path} does not predict as it did when packaged: {mismatch}")
    return model


def _read_background(manifest: PackageManifest, contents: Mapping[str, bytes], folder: Path) -> Table | None:
    if BACKGROUND_FILE not in contents:
        return None
    try:
        return Background.from_json(contents[BACKGROUND_FILE]).table(manifest.signature)
    except (ValueError, RecursionError) as err:
        raise ArtifactIntegrityError(
            f"{folder / BACKGROUND_FILE} holds no rows of this model: {err!s:.500}"
        ) from err


def _load_onnx(data: bytes, manifest: PackageManifest, path: Path) -> tuple[_Predictor, _Predictor | None]:
    import onnxruntime

    _require_whole_onnx(data, path)
    options = onnxruntime.SessionOptions()
    # One thread per prediction: requests run beside each other, and idle pool threads would spin.
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    try:
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as err:  # onnxruntime's errors have no common base but Exception
        raise ArtifactIntegrityError(f"{path} is not a model that onnxruntime can load: {err}") from err
    given = {item.name: item.type for item in session.get_inputs()}
    wanted = {
        field.name: "tensor(float)" if field.type == "number" else "tensor(string)"
        for field in manifest.signature.inputs
    }
    if given != wanted:
        raise ArtifactIntegrityError(f"{path} takes {given}, its signature says {wanted}")
    names = [item.name for item in session.get_outputs()]
    numbers = [field.name for field in manifest.signature.inputs if field.type == "number"]
    texts = [field.name for field in manifest.signature.inputs if field.type == "string"]

    def run(output: str, columns: Columns) -> NDArray[Any]:
        feed = _number_tensors(numbers, columns) | {name: _text_tensor(columns[name]) for name in texts}
        return np.asarray(session.run([output], feed)[0])

    def predict(columns: Columns) -> NDArray[Any]:
        return run(names[0], columns).reshape(-1)

    def probabilities(columns: Columns) -> NDArray[Any]:
        return run(names[1], columns)

    return predict, probabilities if _gives_probabilities(manifest) and len(names) > 1 else None


def _gives_probabilities(manifest: PackageManifest) -> bool:
    return manifest.task == "classification" and manifest.probabilities


def _require_whole_onnx(data: bytes, path: Path) -> None:
    """Refuse a model that would make the runtime open other files; old runtimes do, wherever they are."""
    try:
        elsewhere = asks_for_files(data)
    except ValueError as err:
        raise ArtifactIntegrityError(f"{path} is not an ONNX model: {err}") from err
    if elsewhere:
        raise ArtifactIntegrityError(
            f"{path} keeps tensors in other files (external data), which no digest covers; "
            "save the model in one file"
        )


def _number_tensors(names: Sequence[str], columns: Columns) -> dict[str, NDArray[Any]]:
    """Give the ONNX inputs that are numbers, each of shape ``[rows, 1]``: one conversion, and a view per input."""
    with np.errstate(over="ignore"):  # beyond float32 becomes infinite, as the model's converter has it
        block = np.array([columns[name] for name in names], dtype=np.float32)
    return dict(zip(names, block[:, :, np.newaxis], strict=True)) if names else {}


def _text_tensor(values: Sequence[Any] | NDArray[Any]) -> NDArray[Any]:
    """Give one ONNX input that is text, of shape ``[rows, 1]``; what is missing is empty, as in training."""
    return np.array(["" if value is None else value for value in values], dtype=object).reshape(-1, 1)


def _load_skops(data: bytes, path: Path) -> Any:
    from skops import io as skops_io
    from skops.io.exceptions import UntrustedTypesFoundException

    _require_sane_zip(data, path)
    try:
        return skops_io.loads(data, trusted=sorted(allowed_types()))
    except UntrustedTypesFoundException as err:
        raise ArtifactIntegrityError(
            f"{path} holds types that are not allowed: {err}; export the model as ONNX, or use an estimator "
            "of scikit-learn"
        ) from err
    except ImportError as err:
        raise _not_importable(path, err) from err
    except Exception as err:  # a crafted or foreign file fails anywhere inside skops
        raise ArtifactIntegrityError(f"{path} cannot be loaded by skops: {err!r:.300}") from err


def _require_pickle_accepted(path: Path, signed_as: str | None) -> None:
    """Refuse a pickle unless its signature was verified, and this process was told to load pickles of this model.

    A pickle is a program, and digests say only that it is the same one. What the package says about itself counts for nothing.
    """
    if signed_as is None:
        raise ArtifactIntegrityError(
            f"{path} is a pickle: loading it runs whatever code it names. It was not loaded, as no key was there to verify a "
            "signature with: configure the signing connection where it is registered, evaluated, scored with and served, or "
            "train without allow_pickle"
        )
    if signed_as not in pickled_models():
        raise ArtifactIntegrityError(
            f"{path} is a pickle: loading it runs whatever code it names. It was not loaded, as this process accepts no pickles "
            f"of {signed_as!r}: if you trust all who may sign models, name it in {PICKLED_MODELS_VARIABLE} where tasks and "
            "service run, or train without allow_pickle"
        )


def _load_pickle(data: bytes, path: Path) -> Any:
    """Unpickle; only after :func:`_require_pickle_accepted`."""
    try:
        return pickle.loads(data)  # noqa: S301 - signed by a trusted key, and this process was told to
    except ImportError as err:
        raise _not_importable(path, err) from err
    except Exception as err:  # a pickle can raise anything
        raise ArtifactIntegrityError(
            f"{path} cannot be unpickled: {err!r:.300}. The modules and versions it was trained with must be installed here"
        ) from err


def _not_importable(path: Path, err: ImportError) -> ArtifactIntegrityError:
    return ArtifactIntegrityError(
        f"{path} holds objects of a module that this process can't import: {err}. Install it, with the versions the model was trained "
        "with, wherever models are loaded: tasks, services and images. For a service that tasks start, the module's folder in the "
        "PYTHONPATH of these tasks does as well (the Dag folder is on the path of tasks alone); a service that runs already has to be "
        "stopped first (airflow-mlops stop-service)"
    )


def _predictors(estimator: Any, manifest: PackageManifest) -> tuple[_Predictor, _Predictor | None]:
    import pandas

    # scikit-learn looks into polars once anybody has begun to import it: whoever logs must not begin while somebody is answered.
    import polars  # noqa: F401

    inputs = manifest.signature.inputs

    def number(values: Sequence[Any] | NDArray[Any]) -> NDArray[Any]:
        # As in training, and as ONNX has them: 0.7 shall not lie on the other side of a split that was learned at its float32.
        with np.errstate(over="ignore"):
            return np.asarray(values, dtype=np.float32).astype(np.float64)

    def frame_of(columns: Columns) -> pandas.DataFrame:
        return pandas.DataFrame(
            {
                field.name: number(columns[field.name])
                if field.type == "number"
                else np.array(["" if value is None else value for value in columns[field.name]], dtype=object)
                for field in inputs
            }
        )

    def predict(columns: Columns) -> NDArray[Any]:
        return np.asarray(estimator.predict(frame_of(columns))).reshape(-1)

    def probabilities(columns: Columns) -> NDArray[Any]:
        return np.asarray(estimator.predict_proba(frame_of(columns)))

    given = _gives_probabilities(manifest) and hasattr(estimator, "predict_proba")
    return predict, probabilities if given else None


def _require_sane_zip(data: bytes, path: Path) -> None:
    """Refuse archives made to be read in two ways, or to fill the memory when they are unpacked."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as err:
        raise ArtifactIntegrityError(f"{path} is not a skops file; pickles are never loaded as one") from err
    unpacked = sum(member.file_size for member in members)
    names = [member.filename for member in members]
    if unpacked > MAXIMUM_PACKAGE_BYTES:
        raise ArtifactIntegrityError(
            f"{path} unpacks to {unpacked} bytes; at most {MAXIMUM_PACKAGE_BYTES} are read. It was not loaded"
        )
    if len(set(names)) != len(names):
        raise ArtifactIntegrityError(
            f"{path} holds two files of one name, so what is checked need not be what is read"
        )
    if any(not is_plain_name(name) for name in names):
        raise ArtifactIntegrityError(f"{path} holds files in folders; a skops file is flat")
