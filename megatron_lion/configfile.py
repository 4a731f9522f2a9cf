"""Parses YAML files and dotted flags into a `RunConfig` and writes it back; each mistake gives one line."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from argparse import Action
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser, get_loader, set_loader, set_parsing_settings

from megatron_lion.config import RunConfig
from megatron_lion.config_hints import TEXT_ENDINGS, hint, other_words
from megatron_lion.errors import ConfigError
from megatron_lion.files import write_whole
from megatron_lion.jobs import rank_from_env
from megatron_lion.optimizer_switch import switched, unused
from megatron_lion.shipped import config_file, shipped_configs, shipped_name
from megatron_lion.streams import say

set_parsing_settings(docstring_parse_attribute_docstrings=True)


_NULLS = ("null", "Null", "NULL", "~")
"""Words that YAML reads as null."""


def _load_value(text: str) -> Any:
    """Parses YAML, but leaves a one-line value that YAML would read as null as text, unless it is exactly null.

    jsonargparse also passes each text of a parsed file through here, such as the 'NULL' that was in quotes there.
    """
    if "\n" not in text and (text.lstrip().startswith("#") or (text != "null" and text.strip() in _NULLS)):
        return text
    return _with_lists(get_loader("yaml")(text))


@cache
def list_keys() -> dict[str, type]:
    """Returns the dotted keys of the settings that take a list, with the type of its items."""
    found: dict[str, type] = {}
    for section, kind in get_type_hints(RunConfig).items():
        for name, hinted in get_type_hints(kind).items() if dataclasses.is_dataclass(kind) else ():
            for member in get_args(hinted) if isinstance(hinted, UnionType) else (hinted,):
                if get_origin(member) is list:
                    found[f"{section}.{name}"] = get_args(member)[0]
    return found


def _with_lists(content: Any) -> Any:
    """Returns the content of a config file with each single value of a list setting as a list of one."""
    if isinstance(content, dict):
        for key in list_keys():
            section, _, name = key.partition(".")
            group = content.get(section)
            if isinstance(group, dict) and isinstance(group.get(name), str | int | float):
                group[name] = [group[name]]
    return content


def _in_brackets(key: str, text: str) -> str:
    """Returns a flag's value as YAML's list of one, or as a list of numbers if commas separate them; lists stay as they are."""
    if text.lstrip().startswith("[") or text.strip() in ("", "null", "~"):
        return text
    # JSON's quotes keep a path that YAML would read as something else: `a, b`, `no`, `c: d`.
    return f"[{json.dumps(text, ensure_ascii=False)}]" if list_keys()[key] is str else f"[{text}]"


VALUES = "yaml with any text"
set_loader(VALUES, _load_value, (yaml.YAMLError,))


class UserParser(ArgumentParser):
    """A parser that raises ConfigError instead of printing usage and exiting, and that checks config files strictly.

    Attributes:
        takes_config_first: whether a first word that is no flag is the config file.
        words: the words of the last `parse_args`.
    """

    takes_config_first = False
    words: Sequence[str] = ()

    def __init__(self, *others: Any, **named: Any) -> None:
        super().__init__(*others, parser_mode=VALUES, allow_abbrev=False, **named)

    def add_argument(self, *names: Any, **named: Any) -> Any:
        """Declares an argument as argparse does; choices of strings become a Literal, which --help and messages print."""
        if named.get("type") is str and "choices" in named:
            named["type"] = Literal[tuple(named.pop("choices"))]
        return super().add_argument(*names, **named)

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, *others: Any, **named: Any
    ) -> Any:
        """Checks the config files among the words, then parses them; raises ConfigError."""
        words = list(args or [])
        if self.takes_config_first and words and not words[0].startswith("-"):
            words[:1] = ["--config", words[0]]
        self.words = tuple(words)
        self.with_lists(words)
        for place in config_places(words):
            path = config_file(words[place].removeprefix("--config="))
            check_config_file(path)
            words[place] = f"--config={path}" if words[place].startswith("--config=") else str(path)
        return super().parse_args(words, *others, **named)

    def with_lists(self, words: list[str]) -> None:
        """Puts one value of a setting that takes a list into brackets, in place: `--data.path data/owt`."""
        for key in list_keys():
            for place, word in enumerate(words):
                if word == f"--{key}" and place + 1 < len(words):
                    words[place + 1] = _in_brackets(key, words[place + 1])
                elif word.startswith(f"--{key}="):
                    words[place] = f"--{key}={_in_brackets(key, word.removeprefix(f'--{key}='))}"

    def actions(self) -> list[Action]:
        """Returns the declared arguments, as argparse's actions."""
        return list(self._actions)

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Raises the parser's message as a ConfigError of one line; argparse would print usage and exit."""
        flags = [flag.lstrip("-") for action in self.actions() for flag in action.option_strings]
        raise ConfigError(one_line(message, flags)) from ex


def config_places(words: Sequence[str]) -> list[int]:
    """Returns the positions of the words that name a config file: after --config, or --config=FILE itself."""
    after = [place + 1 for place, word in enumerate(words[:-1]) if word == "--config"]
    return sorted(after + [place for place, word in enumerate(words) if word.startswith("--config=")])


def add_run_config(parser: ArgumentParser) -> None:
    """Adds --config FILE and a flag for every field of `RunConfig` to a parser."""
    parser.add_argument("--config", action="config", help="YAML file with the settings of the run")
    parser.add_class_arguments(RunConfig, None, as_group=True)


def run_config_from_namespace(parser: ArgumentParser, namespace: Any) -> RunConfig:
    """Returns the RunConfig of parsed flags, with rate and decay converted if a flag changed the config's optimizer.

    A conversion is reported on stderr by the first process; see `optimizer_switch.switched`.
    """
    config = flags_as_given(parser, namespace)
    words = list(parser.words) if isinstance(parser, UserParser) else []
    files = [words[place].removeprefix("--config=") for place in config_places(words)]
    names = [re.match(r"--optimizer(?:\.(\w+))?(?:=|$)", word) for word in words]
    given = {match[1] or "" for match in names if match}  # "": --optimizer with all of the group
    if (note := unused(config.optimizer.name, given)) and rank_from_env() == 0:
        say(note)
    if "name" not in given or "" in given:
        return config
    before, where = RunConfig(), "the default config"
    if files:
        path = config_file(files[-1])
        before, where = load_config(path), shipped_name(path) or files[-1]
    optimizer, note = switched(before.optimizer, config.optimizer, given, where)
    if note and rank_from_env() == 0:
        say(note)
    return dataclasses.replace(config, optimizer=optimizer)


def flags_as_given(parser: ArgumentParser, namespace: Any) -> RunConfig:
    """Returns the RunConfig of parsed flags without any conversion."""
    built = parser.instantiate(namespace)
    names = {f.name for f in dataclasses.fields(RunConfig)}
    return RunConfig(**{name: built[name] for name in names})


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Reads a RunConfig from a YAML file.

    Args:
        path: the file.
        overrides: dotted flags that replace its values, such as `["--optimizer.lr", "1e-5"]`.

    Raises:
        ConfigError: the file is missing, or a key or value is invalid; the message names the key.
    """
    parser = UserParser(exit_on_error=False)
    add_run_config(parser)
    try:
        namespace = parser.parse_args(["--config", str(path), *(overrides or [])])
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(one_line(f"{path}: {error}")) from error
    return flags_as_given(parser, namespace)


def save_config(config: RunConfig, path: Path) -> None:
    """Writes the resolved settings as YAML, atomically and with fsync: without them, no checkpoint can be loaded.

    Raises:
        StorageError: the file system refused.
    """
    write_whole(path, dump_config(config).encode())


def dump_config(config: RunConfig) -> str:
    """Returns the YAML text of a config; `load_config` of that text gives an equal config."""
    plain = _plain(dataclasses.asdict(config))
    return yaml.dump(plain, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Quotes text that looks like a number: PyYAML reads 1e-4 as text, but jsonargparse reads it as a number."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    try:
        float(text)
    except ValueError:
        return dumper.represent_str(text)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="'")


_Dumper.add_representer(str, _represent_text)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def check_config_file(path: Path) -> None:
    """Rejects a YAML file with unknown or duplicate keys; YAML readers silently accept duplicates.

    Raises:
        ConfigError: the message has one line for each problem, with file, line and key.
    """
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader)
    except FileNotFoundError as error:
        raise ConfigError(
            f"config file {path} does not exist; give a YAML file, or the name of a shipped config: {', '.join(shipped_configs())}"
        ) from error
    except yaml.YAMLError as error:
        if path.suffix in TEXT_ENDINGS:
            raise _no_config(path) from error
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', error)}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    if not isinstance(root, yaml.MappingNode):
        raise (
            _no_config(path)
            if path.suffix in TEXT_ENDINGS
            else ConfigError(f"{path}: expected settings as 'key: value'")
        )
    if problems := _key_problems(root, ""):
        if path.suffix in TEXT_ENDINGS:
            raise _no_config(path)
        raise ConfigError("\n".join(f"{path}, {problem}" for problem in problems))


def _no_config(path: Path) -> ConfigError:
    return ConfigError(
        f"{path}: is no config; `megatron-lion pretrain --text {shlex.quote(str(path))}` trains on a text"
    )


def _key_problems(node: yaml.MappingNode, prefix: str) -> list[str]:
    problems: list[str] = []
    seen: set[str] = set()
    known = known_keys()
    sections = {key.split(".")[0] for key in known if "." in key}
    for key_node, value in node.value:
        key = f"{prefix}{key_node.value}"
        line = f"line {key_node.start_mark.line + 1}: "
        if key in seen:
            problems.append(f"{line}key '{key}' is given twice")
        elif key not in known:
            problems.append(f"{line}there is no key '{key}'{suggestion(key)}")
        elif key in sections and isinstance(value, yaml.MappingNode):
            problems += _key_problems(value, key + ".")
        elif key in sections:
            problems.append(f"{line}{key} is a group of settings; give it as '{key}:' and its keys below, indented")
        seen.add(key)
    return problems


def known_keys() -> list[str]:
    """Returns every dotted key of a config, such as "optimizer.lr", and the names of its groups."""
    keys: list[str] = []
    for section in dataclasses.fields(RunConfig):
        kind = section.default_factory
        if dataclasses.is_dataclass(kind):
            keys += [f"{section.name}.{inner.name}" for inner in dataclasses.fields(kind)]
        keys.append(section.name)
    return keys


def suggestion(key: str) -> str:
    """Returns " (did you mean …?)" for an unknown key of a config, or "" if none is similar."""
    return hint(key, known_keys())


def one_line(message: str, known: Sequence[str] = ()) -> str:
    """Shortens a parser's message to one line in plain words; for an unknown key or flag, suggests what was meant.

    Args:
        message: the text of a parser's exception.
        known: the parser's flags without dashes.
    """
    text = " ".join(part.strip() for part in message.splitlines() if part.strip())
    text = re.sub(r'^Parser key "([^"]+)"(?: element \d+)?:\s*', r"\1: ", text)
    union = re.search(
        r"Does not validate against any of the Union subtypes Subtypes: \[(.*?)\] Errors:.*Given value: (.*)$", text
    )
    if union:
        kinds = " or ".join(re.split(r", (?=<class|typing|\w+\[)", union[1]))
        text = f"{text[: union.start()]}Expected {kinds}. Got value: {union[2]}"
    text = re.sub(r"typing\.Literal\[(.*?)\]", r"one of \1", re.sub(r"<class '(\w+)'>", r"\1", text))
    text = re.sub(r"Expected an? ", "expected ", text).replace("Expected ", "expected ").replace("NoneType", "null")
    text = re.sub(r"\. Got value: ", ", given ", text)
    if re.search(r"expected str, given \{", text):
        text += "; put text that contains ': ' in quotes"
    flags = re.match(r"[Uu]nrecognized arguments?: (.*)$", text)
    if flags:
        words = flags[1].split()
        named = [word.partition("=")[0] for word in words if word.startswith("-")]
        if not named:
            inputs = f"; inputs are given as --input {' '.join(words)}" if "input" in known else ""
            return f"unexpected word{'s' * (len(words) > 1)}: {' '.join(words)}{inputs}"
        return f"unknown flag {', '.join(flag + hint(flag.lstrip('-'), known, '--') for flag in named)}"
    if rewritten := other_words(text, known):
        return rewritten
    unknown = re.search(r"(?:[Kk]ey|Option) ['\"]?(?:--)?([\w.]+)['\"]?", text)
    return text + hint(unknown[1], known) if unknown else text
