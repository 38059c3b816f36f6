"""Errors of a worker reach whoever waits for it."""

from __future__ import annotations

import pickle

import pytest

from per_instance_accountant.errors import PiaError


def kinds(kind: type[PiaError] = PiaError) -> list[type[PiaError]]:
    return [kind, *(found for below in kind.__subclasses__() for found in kinds(below))]


@pytest.mark.parametrize("kind", kinds())
def test_an_error_survives_the_way_between_processes(kind: type[PiaError]) -> None:
    """By default Python would call the class with the message alone, and break the pool of workers."""
    error = kind("PIA070", "delta is 2.0", "No guarantee exists for it", "delta=1e-5")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind and str(again) == str(error) and again.fix == "delta=1e-5"
