"""Renyi orders: the default grid, argument checks, and the bound at an order that is not on a grid."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from per_instance_accountant.errors import UsageError

MAX_ORDER: Final = 16384.0
ROUNDING: Final = 8 * float(np.finfo(np.float64).eps)
"""Relative slack that covers the rounding of a handful of float64 operations."""


def _default_orders() -> tuple[float, ...]:
    opacus = [1 + x / 10.0 for x in range(1, 100)] + [float(x) for x in range(12, 64)]
    tail = np.unique(np.ceil(64 * 2 ** (np.arange(0, 59) / 8)))
    return (*opacus, *(float(x) for x in tail if x <= 10240))


DEFAULT_ORDERS: Final[tuple[float, ...]] = _default_orders()
"""Opacus' default orders (so the worst case equals Opacus') and integers up to 9742, eight per octave.

>>> len(DEFAULT_ORDERS), DEFAULT_ORDERS[0], DEFAULT_ORDERS[150], DEFAULT_ORDERS[-1]
(210, 1.1, 63.0, 9742.0)
"""


def bad_argument(name: str, happened: str, allowed: str, *, code: str = "PIA070") -> UsageError:
    """The error for an argument that no sound number can be computed from."""
    return UsageError(
        code,
        f"{name} {happened}, allowed is {allowed}",
        "No sound privacy number exists for it, so none is returned",
        f"pass {name} in {allowed}" if code == "PIA070" else f"pass {name} as {allowed}",
    )


def as_float_array(name: str, values: ArrayLike, max_ndim: int) -> NDArray[np.float64]:
    """Float64 array without NaN. Raises UsageError PIA071 (type, shape) or PIA070 (NaN)."""
    try:
        raw = np.asarray(values)
        if raw.dtype.kind not in "fiu":
            raise TypeError
        array = raw.astype(np.float64, copy=False)
    except (TypeError, ValueError):
        raise bad_argument(name, "is not numeric", "real numbers", code="PIA071") from None
    if array.ndim > max_ndim:
        shape = f"an array of at most {max_ndim} dimensions"
        raise bad_argument(name, f"has shape {array.shape}", shape, code="PIA071")
    if np.isnan(array).any():
        raise bad_argument(name, f"has {int(np.isnan(array).sum())} NaN entries", "real numbers")
    return array


def as_nonnegative(name: str, values: ArrayLike, max_ndim: int) -> NDArray[np.float64]:
    """Like :func:`as_float_array`, and every entry at least 0; infinity is allowed."""
    array = as_float_array(name, values, max_ndim)
    if (array < 0).any():
        raise bad_argument(name, f"has {int((array < 0).sum())} negative entries", "[0, inf]")
    return array


def as_probability(delta: float) -> float:
    """delta as a float in [0, 1]. Raises UsageError PIA070 or PIA071."""
    value = as_float_array("delta", delta, 0).item()
    if not 0 <= value <= 1:
        raise bad_argument("delta", f"is {value}", "[0, 1]")
    return float(value)


def as_orders(orders: ArrayLike) -> NDArray[np.float64]:
    """Orders as a (m,) array, at least one, each finite and above 1. Raises UsageError PIA070 or PIA071."""
    array = np.atleast_1d(as_float_array("orders", orders, 1))
    if array.size == 0:
        raise bad_argument("orders", "is empty", "at least one order", code="PIA071")
    if not ((array > 1) & (array < np.inf)).all():
        raise bad_argument("orders", f"span [{array.min()}, {array.max()}]", "(1, inf)")
    return array


def as_curve(orders: ArrayLike, rdp: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Orders (m,) and curves (m,) or (n, m) that belong together. Raises UsageError PIA070 or PIA071."""
    grid = as_orders(orders)
    curve = as_nonnegative("rdp", rdp, 2)
    if curve.ndim == 0 and grid.size == 1:
        curve = curve.reshape(1)
    if curve.ndim == 0 or curve.shape[-1] != grid.size:
        shape = f"(m,) or (n, m) with m = {grid.size} orders"
        raise bad_argument("rdp", f"has shape {curve.shape}", shape, code="PIA071")
    return grid, curve


@np.errstate(all="ignore")
def interpolate_rdp(orders: ArrayLike, rdp: ArrayLike, order: ArrayLike) -> NDArray[np.float64]:
    """Upper bound of the RDP at any real ``order`` from upper bounds at ``orders``.

    orders: (m,). rdp: (m,) or (n, m) in nats. order: scalar or (p,), above 1.
    Returns rdp.shape[:-1] + order.shape; above the largest order the value is inf, never an extrapolation.

    ``(a - 1) D_a`` is convex in a and 0 at a = 1, and ``D_a`` is nondecreasing (docs/math/conversions.md), so
    the chord between neighbouring orders and the value at any larger order are both upper bounds; the smaller
    is returned.
    Raises UsageError PIA070 or PIA071.

    >>> interpolate_rdp([2.0, 4.0], [1.0, 2.0], [1.5, 3.0, 4.0, 5.0]).tolist()
    [1.0, 1.750000000000003, 2.0, inf]
    """
    grid, curve = as_curve(orders, rdp)
    wanted = as_float_array("order", order, 1)
    targets = as_orders(wanted)
    ranks = np.argsort(grid, kind="stable")
    grid = grid[ranks]
    # D is nondecreasing in the order: a bound at a larger order also bounds every smaller one.
    curve = np.minimum.accumulate(curve[..., ranks[::-1]], axis=-1)[..., ::-1]
    upper = np.minimum(np.searchsorted(grid, targets), grid.size - 1)
    lower = np.maximum(upper - 1, 0)
    left = np.where(upper == 0, 1.0, grid[lower])
    span = grid[upper] - left
    weight = np.where(span > 0, np.minimum((targets - left) / np.where(span > 0, span, 1.0), 1.0), 1.0)
    low = np.where(
        upper == 0, 0.0, (left - 1) * np.where(np.isfinite(curve[..., lower]), curve[..., lower], 0.0)
    )
    chord = ((1 - weight) * low + weight * (grid[upper] - 1) * curve[..., upper]) / (targets - 1)
    result = np.minimum(chord * (1 + ROUNDING), curve[..., upper])
    result = np.where(targets > grid[-1], np.inf, result)
    return np.asarray(result[..., 0] if wanted.ndim == 0 else result)
