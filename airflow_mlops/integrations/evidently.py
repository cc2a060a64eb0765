"""Evidently: the explanation of a window as one self-contained HTML page."""

from __future__ import annotations

import re
import warnings
from typing import TYPE_CHECKING

from airflow_mlops.exceptions import InsufficientDataError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import pandas as pd

#: Sources a page may not load from: the reader's browser must talk to nobody.
_REMOTE = re.compile(r"""<(?:script|link|img)\b[^>]*\b(?:src|href)=["']https?://[^>]*>(?:\s*</script>)?""")

#: MLflow shows a page in a frame about 650 pixels wide. Evidently's cards wrap as columns do, which makes each as wide
#: as its widest table and cuts off what does not fit; unwrapped they fit the frame, and the table scrolls.
_FIT_NARROW_FRAMES = "<style>.MuiGrid-direction-xs-column { flex-wrap: nowrap !important }</style>"


def write_drift_report(
    *,
    reference: pd.DataFrame,
    current: pd.DataFrame,
    numeric: Sequence[str],
    categorical: Sequence[str],
    share_threshold: float,
    path: Path,
) -> Path:
    """Write Evidently's drift preset over both windows.

    Of a column that has no value on one of the sides, such as an input that is no longer sent, Evidently draws nothing, nor of any
    other beside it: it is left out, and the verdict names it.

    :param reference: rows of the training, the given columns.
    :param current: rows of the window, the same columns.
    :param numeric: numeric columns.
    :param categorical: columns of categories.
    :param share_threshold: share of drifted columns from which the page says that the dataset drifted.
    :param path: where to write.
    :raises InsufficientDataError: one of the windows has no rows, or no column has values in both.
    """
    if len(reference) == 0 or len(current) == 0:
        raise InsufficientDataError("a drift report needs rows in both windows")
    numeric, categorical = (
        [name for name in names if reference[name].notna().any() and current[name].notna().any()]
        for names in (numeric, categorical)
    )
    if not numeric and not categorical:
        raise InsufficientDataError("a drift report needs a column that has values in both windows")
    reference, current = (side[[*numeric, *categorical]] for side in (reference, current))
    with warnings.catch_warnings():
        # Evidently and the libraries under it warn about their own internals; nobody here can act on it.
        warnings.simplefilter("ignore")
        from evidently import DataDefinition, Dataset, Report
        from evidently.presets import DataDriftPreset

        definition = DataDefinition(numerical_columns=list(numeric), categorical_columns=list(categorical))
        sides = [Dataset.from_pandas(side, data_definition=definition) for side in (current, reference)]
        snapshot = Report([DataDriftPreset(drift_share=share_threshold)], include_tests=True).run(*sides)
        snapshot.save_html(str(path))
    page = _REMOTE.sub("", path.read_text())
    path.write_text(page.replace("</head>", f"{_FIT_NARROW_FRAMES}</head>", 1))
    return path
