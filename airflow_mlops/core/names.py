"""Names that other systems take, made of a model's."""

from __future__ import annotations

import hashlib
import re

_DIGITS = 6


def distinct(plain: str, name: str) -> str:
    """Give what a name was reduced to, with a digest where something was lost or another name's digest may be meant.

    Two names never have the same.

    >>> distinct("fare", "fare"), distinct("fare", "Fare")
    ('fare', 'fare-ce043a')

    :param plain: what is left of the name; may be empty.
    """
    if plain == name and not re.search(rf"-[0-9a-f]{{{_DIGITS}}}$", name):
        return plain
    digest = hashlib.sha256(name.encode()).hexdigest()[:_DIGITS]
    return "-".join(filter(None, (plain, digest)))
