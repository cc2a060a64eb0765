"""Figures in sentences: with as many digits as it takes to tell them apart."""

from __future__ import annotations

import math

#: Significant digits of a figure that stands alone, and the most that any gets.
_DIGITS, _MOST_DIGITS = 3, 9
#: Smaller ones, and those from the other on, are written with an exponent.
_SMALL, _LARGE = 1e-4, 1e6


def figures(*values: float) -> tuple[str, ...]:
    """Write numbers that are held against each other: with three digits, or as many as show two digits of their difference.

    >>> figures(2.871, 4.0967)
    ('2.87', '4.1')
    >>> figures(2012.4782, 2019.5124)
    ('2012.5', '2019.5')
    >>> figures(100_200.2, 100_449.1)
    ('100200', '100449')
    >>> figures(1_230_000.0, 0.00001)
    ('1.23e+06', '1e-05')
    """
    known = [value for value in values if math.isfinite(value)]
    difference = max(known) - min(known) if known else 0.0
    return tuple(_figure(value, difference) for value in values)


def _figure(value: float, difference: float) -> str:
    if value == 0 or not math.isfinite(value):
        return f"{value:.0f}"
    place = math.floor(math.log10(abs(value)))
    digits = _DIGITS
    if difference > 0:
        digits = max(digits, place + 2 - math.floor(math.log10(difference)))
    digits = min(digits, _MOST_DIGITS)
    if not _SMALL <= abs(value) < _LARGE:
        return f"{value:.{digits}g}"
    text = f"{value:.{max(0, digits - 1 - place)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
