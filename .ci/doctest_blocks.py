"""Shows the examples of docstrings as code: a griffe extension for the documentation site."""

from __future__ import annotations

import re
from typing import Any

import griffe

_EXAMPLE = re.compile(r"(?:^[ ]*>>> .*\n?(?:^[ ]*(?!>>>)\S.*\n?)*)+", re.MULTILINE)


def fenced(text: str) -> str:
    """Every run of doctest lines, with its output, inside of a code fence."""
    return _EXAMPLE.sub(lambda found: f"```pycon\n{found.group().rstrip()}\n```\n", text + "\n").rstrip()


class DoctestBlocks(griffe.Extension):
    """Applied once to every object with a docstring."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring is not None and ">>> " in obj.docstring.value:
            obj.docstring.value = fenced(obj.docstring.value)
