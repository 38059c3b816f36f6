"""Canonical JSON (RFC 8785), digests, and files that only their owner may read."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
from collections.abc import Mapping
from hashlib import sha256
from typing import Any, Final

import rfc8785

from per_instance_accountant.errors import CertificateError

ACCOUNTING_VERSION: Final = 2
"""Rises whenever a bound or a charge is computed differently. 2: runs with a privacy filter have bounds."""
MAX_FILE: Final = 64 << 20
_BLOCK: Final = 1 << 20
_RECORDED: Final = ("per-instance-accountant", "numpy", "scipy", "torch", "opacus")


def canonical(content: Any) -> bytes:
    """RFC 8785 bytes of plain values.

    >>> canonical({"b": 1.0, "a": [True, None]})
    b'{"a":[true,null],"b":1}'
    """
    return rfc8785.dumps(content)


def digest_of(content: Any) -> str:
    """``"sha256:<hex>"`` over the canonical bytes."""
    return "sha256:" + sha256(canonical(content)).hexdigest()


def file_digest(path: str | os.PathLike[str]) -> str:
    """``"sha256:<hex>"`` over a file. Raises CertificateError PIA051 if it cannot be read."""
    state = sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(_BLOCK):
                state.update(block)
    except OSError as error:
        raise unreadable(
            f"the file cannot be read ({type(error).__name__})", "pass the path of the checkpoint"
        ) from None
    return "sha256:" + state.hexdigest()


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """A small file. Raises CertificateError PIA051 if it is missing or above 64 MiB."""
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_FILE + 1)
    except OSError as error:
        raise unreadable(
            f"the file cannot be read ({type(error).__name__})", "pass the path of an existing file"
        ) from None
    if len(content) > MAX_FILE:
        raise unreadable(f"the file is larger than {MAX_FILE} bytes", "pass a plan or a certificate")
    return content


def unreadable(happened: str, fix: str) -> CertificateError:
    """CertificateError PIA051."""
    return CertificateError("PIA051", happened, "Nothing it may state is established", fix)


def software_versions() -> Mapping[str, str]:
    """Installed versions of the packages that numbers depend on."""
    found: dict[str, str] = {}
    for name in _RECORDED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
