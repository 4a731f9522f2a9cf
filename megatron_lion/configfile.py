"""YAML files and dotted flags to a checked `RunConfig`, and back: one line for every mistake, before torch is imported."""

from __future__ import annotations

import dataclasses
import difflib
import re
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from megatron_lion.config import RunConfig
from megatron_lion.errors import ConfigError

set_parsing_settings(docstring_parse_attribute_docstrings=True)


class UserParser(ArgumentParser):
    """A parser whose mistakes are ConfigErrors instead of a usage page and an exit."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        raise ConfigError(one_line(message)) from ex


def add_run_config(parser: ArgumentParser) -> None:
    """Gives a parser --config FILE and a flag for every field of `RunConfig`."""
    parser.add_argument("--config", action="config", help="YAML file with the settings of the run")
    parser.add_class_arguments(RunConfig, None, as_group=True)


def run_config_from_namespace(parser: ArgumentParser, namespace: Any) -> RunConfig:
    """Builds the frozen dataclasses from parsed flags."""
    built = parser.instantiate_classes(namespace)
    names = {f.name for f in dataclasses.fields(RunConfig)}
    return RunConfig(**{name: built[name] for name in names})


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Reads a YAML file, with dotted overrides such as `["--optimizer.lr", "1e-5"]`.

    Raises:
        ConfigError: the file is missing or a key or value is not possible; names the key.
    """
    if not Path(path).is_file():
        raise ConfigError(f"config file {path} does not exist")
    check_duplicate_keys(Path(path))
    parser = UserParser(exit_on_error=False)
    add_run_config(parser)
    try:
        namespace = parser.parse_args(["--config", str(path), *(overrides or [])])
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(one_line(f"{path}: {error}")) from error
    return run_config_from_namespace(parser, namespace)


def save_config(config: RunConfig, path: Path) -> None:
    """Writes the resolved settings as YAML, atomically."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(dump_config(config))
    temporary.replace(path)


def dump_config(config: RunConfig) -> str:
    """YAML text of a config; reading it back gives the same config."""
    plain = _plain(dataclasses.asdict(config))
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def check_duplicate_keys(path: Path) -> None:
    """Refuses a YAML file that gives a key twice, which YAML readers otherwise resolve in silence."""

    class Loader(yaml.SafeLoader):
        pass

    def mapping(loader: yaml.SafeLoader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = loader.construct_object(key_node, deep=deep)
            if key in seen:
                raise ConfigError(f"{path}, line {key_node.start_mark.line + 1}: key '{key}' is given twice")
            seen.add(key)
        return yaml.SafeLoader.construct_mapping(loader, node, deep=deep)

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', error)}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    if content is not None and not isinstance(content, dict):
        raise ConfigError(f"{path}: expected settings as 'key: value', found a {type(content).__name__}")


def known_keys() -> list[str]:
    """Every dotted key of a config."""
    keys: list[str] = []
    for section in dataclasses.fields(RunConfig):
        kind = section.default_factory
        if dataclasses.is_dataclass(kind):
            keys += [f"{section.name}.{inner.name}" for inner in dataclasses.fields(kind)]
        keys.append(section.name)
    return keys


def one_line(message: str) -> str:
    """Shortens a parser's message to a line, with the key, and suggests the key that was probably meant."""
    text = " ".join(part.strip() for part in message.splitlines() if part.strip())
    text = re.sub(r'^Parser key "([^"]+)":\s*', r"\1: ", text)
    unknown = re.search(
        r"(?:[Uu]nrecognized arguments?:|Key|key|Option) ['\"]?(?:--)?([\w.]+)['\"]?(?: is not expected|.*not accepted|=|\s|$)",
        text,
    )
    if unknown:
        close = difflib.get_close_matches(unknown[1], known_keys(), n=1, cutoff=0.6)
        if not close:
            close = [k for k in known_keys() if k.split(".")[-1] == unknown[1].split(".")[-1]][:1]
        if close and close[0] != unknown[1]:
            text += f" (did you mean {close[0]}?)"
    return text
