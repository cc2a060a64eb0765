"""Draw candidates of a search from its space."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from airflow_mlops.core.codec import canonical_json
from airflow_mlops.core.model.tuning import Candidate, Range

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def draw(candidate: Candidate, count: int, seed: int) -> list[Candidate]:
    """Draw parameter sets from a candidate's space, no two the same; fewer where there are not so many."""
    from sklearn.model_selection import ParameterGrid, ParameterSampler

    space = {name: _distribution(values) for name, values in candidate.space.items()}
    if all(isinstance(values, list) for values in space.values()):
        count = min(count, len(ParameterGrid(space)))
    sets = [
        {name: _plain(value) for name, value in drawn.items()}
        for drawn in ParameterSampler(space, count, random_state=seed)
    ]
    different = {canonical_json(drawn): drawn for drawn in sets}.values()
    return [replace(candidate, params=candidate.params | drawn, space={}) for drawn in different]


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _distribution(space: Range | Sequence[Any] | Mapping[str, Any]) -> Any:
    from scipy.stats import loguniform, randint, uniform

    if not isinstance(space, Range):
        return list(space)
    if space.low == space.high:
        return [int(space.low) if space.integer else space.low]
    if space.integer and space.log:
        return _LogIntegers(int(space.low), int(space.high))
    if space.integer:
        return randint(int(space.low), int(space.high) + 1)
    return loguniform(space.low, space.high) if space.log else uniform(space.low, space.high - space.low)


class _LogIntegers(NamedTuple):
    """Whole numbers drawn evenly in the logarithm, both ends included; SciPy has no such distribution."""

    low: int
    high: int

    def rvs(self, random_state: Any = None) -> int:
        from scipy.stats import loguniform

        drawn = float(loguniform(self.low, self.high + 1).rvs(random_state=random_state))
        return min(int(drawn), self.high)  # rounding may reach the open end
