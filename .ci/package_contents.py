"""What wheel and sdist must hold, and what they must not."""

from __future__ import annotations

import sys
import tarfile
import zipfile
from pathlib import Path

PACKAGE = Path("per_instance_accountant")
NEEDED = {
    path.as_posix()
    for path in PACKAGE.rglob("*")
    if path.suffix in {".py", ".css"} or path.name == "py.typed"
}
SOURCES = {
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "Makefile",
    "constraints.txt",
    "mkdocs.yml",
    "docs/index.md",
}


def main(paths: list[str]) -> None:
    """Exit with the missing names."""
    held = {}
    for path in map(Path, paths):
        if path.suffix == ".whl":
            held[path.name] = (set(zipfile.ZipFile(path).namelist()), NEEDED)
        else:
            with tarfile.open(path) as archive:
                names = {name.partition("/")[2] for name in archive.getnames()}
            held[path.name] = (names, NEEDED | SOURCES)
    missing = {name: sorted(needed - names)[:5] for name, (names, needed) in held.items() if needed - names}
    stray = {
        name: sorted(n for n in names if "__pycache__" in n or n.endswith((".log", "key")))[:5]
        for name, (names, _) in held.items()
    }
    if len(held) != 2 or missing or any(stray.values()):
        sys.exit(f"wheel and sdist: {sorted(held)}, missing {missing}, stray {stray}")


if __name__ == "__main__":
    main(sys.argv[1:])
