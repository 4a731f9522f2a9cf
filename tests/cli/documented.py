"""Finds the commands in documentation, comments and messages, and checks each with the parser of its verb.

A command is checked if it is in a code block or in backticks, in a comment of a config or script, or in a string of the
package. Usage notation is understood: FILE, N and … stand for values, and [--flag VALUE] is optional.
"""

from __future__ import annotations

import ast
import functools
import io
import itertools
import json
import re
import shlex
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lion import launcher
from megatron_lion.cli import VERBS, build_parser, parse, verb_module
from megatron_lion.errors import MegatronLionError

REPO = Path(__file__).resolve().parents[2]
FOLDERS = ("configs", "launch", "docs", "benchmarks", "data_prep", "tests", ".ci")
START = re.compile(
    r"(?<![\w./-])(?:(?:bash |sbatch )?(?:launch/(?:torchrun\.sh|slurm\.sbatch)(?=\s+(?:configs/|[A-Z]|\S+\.yaml))|data_prep/\w+\.sh)"
    r"|megatron-lion(?=\s+\S)|(?:\S*/)?python3? (?:-m (?:megatron_lion|faults)\b|benchmarks/|docs/)|make(?= [a-z]))"
)
NUMBERS = {"N", "K", "M", "NUMBER", "SECONDS"}
MADE = {"--output", "--results", "--run_dir"}
"""Flags whose value need not exist."""


@dataclass(frozen=True)
class Command:
    """A documented command: its place, its text, whether it is meant to be pasted as it is, and whether it is in a variable."""

    place: str
    text: str
    whole: bool
    in_variable: bool = False


def commands_of(path: Path) -> Iterator[Command]:
    """The commands in a file."""
    if path.suffix == ".md":
        yield from _of_markdown(path.read_text(encoding="utf-8"), _name(path))
    elif path.suffix == ".ipynb":
        yield from _of_markdown(_of_cells(path), _name(path))
    elif path.suffix == ".py":
        yield from _of_python(path)
    else:
        yield from _of_script(path)


def _of_cells(path: Path) -> str:
    """Returns a notebook's text and its shell cells as Markdown."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    texts = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    shown = [
        text if kind == "markdown" else f"```\n{text}\n```"
        for kind, text in texts
        if kind == "markdown" or "%%bash" in text
    ]
    return "\n\n".join(shown)


def _of_markdown(text: str, name: str) -> Iterator[Command]:
    lines = text.split("\n")
    fenced, number = False, 0
    while number < len(lines):
        line, first = lines[number], number + 1
        number += 1
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            while line.endswith("\\"):
                line = line[:-1] + lines[number]
                number += 1
            yield from _in_line(line, f"{name}:{first}", whole=True)
        else:
            yield from _in_backticks(line, f"{name}:{first}")


def _of_python(path: Path) -> Iterator[Command]:
    source = path.read_text(encoding="utf-8")
    if not START.search(source.replace('"', " ")):  # parsing takes long; an f-string may be divided by quotes
        return
    for node in _strings(ast.parse(source)):
        text = _text(node)
        if "\n" in text:  # a docstring
            for offset, line in enumerate(text.split("\n")):
                place = f"{_name(path)}:{node.lineno + offset}"
                if not line.lstrip().startswith("make "):  # the verb of a sentence
                    yield from _in_line(line, place, whole=False)
                yield from _in_backticks(line, place)
        elif "`" in text:
            yield from _in_backticks(text, f"{_name(path)}:{node.lineno}")
        else:
            for match in START.finditer(text):
                if not match[0].startswith("make") and _names_verb(text[match.start() :]):
                    rest = re.split(r"[;)]|, |\. |\n| \(", text[match.start() :])[0]
                    yield Command(f"{_name(path)}:{node.lineno}", rest.rstrip(".:,"), whole=False)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield from _in_backticks(token.string, f"{_name(path)}:{token.start[0]}")


def _strings(tree: ast.AST) -> Iterator[ast.Constant | ast.JoinedStr]:
    """String literals; the parts of an f-string are not listed again."""
    if isinstance(tree, ast.JoinedStr) or (isinstance(tree, ast.Constant) and isinstance(tree.value, str)):
        yield tree
        return
    for child in ast.iter_child_nodes(tree):
        yield from _strings(child)


def _text(node: ast.Constant | ast.JoinedStr) -> str:
    """The text of a literal; the values of an f-string are placeholders."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    return "".join(str(part.value) if isinstance(part, ast.Constant) else "X" for part in node.values)


def _names_verb(text: str) -> bool:
    words = text.split()
    return not words[0].endswith("megatron-lion") or words[1].strip("`,.;:") in VERBS


def _of_script(path: Path) -> Iterator[Command]:
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        place = f"{_name(path)}:{number}"
        hint = re.search(r"""(?:echo|printf) (["'])next: (.*?)(?:%s\\n)?\1""", line)
        if hint:  # what a recipe prints at its end
            yield from _in_line(hint[2], place, whole=False)
        elif line.startswith("#"):
            yield from _in_backticks(line, place)
            text = line.lstrip("#").split(": ")[-1].strip()
            if not text.endswith(".") and path.name != "Makefile":  # its comments describe targets
                yield from _in_line(text, place, whole=line.startswith("#   "))


def _in_backticks(line: str, place: str) -> Iterator[Command]:
    for text in re.findall(r"`([^`]+)`", line):
        yield from _in_line(text, place, whole=False)


def _in_line(line: str, place: str, *, whole: bool) -> Iterator[Command]:
    """The command at the start of a line, after assignments of variables, or in a function or a variable."""
    match = START.search(line)
    if match is None or not re.fullmatch(r"\s*(?:\w+\(\) \{ )?(?:\w+=(?:\S+ |\"))*", line[: match.start()]):
        return
    text = re.split(r"\s#(?:\s|$)|\s(?:\||>|&&)\s", line[match.start() :])[0].rstrip()
    yield Command(place, text.removesuffix("; }").removesuffix(' "$@"'), whole, line[: match.start()].endswith('"'))


@functools.cache
def _name(path: Path) -> str:
    return path.relative_to(REPO).as_posix() if path.is_relative_to(REPO) else path.name


@functools.cache
def _parser(verb: str) -> Any:
    return build_parser(verb, verb_module(verb))


@functools.cache
def _flags_of_script(path: Path) -> frozenset[str]:
    """The flags that a script declares, read from its source: importing a benchmark imports torch."""
    text = path.read_text(encoding="utf-8")
    return frozenset(re.findall(r"add_argument\(\s*[\"'](--[\w-]+)", text)) | {"--help"}


@functools.cache
def problems(command: Command) -> list[str]:
    """What is wrong with a command; empty if nothing is. The current folder must be the repository."""
    if command.in_variable:
        return ["zsh does not divide the value of a variable into words; write a function"]
    try:
        tokens = _tokens(command.text)
    except ValueError as error:
        return [f"the shell cannot split it: {error}"]
    words = [word for word, _ in tokens]
    read = [word for flag, word in zip(["", *words], words, strict=False) if flag not in MADE]
    found = [f"{word}: there is no such file" for word in read if _is_missing(word)]
    found += [
        f"{word} must be quoted: zsh, and bash with a matching file, replace it"
        for (flag, _), (word, quoted) in itertools.pairwise(tokens)
        if flag.startswith("--") and word.startswith("[") and not quoted
    ]
    return found or _problems_of_words(words, command)


def _tokens(text: str) -> list[tuple[str, bool]]:
    """Words of a command with usage notation resolved, and whether each was quoted.

    Raises:
        ValueError: a quote is not closed.
    """
    text = re.sub(r"(?<=\s)\[options\]|(?<=\s)\[--[A-Z].*?\]", "", text)
    text = re.sub(r"(?<!\S)(?<!--\S )\[((?:--|[A-Z]+\b)[^\[\]]*)\](?=\s|$)", r"\1", text)  # [--flag VALUE], [RUN …]
    text = re.sub(r"\s…|\.\.\.(?=\s|$)|…(?=\s|$)", " ", text)
    lexer = shlex.shlex(text, posix=False, punctuation_chars=False)
    lexer.whitespace_split, lexer.commenters = True, ""
    raw = list(lexer)
    cooked = shlex.split(text)
    if len(raw) != len(cooked):  # a quoted part inside of a word: only the words matter then
        return [(word, True) for word in cooked]
    return [(word, word != given) for word, given in zip(cooked, raw, strict=True)]


def _is_missing(word: str) -> bool:
    path = word.partition("=")[2] or word
    return (
        path.split("/")[0] in FOLDERS and "/" in path and not any(mark in path for mark in "*{$X")
        and not (REPO / path).exists()
    )  # fmt: skip


def _problems_of_words(words: list[str], command: Command) -> list[str]:
    first, *rest = words
    if first in ("bash", "sbatch"):
        first, *rest = rest
    if first == "make":
        return _problems_of_make(rest)
    if first.startswith("data_prep/"):
        return []
    if first.startswith("launch/"):
        return _problems_of_verb("pretrain", ["--config", *rest], command)
    if first == "megatron-lion":
        rest = [word for place, word in enumerate(rest) if not (place == 0 and word == "--traceback")]
        return _problems_of_verb(rest[0], rest[1:], command) if rest else []
    if rest[0] != "-m":
        return _problems_of_flags(rest[1:], _flags_of_script(REPO / rest[0])) if (REPO / rest[0]).is_file() else []
    module, *rest = rest[1:]
    if module == "megatron_lion":
        return _problems_of_verb(rest[0], rest[1:], command) if rest else []
    if module == "megatron_lion.launcher":
        return _problems_of_launcher(rest, command) if rest else []
    if module.startswith("faults"):
        return _problems_of_flags(rest, _flags_of_script(REPO / "tests" / "faults" / "runner.py"))
    return [] if (REPO / f"{module.replace('.', '/')}.py").is_file() else [f"{module}: there is no such module"]


def _problems_of_make(words: list[str]) -> list[str]:
    text = (REPO / "Makefile").read_text(encoding="utf-8")
    found = []
    for word in words:
        name, assigned, _ = word.partition("=")
        if assigned and f"$({name})" not in text:
            found.append(f"{name}: the Makefile reads no such variable")
        if not assigned and not re.search(rf"^{re.escape(name)}:", text, re.MULTILINE):
            found.append(f"make {name}: there is no such target")
    return found


def _problems_of_flags(words: list[str], known: frozenset[str]) -> list[str]:
    given = [word.partition("=")[0] for word in words if word.startswith("--")]
    return [f"{flag}: there is no such flag" for flag in given if flag not in known]


def _problems_of_launcher(words: list[str], command: Command) -> list[str]:
    try:
        options = launcher._parse(["2" if word in NUMBERS else word for word in words])
    except SystemExit:
        return ["the launcher does not accept it"]
    verb, *rest = options.command
    return _problems_of_verb(verb, rest, command)


def _problems_of_verb(verb: str, words: list[str], command: Command) -> list[str]:
    if verb.startswith("-") or verb in ("help", "X", "VERB"):
        return []
    if verb not in VERBS:
        return [f"{verb}: there is no such verb"]
    parser = _parser(verb)
    found = _problems_of_flags(words, frozenset(parser._option_string_actions) | {"--print_config"})
    if found or {"-h", "--help"} & set(words):
        return found
    try:
        parse(parser, [*_as_typed(parser, words)])
    except MegatronLionError as error:
        # Prose names a verb without what it needs; a code block is pasted.
        incomplete = not command.whole or "…" in command.text or "..." in command.text
        if not (incomplete and re.search(r"^missing: |expected (?:at least )?one argument|, given X$", str(error))):
            return [str(error)]
    return []


def _as_typed(parser: Any, words: list[str]) -> Iterator[str]:
    """The words, with placeholders replaced by values of the kind that the flag takes."""
    flag = "--config" if parser.takes_config_first else ""
    for word in words:
        if word.startswith("--"):
            name, assigned, value = word.partition("=")
            flag = name
            yield f"{name}={_value(value, _kind(parser, name))}" if assigned else word
        else:
            yield _config(word) if flag == "--config" else _value(word, _kind(parser, flag))


def _kind(parser: Any, flag: str) -> Any:
    action = parser._option_string_actions.get(flag)
    return getattr(action, "type", None) or getattr(action, "_typehint", None)


def _value(word: str, kind: Any) -> str:
    is_placeholder = word.isupper() and (word in NUMBERS or re.search(r"\b(int|float)\b", str(kind)))
    return "2" if is_placeholder and kind is not str else word


def _config(word: str) -> str:
    """A config that exists, for one that the reader has; one of the repository must exist."""
    return word if word.startswith("configs/") else "configs/demo.yaml"


def sources() -> list[Path]:
    """The files whose commands are checked."""
    found = [
        REPO / name
        for name in ("README.md", "CONTRIBUTING.md", "RELEASING.md", "SECURITY.md", "CITATION.cff", "Makefile")
    ]
    for pattern in (
        "docs/**/*.md",
        "examples/*.ipynb",
        "configs/*.yaml",
        "data_prep/*.sh",
        "launch/*",
        "megatron_lion/**/*.py",
        "benchmarks/*.py",
    ):
        found += sorted(REPO.glob(pattern))
    return found
