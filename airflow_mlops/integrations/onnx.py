"""ONNX: convert a fitted pipeline and prove on real rows that it gives the same answers."""

from __future__ import annotations

import itertools
import tempfile
import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from airflow_mlops.core.model.parity import Parity, ParityLimits, compare_forms
from airflow_mlops.integrations.sklearn import (
    final_estimator,
    gives_probabilities,
    is_classification,
    predict,
    stages,
)

if TYPE_CHECKING:
    import pandas as pd

    from airflow_mlops.core.model.signature import FieldSpec, ModelSignature

Quantization = Literal["float16", "int8"]

#: Highest standard opset and ML opset that skl2onnx 1.20 and onnxruntime 1.22+ both know.
TARGET_OPSET = {"": 18, "ai.onnx.ml": 3}

#: Locale in which a served model makes letters small, and words of two letters or more as scikit-learn has them.
_LOCALE, _WORD = "C.UTF-8", r"[\p{L}\p{N}_][\p{L}\p{N}_]+"

#: What computes with 16-bit floats: products with learned weights, and what stands between them. Weights lie nowhere else.
_HALF_OPERATORS = frozenset({"MatMul", "Gemm", "Add", "Relu", "Tanh"})

#: Kinds of odd values that are made of every input.
_ODD_VALUES = 3

#: Predictions at most to find out which made rows a pipeline refuses.
_TRIES = 500


def convert(pipeline: Any, signature: ModelSignature) -> bytes:
    """Convert to ONNX with one input per field, of its very name.

    :raises Exception: whatever the converter raises; the caller serves the scikit-learn form and says why.
    """
    from skl2onnx import convert_sklearn
    from skl2onnx.common.data_types import FloatTensorType, StringTensorType

    from airflow_mlops.integrations.label_codes import LabelCodedClassifier

    last = final_estimator(pipeline)[1]
    if isinstance(last, LabelCodedClassifier):
        raise ValueError(
            f"{type(last.estimator).__name__} learned codes of the labels, and has no converter that gives the labels"
        )
    inputs = [
        (field.name, (FloatTensorType if field.type == "number" else StringTensorType)([None, 1]))
        for field in signature.inputs
    ]
    converters, shapes = _own_converters()
    options: dict[int, dict[str, Any]] = _text_options(pipeline)
    if gives_probabilities(pipeline):
        options[id(pipeline)] = {"zipmap": False}
    elif is_classification(pipeline):
        # Only the labels are read, and LinearSVC does not know the option; naming it keeps skl2onnx from setting it.
        options[id(last)] = {}
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # the converter reads attributes that scikit-learn will drop
        model = convert_sklearn(
            pipeline,
            name="model",  # the default is a random one, and equal models should have equal bytes
            initial_types=inputs,
            target_opset=TARGET_OPSET,
            custom_conversion_functions=converters,
            custom_shape_calculators=shapes,
            options=options or None,
        )
    _name_inputs(model.graph, signature.names)
    serialized: bytes = model.SerializeToString()
    return serialized


def _name_inputs(graph: Any, names: Sequence[str]) -> None:
    """Give the inputs their fields' names: skl2onnx changes what is no identifier, and what it calls a value of its own."""
    wanted = {value.name: name for value, name in zip(graph.input, names, strict=True)}
    used = set(_value_names(graph))
    for taken in sorted((used & {*names}) - {*wanted}):
        wanted[taken] = next(
            free for i in itertools.count() if (free := f"{taken}_{i}") not in used | {*names}
        )
    _rename(graph, wanted)


def _value_names(graph: Any) -> Iterator[str]:
    """Give the name of every value, also in graphs within."""
    yield from (value.name for value in (*graph.input, *graph.output, *graph.initializer, *graph.value_info))
    for node in graph.node:
        yield from (*node.input, *node.output)
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _value_names(inner)


def _rename(graph: Any, names: Mapping[str, str]) -> None:
    """Rename values, also in graphs within, which see those of the graph around them."""
    for value in (*graph.input, *graph.output, *graph.initializer, *graph.value_info):
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                _rename(inner, names)


def _text_options(pipeline: Any) -> dict[int, dict[str, Any]]:
    """Say for each vectorizer what skl2onnx would choose otherwise: words of ASCII letters, in a locale that few containers have."""
    from sklearn.feature_extraction.text import CountVectorizer

    usual = CountVectorizer().token_pattern
    return {
        id(one): {"locale": _LOCALE, **({"tokenexp": _WORD} if one.token_pattern == usual else {})}
        for one in stages(pipeline)
        if isinstance(one, CountVectorizer)  # which those with TF-IDF weights are, too
    }


def has_converter(estimator: Any) -> bool:
    """Tell whether skl2onnx knows this very class, or the estimator brings its own conversion."""
    from skl2onnx._supported_operators import sklearn_operator_name_map

    from airflow_mlops.integrations.feature_selector import FeatureSelector

    return type(estimator) in {*sklearn_operator_name_map, FeatureSelector} or hasattr(
        estimator, "onnx_converter"
    )


def quantize(model: bytes, how: Quantization) -> bytes:
    """Make the model smaller: 16-bit floats, or 8-bit integers in matrix products.

    Preprocessing keeps its 32 bits: texts and categories have no others, and scaling would lose what it is for. Trees stay as they are in both; the parity gate judges the result like any other form.
    """
    import onnx

    parsed = onnx.load_from_string(model)
    if how == "float16":
        from onnxruntime.transformers.float16 import convert_float_to_float16

        exact = {node.op_type for node in parsed.graph.node} - _HALF_OPERATORS
        smaller = convert_float_to_float16(parsed, keep_io_types=True, op_block_list=sorted(exact))
        _drop_repeated(smaller.graph)
    else:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            quantize_dynamic(parsed, path, weight_type=QuantType.QInt8)
            smaller = onnx.load(path)
    serialized: bytes = smaller.SerializeToString()
    return serialized


def _drop_repeated(graph: Any) -> None:
    """Keep one node of those that make the same value: the converter adds the same cast for everyone who reads it."""
    first = {output: place for place, node in reversed([*enumerate(graph.node)]) for output in node.output}
    for place, node in reversed([*enumerate(graph.node)]):
        if first[node.output[0]] != place:
            del graph.node[place]


def check_parity(
    model: bytes,
    pipeline: Any,
    features: pd.DataFrame,
    signature: ModelSignature,
    limits: ParityLimits,
    *,
    real_rows: int | None = None,
) -> Parity:
    """Compare the ONNX form with the scikit-learn form on the same rows.

    :param model: the ONNX form.
    :param pipeline: the fitted form.
    :param features: rows to compare on, see :func:`hard_rows`.
    :param limits: how far apart they may be.
    :param real_rows: the first so many rows are real ones; ``None``: all are.
    :raises Exception: whatever onnxruntime raises on a model it can't run.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    feeds = {
        field.name: features[field.name]
        .to_numpy(dtype=np.float32 if field.type == "number" else object)
        .reshape(-1, 1)
        for field in signature.inputs
    }
    outputs = session.run(None, feeds)
    expected = predict(pipeline, features)
    probabilities = expected.probabilities
    return compare_forms(
        expected=np.asarray(expected.values).reshape(-1),
        got=np.asarray(outputs[0]).reshape(-1),
        expected_probabilities=probabilities,
        got_probabilities=np.asarray(outputs[1]) if probabilities is not None else None,
        limits=limits,
        real_rows=real_rows,
    )


def hard_rows(
    pipeline: Any,
    features: pd.DataFrame,
    signature: ModelSignature,
    *,
    rows: int = 8000,
    cells: int = 20_000_000,
    seed: int = 0,
) -> tuple[pd.DataFrame, int]:
    """Give real rows, and rows made of them that converters get wrong: missing values, unseen words, extremes.

    Real rows and made rows are ``rows`` at most each, and hold ``cells`` at most each: 160 MB of numbers by default, which fewer
    rows than 8,000 fill from 2,500 inputs on.

    :param pipeline: the fitted form; made rows that it refuses itself are left out, and some beside them where it refuses here
        and there among many.
    :param features: real rows.
    :param rows: real rows to take at most, drawn without replacement, and rows to make at most.
    :param cells: the same in cells, one per row and input.
    :returns: the real rows first; then, per input, up to 20 of them with that input missing, and up to 20 with it unseen
        (text; also in large letters with one that ASCII does not have) or far outside (numbers: ten times their range
        below the smallest and above the largest), fewer where there are so many inputs that these would be too many. Where
        there are more inputs than a row each could be made for, neighbours share one, in which all of them are odd; and how
        many are real.
    """
    import pandas as pd

    inputs = len(signature.inputs)
    limit = min(rows, max(_ODD_VALUES, cells // max(1, inputs)))
    real = features if len(features) <= limit else features.sample(limit, random_state=seed)
    groups = min(inputs, max(1, limit // _ODD_VALUES))
    some = real.head(max(1, min(20, limit // (_ODD_VALUES * max(1, groups)))))
    # Column by column: tables with one odd column each take time and memory that grow with the square of the columns, or worse.
    columns = {}
    for place, field in enumerate(signature.inputs):
        plain = some[field.name].to_numpy(dtype=float if field.type == "number" else object)
        values = np.tile(plain, _ODD_VALUES * groups).reshape(-1, len(some))
        first = _ODD_VALUES * (place * groups // inputs)
        for number, odd in enumerate(_odd_values(real[field.name], some, field), start=first):
            values[number] = odd
        columns[field.name] = values.reshape(-1)
    made = _taken(pipeline, pd.DataFrame(columns), alike=len(some))
    return pd.concat([real, made], ignore_index=True), len(real)


def _taken(pipeline: Any, made: pd.DataFrame, *, alike: int) -> pd.DataFrame:
    """Leave out the made rows that the pipeline refuses: one kind of odd values after the other, halved until it takes a part.

    After ``_TRIES`` what was not taken so far is left out; without an end they would grow with the inputs, and so would each.

    :param alike: so many rows in a row are odd in the same way, and are taken or refused together.
    """
    if _takes(pipeline, made):
        return made
    places = np.arange(len(made)).reshape(-1, alike)
    waiting, kept = deque(places[kind::_ODD_VALUES] for kind in range(_ODD_VALUES)), []
    for _ in range(_TRIES):
        if not waiting:
            break
        part = waiting.popleft()
        if _takes(pipeline, made.iloc[part.reshape(-1)]):
            kept.append(part)
        elif len(part) > 1:
            waiting.extend(np.array_split(part, 2))
    return made.iloc[np.sort(np.concatenate([places[:0], *kept]).reshape(-1))]


def _odd_values(values: pd.Series[Any], some: pd.DataFrame, field: FieldSpec) -> list[Any]:
    """Give what converters get wrong: as many values, or columns of them, as ``_ODD_VALUES``."""
    if field.type == "number":
        far = 10.0 * ((values.max() - values.min()) or 1.0)
        return [np.nan, values.min() - far, values.max() + far]
    return ["", "never seen before", some[field.name].str.upper() + "É"]


def _takes(pipeline: Any, rows: pd.DataFrame) -> bool:
    try:
        pipeline.predict(rows)
    except Exception:  # noqa: BLE001 - a user's own transformer raises anything
        return False
    return True


def _own_converters() -> tuple[dict[type, Any], dict[type, Any]]:
    """Give the converters that skl2onnx does not have, or has with an error."""
    from skl2onnx.common._registration import get_shape_calculator

    from airflow_mlops.integrations.feature_selector import FeatureSelector

    converters, shapes = _integer_attribute_converters()
    # Not the converter: it takes a selection of the first feature alone for an empty one.
    return (
        {**converters, FeatureSelector: _convert_selector},
        {**shapes, FeatureSelector: get_shape_calculator("SklearnSelectFromModel")},
    )


def _convert_selector(scope: Any, operator: Any, container: Any) -> None:
    import onnx

    places = operator.raw_operator.get_support(indices=True)
    if len(places) == 0:
        raise ValueError("no feature was selected")
    name = scope.get_unique_variable_name("selected")
    container.add_initializer(name, onnx.TensorProto.INT64, [len(places)], places)
    container.add_node(
        "ArrayFeatureExtractor",
        [operator.inputs[0].full_name, name],
        operator.outputs[0].full_name,
        op_domain="ai.onnx.ml",
        name=scope.get_unique_operator_name("selected"),
    )


def _integer_attribute_converters() -> tuple[dict[type, Any], dict[type, Any]]:
    """Wrap the converters of histogram gradient boosting so that their boolean attributes arrive as integers.

    skl2onnx 1.20 hands ``nodes_missing_value_tracks_true`` over as booleans, which protobuf refuses.
    The parity check stays in front of whatever comes out.
    """
    from skl2onnx._supported_operators import sklearn_operator_name_map
    from skl2onnx.common._registration import get_converter, get_shape_calculator
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

    converters: dict[type, Any] = {}
    shapes: dict[type, Any] = {}
    for estimator in (HistGradientBoostingClassifier, HistGradientBoostingRegressor):
        name = sklearn_operator_name_map[estimator]
        converters[estimator] = _with_integer_attributes(get_converter(name))
        shapes[estimator] = get_shape_calculator(name)
    return converters, shapes


def _with_integer_attributes(converter: Any) -> Any:
    def convert_operator(scope: Any, operator: Any, container: Any) -> None:
        add_node = container.add_node

        def add_integer_node(op_type: str, inputs: Any, outputs: Any, **attributes: Any) -> Any:
            return add_node(
                op_type, inputs, outputs, **{key: _integers(value) for key, value in attributes.items()}
            )

        container.add_node = add_integer_node
        try:
            converter(scope, operator, container)
        finally:
            del container.add_node

    return convert_operator


def _integers(value: Any) -> Any:
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [int(item) if isinstance(item, bool | np.bool_) else item for item in value]
    return value
