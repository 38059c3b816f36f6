"""Showing an upper bound as an upper bound."""

from __future__ import annotations

import decimal
import math

from per_instance_accountant.errors import GuaranteeError

_ROUND_UP = decimal.Context(prec=4, rounding=decimal.ROUND_CEILING)
_ROUND_DOWN = decimal.Context(prec=4, rounding=decimal.ROUND_FLOOR)


def not_nan(value: float) -> float:
    """The value itself. Raises GuaranteeError PIA011 for NaN."""
    if math.isnan(value):
        raise GuaranteeError(
            "PIA011",
            "a result is not a number",
            "Nothing was printed in its place, because NaN passes for any bound",
            "pia doctor",
        )
    return value


def rounded_up(value: float) -> str:
    """Four significant digits, never below the value: what is shown of an upper bound is an upper bound.

    Raises GuaranteeError PIA011 for NaN.

    >>> rounded_up(8.02513), rounded_up(1e-05), rounded_up(float("inf"))
    ('8.026', '1e-05', 'inf')
    """
    if math.isinf(not_nan(value)):
        return str(value)
    return f"{float(_ROUND_UP.create_decimal(repr(float(value)))):.4g}"


def rounded_down(value: float) -> str:
    """Four significant digits, never above the value: what is shown of a lower bound is a lower bound.

    Raises GuaranteeError PIA011 for NaN.

    >>> rounded_down(8.02573), rounded_down(0.0)
    ('8.025', '0')
    """
    if math.isinf(not_nan(value)):
        return str(value)
    return f"{float(_ROUND_DOWN.create_decimal(repr(float(value)))):.4g}"
