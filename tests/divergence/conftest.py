"""Exact values at high precision, by formulas that share nothing with the package."""

from __future__ import annotations

from collections.abc import Callable

import mpmath as mp
import pytest

Exact = Callable[[float, float, float], mp.mpf]


def _alternating_sum(term: Callable[[int], mp.mpf], n: int) -> mp.mpf:
    """sum (-1)^k term(k), term(k) moments of a measure on [0, 1] (Cohen, Villegas and Zagier 2000)."""
    d = (3 + mp.sqrt(8)) ** n
    d = (d + 1 / d) / 2
    b, c, total = mp.mpf(-1), -d, mp.mpf(0)
    for k in range(n):
        c = b - c
        total += c * term(k)
        b = b * (k + n) * (k - n) / ((k + mp.mpf(1) / 2) * (k + 1))
    return total / d


def _integer_moment(q: mp.mpf, r: mp.mpf, a: int) -> mp.mpf:
    term, total, growth, power = (1 - q) ** a, (1 - q) ** a, mp.exp(r * r), mp.mpf(1)
    for k in range(a):
        term = term * (a - k) / (k + 1) * q / (1 - q) * power
        power *= growth
        total += term
    return total


def _real_moment(q: mp.mpf, r: mp.mpf, a: mp.mpf) -> mp.mpf:
    """The two half-line binomial series, split where both components are equally likely."""
    switch = mp.log((1 - q) / q) / r + r / 2

    def below(x: mp.mpf) -> mp.mpf:
        return mp.erfc(-x / mp.sqrt(2)) / 2

    def term(k: int, binomial: mp.mpf) -> mp.mpf:
        j = a - k
        low = (1 - q) ** j * q**k * mp.exp(k * (k - 1) * r * r / 2) * below(switch - k * r)
        high = (1 - q) ** k * q**j * mp.exp(j * (j - 1) * r * r / 2) * below(j * r - switch)
        return binomial * (low + high)

    count, total, binomial = int(mp.ceil(a)) + 1, mp.mpf(0), mp.mpf(1)
    for k in range(count):
        total += term(k, binomial)
        binomial = binomial * (a - k) / (k + 1)
    tail, sign, n = [abs(binomial)], mp.sign(binomial), int(mp.mp.dps / 0.76) + 5
    for k in range(count, count + n):
        tail.append(tail[-1] * abs(a - k) / (k + 1))
    return total + sign * _alternating_sum(lambda i: term(count + i, tail[i]), n)


def _exact_rdp(sample_rate: float, ratio: float, order: float) -> mp.mpf:
    q, r, a = mp.mpf(sample_rate), mp.mpf(ratio), mp.mpf(order)
    lost = (
        2 * max(mp.mpf(0), -mp.log10(q)) + 2 * max(mp.mpf(0), -mp.log10(r)) + max(mp.mpf(0), -mp.log10(a - 1))
    )
    with mp.workdps(int(40 + lost)):
        moment = _integer_moment(q, r, int(a)) if a == int(a) else _real_moment(q, r, a)
        return mp.log(moment) / (a - 1)


@pytest.fixture(scope="session")
def exact_rdp() -> Exact:
    """(sample_rate, ratio, order) -> D_order(mixture || pure) of one sampled Gaussian step."""
    return _exact_rdp
