"""What publishing a statistic of individual values costs everybody, beside training."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def disclosure_rdp(epsilon: ArrayLike, orders: NDArray[np.float64]) -> NDArray[np.float64]:
    """Upper bound, in nats, of the RDP of any ``epsilon``-differentially private mechanism.

    epsilon: scalar or (n, 1). orders: (m,). Returns (m,) or (n, m): ``min(epsilon, order epsilon^2 / 2)``
    (Bun and Steinke 2016, Proposition 3.3, and the largest divergence there can be), rounded up.

    >>> disclosure_rdp(0.5, np.array([2.0, 64.0])).round(6).tolist()
    [0.25, 0.5]
    """
    value = np.asarray(epsilon, dtype=np.float64)
    return np.asarray(np.minimum(value, orders * value**2 / 2) * (1 + 1e-12))
