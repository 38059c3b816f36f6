"""Shows docstrings as Markdown, their examples as code: a griffe extension for the documentation site."""

from __future__ import annotations

import re
from typing import Any

import griffe

_EXAMPLE = re.compile(r"(?:^[ ]*>>> .*\n?(?:^[ ]*(?!>>>)\S.*\n?)*)+", re.MULTILINE)

_ROLE = re.compile(r":(?:func|class|meth|mod|attr):`~?([^`]+)`")


def plain_names(text: str) -> str:
    """Names without the role that editors read before them."""
    return _ROLE.sub(r"`\1`", text)


def fenced(text: str) -> str:
    """Every run of doctest lines, with its output, inside of a code fence."""
    return _EXAMPLE.sub(lambda found: f"```pycon\n{found.group().rstrip()}\n```\n", text + "\n").rstrip()


class DoctestBlocks(griffe.Extension):
    """Applied once to every object with a docstring."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring is None:
            return
        obj.docstring.value = plain_names(obj.docstring.value)
        if ">>> " in obj.docstring.value:
            obj.docstring.value = fenced(obj.docstring.value)
