"""Hook of MkDocs: adds README.md, the notebooks and every linked file outside of docs/ to the site, and adapts links.

On the site, README.md is index.md, a page of docs/ keeps its place, and any other file of the repository is below
repository/. Text files become pages, so that a link to a script or config shows it instead of downloading it.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

REPO = Path(__file__).resolve().parent.parent
ALWAYS = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
NOTEBOOKS = "examples/*.ipynb"
SHOWN = {
    ".py": "python",
    ".sh": "sh",
    ".sbatch": "sh",
    ".yaml": "yaml",
    ".json": "json",
    ".jsonl": "json",
    ".txt": "text",
}
"""Endings of files that become a page with a code block, and the block's language."""
LONGEST_PAGE = 60_000
"""Characters; a longer text file stays a file."""
_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*:|#|/")
_FENCE = re.compile(r"\s*(`{3,}|~{3,})")
_BADGE = re.compile(r"^!\[[^\]]*\]\(https://img\.shields\.io/[^)]*\)\n", re.MULTILINE)
"""A badge of the README. It is for the repository's page; on the site it would be a request to another host."""
_LINK = re.compile(r"(?<!\\)(\]\()([^)\s]+)(\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages and files outside of docs/."""
    seen: set[str] = set()
    waiting = [*ALWAYS, *(path.relative_to(REPO).as_posix() for path in sorted(REPO.glob(NOTEBOOKS)))]
    for file in files.documentation_pages():
        waiting += _outside(file.content_string, f"docs/{file.src_uri}")
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        path = REPO / name
        if not path.exists():
            continue  # the link stays as it is, and MkDocs reports it
        found = _added(name, config)
        for file in found:
            files.append(file)
        if path.is_dir():
            waiting += [f"{name}/{child.name}" for child in sorted(path.iterdir()) if child.is_file()]
        elif found and path.suffix == ".md":
            waiting += _outside(path.read_text(encoding="utf-8"), name)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Returns the page with links that fit the places of the site."""
    return adapted(markdown, _repository_name(page.file.src_uri))


def adapted(markdown: str, name: str) -> str:
    """Returns Markdown of a file of the repository with the links of its page on the site.

    Args:
        markdown: its text.
        name: its path from the repository's root.
    """
    here = posixpath.dirname(site_name(name))

    def link(match: re.Match[str]) -> str:
        target, anchor = _split(match[2], name)
        if target is None or not (REPO / target).exists():
            return match[0]
        return f"{match[1]}{posixpath.relpath(site_name(target), here or '.')}{anchor}{match[3]}"

    return "".join(_LINK.sub(link, text) if is_prose else text for is_prose, text in _parts(markdown))


def site_name(name: str) -> str:
    """Returns the place on the site of a file of the repository.

    >>> site_name("README.md"), site_name("docs/theory.md"), site_name("configs/gpt2_tiny.yaml"), site_name("SECURITY.md")
    ('index.md', 'theory.md', 'repository/configs/gpt2_tiny.yaml.md', 'repository/SECURITY.md')
    """
    if name == "README.md":
        return "index.md"
    if name == "docs" or name.startswith("docs/"):
        return name.removeprefix("docs/")
    path = REPO / name
    if path.is_dir():
        return f"repository/{name}/index.md"
    if path.suffix == ".ipynb":
        return f"repository/{name.removesuffix('.ipynb')}.md"
    return f"repository/{name}" + (".md" if _is_shown(path) else "")


def _repository_name(uri: str) -> str:
    """The inverse of `site_name` for pages; pages made from code have no links, so their exact name does not matter."""
    if uri == "index.md":
        return "README.md"
    return uri.removeprefix("repository/") if uri.startswith("repository/") else f"docs/{uri}"


def _added(name: str, config: MkDocsConfig) -> list[File]:
    path, uri = REPO / name, site_name(name)
    if path.is_dir():
        names = sorted(f"{name}/{child.name}" for child in path.iterdir() if child.is_file())
        listed = "".join(f"- [{posixpath.basename(child)}]({posixpath.basename(child)})\n" for child in names)
        return [_page(config, uri, f"# {name}\n\n{listed}")]
    if path.suffix == ".md":
        return [_page(config, uri, _BADGE.sub("", path.read_text(encoding="utf-8")))]
    if path.suffix == ".ipynb":
        return list(_notebook(path, uri, config))
    if _is_shown(path):
        text = path.read_text(encoding="utf-8")
        return [_page(config, uri, f"# {name}\n\n````{SHOWN[path.suffix]}\n{text.rstrip()}\n````\n")]
    return [File.generated(config, uri, abs_src_path=str(path))]


def _page(config: MkDocsConfig, uri: str, text: str) -> File:
    return File.generated(config, uri, content=text, inclusion=InclusionLevel.NOT_IN_NAV)


def _notebook(path: Path, uri: str, config: MkDocsConfig) -> Iterator[File]:
    """The notebook as a page, and each picture of its stored outputs as a file."""
    from nbconvert import MarkdownExporter

    folder = posixpath.splitext(posixpath.basename(uri))[0] + "_files"
    text, resources = MarkdownExporter().from_filename(str(path), {"output_files_dir": folder, "unique_key": path.stem})
    yield _page(config, uri, text)
    for name, content in resources["outputs"].items():
        yield File.generated(config, posixpath.join(posixpath.dirname(uri), name), content=content)


def _is_shown(path: Path) -> bool:
    return path.suffix in SHOWN and path.is_file() and path.stat().st_size <= LONGEST_PAGE


def _outside(markdown: str, name: str) -> list[str]:
    """Returns the files outside of docs/ that a page links to, from the repository's root."""
    targets = (
        _split(match[2], name)[0] for is_prose, text in _parts(markdown) if is_prose for match in _LINK.finditer(text)
    )
    return [target for target in targets if target and not target.startswith("docs/")]


def _split(target: str, name: str) -> tuple[str | None, str]:
    """Returns a link's file from the repository's root and its anchor; (None, "") for a URL, an anchor or a file elsewhere."""
    if _URL.match(target):
        return None, ""
    path, mark, anchor = target.partition("#")
    found = posixpath.normpath(posixpath.join(posixpath.dirname(name), path))
    return (None, "") if found.startswith("..") else (found, mark + anchor)


def _parts(markdown: str) -> Iterator[tuple[bool, str]]:
    """Divides Markdown into (is prose, text); fenced code and code in backticks are not prose.

    >>> list(_parts("see `[a](b)` there"))
    [(True, 'see '), (False, '`[a](b)`'), (True, ' there')]
    """
    fence = ""
    for line in markdown.splitlines(keepends=True):
        mark = _FENCE.match(line)
        if fence or mark:
            yield False, line
            if mark:
                fence = "" if fence == mark[1] else fence or mark[1]
            continue
        for number, piece in enumerate(re.split(r"(`+[^`\n]+`+)", line)):
            yield number % 2 == 0, piece
