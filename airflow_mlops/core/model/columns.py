"""Column roles: which column is what to a model, declared once."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class ColumnRoles:
    """Which columns a model reads, what it predicts, and what places and weighs a row.

    :param target: column to predict.
    :param numeric: inputs that are numbers.
    :param categorical: inputs that are one of some values.
    :param text: inputs that are free text.
    :param time: when the row happened; orders the rows, and is no input.
    :param id: names the row, and is no input: a model that sees it learns it by heart.
    :param weight: how much a row counts at training, and is no input.
    :raises ValueError: no input at all, or a column with two roles.
    """

    target: str
    time: str
    numeric: tuple[str, ...] = ()
    categorical: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    id: str | None = None
    weight: str | None = None

    def __post_init__(self) -> None:
        if not self.inputs:
            raise ValueError("a model needs at least one input column: numeric, categorical or text")
        roles: dict[str, str] = {}
        for role, names in self._by_role():
            for name in names:
                if name in roles:
                    raise ValueError(f"column {name!r} is given twice, as {roles[name]} and as {role}")
                roles[name] = role

    @property
    def inputs(self) -> tuple[str, ...]:
        """What the model reads, in the order it takes it."""
        return (*self.numeric, *self.categorical, *self.text)

    @property
    def all(self) -> tuple[str, ...]:
        """Every column with a role that training has to read."""
        return (*self.inputs, self.target, self.time, *([self.weight] if self.weight else []))

    def _by_role(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        return (
            ("target", (self.target,)),
            ("time", (self.time,)),
            ("numeric", self.numeric),
            ("categorical", self.categorical),
            ("text", self.text),
            ("id", (self.id,) if self.id else ()),
            ("weight", (self.weight,) if self.weight else ()),
        )
