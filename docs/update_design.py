"""Writes the list of files in docs/design.md from the first line of each module's docstring.

python docs/update_design.py          rewrite the list
python docs/update_design.py --check  exit 1 if it is not up to date
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
PAGE = REPO / "docs" / "design.md"
BEGIN, END = "<!-- files: begin -->\n", "<!-- files: end -->\n"


def first_line(path: Path) -> str:
    """First line of a module's docstring, or of a C++ file's comment."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return (ast.get_docstring(ast.parse(text)) or "").split("\n")[0]
    return text.split("\n")[0].removeprefix("//").strip()


def file_lines(package: Path) -> Iterator[str]:
    """The Markdown list: the package's own files, then each room with its files."""
    rooms = [package, *sorted(path for path in package.iterdir() if (path / "__init__.py").is_file())]
    for room in rooms:
        if room != package:
            yield f"\n**{room.name}/** — {first_line(room / '__init__.py')}\n\n"
        files = sorted(path for path in room.iterdir() if path.suffix in (".py", ".cpp") and path.name != "__init__.py")
        for path in files:
            yield f"- `{path.name}` {first_line(path)}\n"


def updated(page: str, package: Path) -> str:
    """The page with its list of files made again."""
    head, rest = page.split(BEGIN)
    tail = rest.split(END)[1]
    return "".join([head, BEGIN, *file_lines(package), END, tail])


def main(words: list[str]) -> int:
    """Writes the page, or checks it; returns the exit code."""
    page = PAGE.read_text(encoding="utf-8")
    wanted = updated(page, REPO / "megatron_lion")
    if "--check" in words:
        if page != wanted:
            sys.stderr.write("docs/design.md: the list of files is not up to date; run: python docs/update_design.py\n")
        return int(page != wanted)
    PAGE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
