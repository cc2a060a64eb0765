"""ONNX: convert a fitted pipeline and prove on real rows that it gives the same answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

    from airflow_mlops.core.signature import ModelSignature

#: Highest standard opset and ML opset that skl2onnx 1.20 and onnxruntime 1.22+ both know.
TARGET_OPSET = {"": 18, "ai.onnx.ml": 3}


@dataclass(frozen=True, kw_only=True, slots=True)
class Parity:
    """How far the ONNX form is from the scikit-learn form on the same rows.

    :param row_count: rows compared.
    :param label_flips: rows whose label differs (classification), else 0.
    :param maximum_difference: largest absolute difference of a regression output; 0.0 for classification.
    :param passed: whether the ONNX form may be served.
    :param reason: one sentence.
    """

    row_count: int
    label_flips: int
    maximum_difference: float
    passed: bool
    reason: str


def convert(pipeline: Any, signature: ModelSignature) -> bytes:
    """Convert to ONNX with one named input per field.

    :raises Exception: whatever the converter raises; the caller serves the scikit-learn form and says why.
    """
    from skl2onnx import convert_sklearn
    from skl2onnx.common.data_types import FloatTensorType, StringTensorType

    inputs = [
        (field.name, (FloatTensorType if field.type == "number" else StringTensorType)([None, 1]))
        for field in signature.inputs
    ]
    converters, shapes = _integer_attribute_converters()
    model = convert_sklearn(
        pipeline,
        name="model",  # the default is a random one, and equal models should have equal bytes
        initial_types=inputs,
        target_opset=TARGET_OPSET,
        custom_conversion_functions=converters,
        custom_shape_calculators=shapes,
        options={id(pipeline): {"zipmap": False}} if hasattr(pipeline, "classes_") else None,
    )
    serialized: bytes = model.SerializeToString()
    return serialized


def check_parity(model: bytes, features: pd.DataFrame, expected: Any, *, maximum_difference: float) -> Parity:
    """Compare the ONNX form with the scikit-learn form's own predictions.

    :param expected: predictions of the pipeline on ``features``.
    :param maximum_difference: allowed difference relative to the spread (standard deviation) of ``expected``.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    feeds = {
        name: (
            column.to_numpy(dtype=np.float32)
            if column.dtype.kind == "f"
            else column.astype(object).where(column.notna(), "").to_numpy(dtype=object)
        ).reshape(-1, 1)
        for name, column in features.items()
    }
    got = np.asarray(session.run(None, feeds)[0]).reshape(-1)
    want = np.asarray(expected).reshape(-1)
    if want.dtype.kind in "OUSb" or got.dtype.kind in "OUSi":
        flips = int(np.sum(got.astype(str) != want.astype(str)))
        reason = f"{flips} of {len(want)} labels differ" if flips else f"all {len(want)} labels agree"
        return Parity(
            row_count=len(want), label_flips=flips, maximum_difference=0.0, passed=flips == 0, reason=reason
        )
    difference = float(np.max(np.abs(got - want)))
    limit = maximum_difference * (float(np.std(want)) or 1.0)
    return Parity(
        row_count=len(want),
        label_flips=0,
        maximum_difference=difference,
        passed=bool(difference <= limit),
        reason=f"largest difference on {len(want)} rows is {difference:.2g} (limit {limit:.2g})",
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
