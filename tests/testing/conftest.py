"""The accountants with seeded mistakes, for tests that load their file by name."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

SEEDED_FILE = Path(__file__).with_name("seeded_accountants.py")


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("seeded_accountants", SEEDED_FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def seeded() -> ModuleType:
    return _load()


@pytest.fixture(scope="session")
def seeded_file() -> Path:
    return SEEDED_FILE
