"""``python -m tests.documentation.error_catalogue`` writes the page of error codes from ``errors.CODES``."""

from __future__ import annotations

from pathlib import Path

from per_instance_accountant.errors import CODES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "errors.md"
_HEAD = """# Error codes

Written by `python -m tests.documentation.error_catalogue`; do not edit. `pia explain CODE` says it offline.

An error says what happened with the values, what it means for the guarantee, and the line that fixes it. A
code is never reused for another meaning.

| code | meaning |
|---|---|
"""


def catalogue() -> str:
    """The page, from the codes in order."""
    return _HEAD + "".join(f"| {code} | {title} |\n" for code, title in sorted(CODES.items()))


if __name__ == "__main__":
    PAGE.write_text(catalogue(), encoding="utf-8")
