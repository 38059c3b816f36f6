"""HTML and SVG that cannot hold unescaped text: elements are built from functions, not from templates."""

from __future__ import annotations

import html
from typing import Final

_EMPTY: Final = frozenset({"meta", "br", "rect", "line", "circle", "polyline", "link"})


class Markup(str):
    """Text that is already markup; every other text is escaped where it is put into an element."""

    __slots__ = ()


def plain(text: object) -> str:
    """The text with control and direction characters spelled out, so that no id can steer a reader's view.

    >>> plain("a\\u202eb")
    'a\\\\u202eb'
    """
    shown = str(text)
    return (
        shown
        if shown.replace("\u00a0", " ").isprintable()
        else shown.encode("unicode_escape").decode("ascii")
    )


def join(*children: object) -> Markup:
    """Children side by side; all that is not Markup is escaped.

    >>> join("1 < 2", Markup("<br>"))
    '1 &lt; 2<br>'
    """
    return Markup(
        "".join(child if isinstance(child, Markup) else html.escape(plain(child)) for child in children)
    )


def element(name: str, /, *children: object, **attributes: object) -> Markup:
    """One element. Attributes: ``class_`` is class, underscores are hyphens, None is left out.

    >>> element("p", "a & b", class_="note")
    '<p class="note">a &amp; b</p>'
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(plain(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _EMPTY:
        # The slash closes an element inside of SVG and is ignored outside.
        return Markup(f"<{name}{written}/>")
    return Markup(f"<{name}{written}>{join(*children)}</{name}>")
