"""Reads the files beside a vocabulary: tokenizer_config.json, added_tokens.json and special_tokens_map.json.

Beside vocab.txt or vocab.json + merges.txt, they complete the tokenizer by the rules of transformers' fast tokenizers.
A tokenizer.json is complete, so the files beside it must not contradict it.
"""

from __future__ import annotations

import json
from collections.abc import Container
from dataclasses import dataclass
from typing import Any

from megatron_lion.errors import DataError

CONFIG, ADDED, SPECIAL_MAP = "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"
SIDE_FILES = (CONFIG, ADDED, SPECIAL_MAP)
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTS = ("additional_special_tokens", "extra_special_tokens")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
# Classes of transformers that use a tokenizer.json unchanged and ignore the settings beside it.
_TAKE_IT_AS_IT_IS = (None, "PreTrainedTokenizer", "TokenizersBackend")
# Classes that build their tokenizer from a vocabulary as BERT or GPT-2, without "Fast" at the end of the name.
BERT_CLASSES = ("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer", "MobileBertTokenizer")
GPT2_CLASSES = ("GPT2Tokenizer",)
KNOWN_CLASSES = (*_TAKE_IT_AS_IT_IS, *BERT_CLASSES, *GPT2_CLASSES)
# Tokens that such a class has unless a file names others.
_BERT_ROLES = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}
_GPT2_ROLES = dict.fromkeys(("unk_token", "bos_token", "eos_token"), "<|endoftext|>")


# Settings of a pre-tokenizer or model that cannot change a token id. Some library versions write them and some do not,
# so they must not change the hash.
_WITHOUT_EFFECT = frozenset({"trim_offsets", "dropout"})


@dataclass(frozen=True)
class SideSettings:
    """Settings and tokens from the side files.

    Attributes:
        where: name of the source, for messages.
        values: content of tokenizer_config.json.
        named: special tokens by their role, such as "eos_token".
        extra: special tokens without a role.
        added: added tokens, as `added_tokens` of a tokenizer.json, sorted by id.
        origin: name of the file that lists the added tokens.
    """

    where: str
    values: dict[str, Any]
    named: dict[str, str]
    extra: list[str]
    added: list[dict[str, Any]]
    origin: str

    def flag(self, name: str, default: bool | None) -> bool | None:
        """Returns a setting of tokenizer_config.json that must be true or false.

        Args:
            name: the setting.
            default: value of an absent setting; if it is None, null is allowed too.

        Raises:
            DataError: the value is not allowed.
        """
        value = self.values.get(name, default)
        if value is None and default is None:
            return None
        if not isinstance(value, bool):
            raise DataError(f"{self.where}: {CONFIG}: {name} must be true or false, got {value!r}")
        return value

    @property
    def class_name(self) -> str | None:
        """The class of transformers that tokenizer_config.json names, without "Fast" at its end; None without one.

        Raises:
            DataError: the value is not a text.
        """
        name = self.values.get("tokenizer_class")
        return None if name is None else _content(name, f"{self.where}: {CONFIG}: tokenizer_class").removesuffix("Fast")

    def check_class(self, built: tuple[str, ...], files: str) -> None:
        """Rejects a class whose tokenizer is not one of those that this project builds from a vocabulary.

        Args:
            built: the classes that are built.
            files: names of the vocabulary files, for the message.

        Raises:
            DataError: tokenizer_config.json names another class, or an option of a slow tokenizer.
        """
        if self.class_name not in (*_TAKE_IT_AS_IT_IS, *built):
            raise DataError(
                f"{self.where}: {CONFIG} names the class {self.class_name}, but from {files} only {built[0]} is built; write its "
                "tokenizer.json: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(COPY)"
            )
        for name, usual in (("clean_text", True), ("wordpieces_prefix", "##"), ("do_basic_tokenize", True)):
            if self.values.get(name, usual) != usual:
                raise DataError(f"{self.where}: {CONFIG}: {name} {self.values[name]!r} is not supported; {usual!r} is")

    def added_to(self, vocab: dict[str, int], own: list[dict[str, Any]], built: str) -> list[dict[str, Any]]:
        """Returns the added tokens of a tokenizer: those of the side files, and those of `own` that are not there.

        A token that has a role is special, whatever the files state of it, as in transformers.

        Args:
            vocab: ids of the vocabulary by token.
            own: special tokens of the vocabulary, as `added_tokens` of a tokenizer.json.
            built: the class that is built; its tokens for roles that no file names have a role too.

        Raises:
            DataError: a token of the side files has another id in the vocabulary, or a special token has no id.
        """
        for token in self.added:
            if vocab.get(token["content"], token["id"]) != token["id"]:
                raise DataError(
                    f"{self.where}: {self.origin} gives {token['content']!r} the id {token['id']}, but the vocabulary "
                    f"gives it {vocab[token['content']]}; use files of one tokenizer"
                )
        listed = {token["content"] for token in self.added}
        self.check_named({*vocab, *listed})
        roles = {**(_GPT2_ROLES if built in GPT2_CLASSES else _BERT_ROLES), **self.named}
        special = {*roles.values(), *self.extra}
        added = [{**token, "special": token["special"] or token["content"] in special} for token in self.added]
        both = [*(token for token in own if token["content"] not in listed), *added]
        return sorted(both, key=lambda token: token["id"])

    def check_named(self, known: Container[str]) -> None:
        """Rejects special tokens without an id; transformers would append them to the vocabulary.

        Args:
            known: all tokens that have an id.

        Raises:
            DataError: a named token is not in `known`.
        """
        for role, content in (*self.named.items(), *(("an extra special token", content) for content in self.extra)):
            if content not in known:
                raise DataError(
                    f"{self.where}: the files beside the vocabulary name {content!r} ({role}), which has no id; list it in {ADDED}, or "
                    "remove it, in a copy of the folder"
                )

    def check(self, definition: dict[str, Any]) -> None:
        """Rejects side files that contradict a tokenizer.json.

        Some classes and versions of transformers would use the side files instead.

        Args:
            definition: the parsed tokenizer.json.

        Raises:
            DataError: a setting or an added token differs; the message names the file and the setting.
        """
        if self.class_name not in _TAKE_IT_AS_IT_IS:
            self._check_settings(definition)
        vocab = definition["model"]["vocab"]
        ids = dict(vocab) if isinstance(vocab, dict) else {row[0]: index for index, row in enumerate(vocab)}
        own = {token["content"]: token for token in definition.get("added_tokens") or []}
        ids |= {content: token["id"] for content, token in own.items()}
        for token in self.added:
            content = token["content"]
            if ids.get(content) != token["id"]:
                other = f"id {ids[content]}" if content in ids else "no such token"
                self._differs(self.origin, f"{content!r} with id {token['id']}", other)
            # A token of the vocabulary alone is a word of the model, as a special one inside a document is.
            found = bool(own[content].get("special")) if content in own else True
            if token["special"] != found:
                other = f"special {_word(found)}" if content in own else "it only in the vocabulary"
                self._differs(self.origin, f"special {_word(token['special'])} for {content!r}", other)
            for flag in ("single_word", "lstrip", "rstrip", "normalized") if content in own and not found else ():
                value = bool(own[content].get(flag))
                if token[flag] != value:
                    self._differs(self.origin, f"{flag} {_word(token[flag])} for {content!r}", _word(value))
        self.check_named(ids)

    def _check_settings(self, definition: dict[str, Any]) -> None:
        normalizer, splitter = definition.get("normalizer") or {}, definition.get("pre_tokenizer") or {}
        if normalizer.get("type") == "BertNormalizer":
            lowercase = normalizer.get("lowercase", True)
            stripped = normalizer.get("strip_accents")
            found = {"do_lower_case": lowercase, "tokenize_chinese_chars": normalizer.get("handle_chinese_chars", True),
                     "strip_accents": lowercase if stripped is None else stripped}  # fmt: skip
            for name, value in found.items():
                given = self.flag(name, None)
                if given is not None and given != value:
                    self._differs(CONFIG, f"{name} {_word(given)}", _word(value))
        if splitter.get("type") == "ByteLevel":
            given, value = self.flag("add_prefix_space", None), bool(splitter.get("add_prefix_space", True))
            if given is not None and given != value:
                self._differs(CONFIG, f"add_prefix_space {_word(given)}", _word(value))
        for part, steps in self._steps_of_class().items():
            if meaning(definition.get(part)) != meaning(steps):
                raise DataError(
                    f"{self.where}: {CONFIG} names the class {self.values['tokenizer_class']}, which sets {part} to "
                    f"{json.dumps(steps)}, but that of tokenizer.json differs; if tokenizer.json is right, set tokenizer_class to "
                    "PreTrainedTokenizerFast in a copy of the folder"
                )

    def _steps_of_class(self) -> dict[str, Any]:
        """Returns the steps before the model that transformers 5 builds from these settings; {} for other classes."""
        if self.class_name in GPT2_CLASSES:
            prefix = bool(self.flag("add_prefix_space", False))
            return {"normalizer": None, "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": prefix}}
        if self.class_name in BERT_CLASSES:
            normalizer = {"type": "BertNormalizer", "clean_text": True, "lowercase": self.flag("do_lower_case", True),
                          "handle_chinese_chars": self.flag("tokenize_chinese_chars", True),
                          "strip_accents": self.flag("strip_accents", None)}  # fmt: skip
            return {"normalizer": normalizer, "pre_tokenizer": {"type": "BertPreTokenizer"}}
        return {}

    def _differs(self, file: str, what: str, other: str) -> None:
        raise DataError(
            f"{self.where}: {file} has {what}, but tokenizer.json has {other}; correct one of them in a copy of the folder"
        )


def side_settings(files: dict[str, bytes], where: str) -> SideSettings:
    """Reads the side files.

    added_tokens.json and special_tokens_map.json are older forms of `added_tokens_decoder` in tokenizer_config.json. If
    that key is present, transformers ignores both files, and so does this function.

    Args:
        files: contents by name; files with other names are ignored.
        where: name of the source, for messages.

    Raises:
        DataError: a file is not a JSON object, or one of its tokens or ids is invalid.
    """
    values = parse_json(files[CONFIG], f"{where}: {CONFIG}") if CONFIG in files else {}
    decoder = values.get("added_tokens_decoder")
    texts = dict(values)
    if decoder is None and SPECIAL_MAP in files:
        texts |= parse_json(files[SPECIAL_MAP], f"{where}: {SPECIAL_MAP}")
        if texts.get(_LISTS[0]) and texts[_LISTS[0]] != values.get(_LISTS[0]):
            raise DataError(
                f"{where}: {SPECIAL_MAP} has {_LISTS[0]}, which transformers 4 and 5 read differently; list the tokens under that key "
                f"of {CONFIG} too, in a copy of the folder"
            )
    file = {name: SPECIAL_MAP if texts[name] is not values.get(name) else CONFIG for name in texts}
    # transformers takes every key of this form for a special token.
    roles = (*_NAMED, *(name for name, value in texts.items() if name.endswith("_token") and isinstance(value, str)))
    named = {
        name: _content(texts[name], f"{where}: {file[name]}: {name}") for name in roles if texts.get(name) is not None
    }
    lists = [item for name in _LISTS for item in _items(texts.get(name))]
    extra = [_content(item, f"{where}: a token of {' or '.join(_LISTS)}") for item in lists]
    if decoder is not None:
        return SideSettings(where, values, named, extra, _decoded(decoder, where), CONFIG)
    special = {*named.values(), *extra}
    added = []
    if ADDED in files:
        for content, index in parse_json(files[ADDED], f"{where}: {ADDED}").items():
            is_special = content in special
            added.append(
                _entry(content, index, {"normalized": not is_special, "special": is_special}, f"{where}: {ADDED}")
            )
    return SideSettings(where, values, named, extra, sorted(added, key=lambda token: token["id"]), ADDED)


def meaning(value: Any, *, as_before: bool = False) -> Any:
    """Returns a part of a definition without the entries that cannot change an id, so that equal meanings are equal.

    It removes entries that are unset, false or without effect: an absent entry and its default must hash alike.

    `use_regex` and `split` default to true, so only false is kept.
    """
    if isinstance(value, list):
        return [meaning(item, as_before=as_before) for item in value]
    if not isinstance(value, dict):
        return value
    kept = {
        key: meaning(item, as_before=as_before)
        for key, item in value.items()
        if key not in {*_WITHOUT_EFFECT, "use_regex"}
    }
    kept = {key: item for key, item in kept.items() if item or (item == 0 and item is not False)}
    for key in ("use_regex",) if as_before else ("use_regex", "split"):
        if value.get(key) is False:
            kept[key] = False
    # `strip_accents` defaults to the value of `lowercase`.
    if not as_before and value.get("strip_accents") is False and value.get("lowercase"):
        kept["strip_accents"] = False
    return kept


def _items(value: Any) -> list[Any]:
    """Returns the tokens of a list, or of an object from roles to tokens, as newer versions of transformers write."""
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


def _decoded(decoder: Any, where: str) -> list[dict[str, Any]]:
    name = f"{where}: {CONFIG}: added_tokens_decoder"
    if not isinstance(decoder, dict):
        raise DataError(f"{name} must be an object that maps ids to tokens, got {type(decoder).__name__}")
    added = []
    for key, token in decoder.items():
        if not key.isascii() or not key.isdigit() or not isinstance(token, dict):
            raise DataError(f"{name}: {key!r} must be an id, and its value an object such as {{'content': '<x>'}}")
        added.append(_entry(token.get("content"), int(key), {"normalized": not token.get("special"), **token}, name))
    return sorted(added, key=lambda token: token["id"])


def _entry(content: Any, index: Any, flags: dict[str, Any], where: str) -> dict[str, Any]:
    """Returns a token as a tokenizer.json lists it."""
    if not isinstance(content, str) or not content or type(index) is not int or index < 0:
        raise DataError(
            f"{where}: token {content!r} with id {index!r}; a text that is not empty and an integer of at least 0 are needed"
        )
    found = {name: flags.get(name, False) for name in _FLAGS}
    wrong = next((name for name, value in found.items() if not isinstance(value, bool)), None)
    if wrong:
        raise DataError(f"{where}: {wrong} of {content!r} must be true or false, got {found[wrong]!r}")
    return {"id": index, "content": content, **found}


def _content(value: Any, name: str) -> str:
    content = value.get("content") if isinstance(value, dict) else value
    if not isinstance(content, str):
        raise DataError(f"{name} must be a text, got {value!r}")
    return content


def _word(value: bool) -> str:
    return "true" if value else "false"


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """Parses a JSON object; raises a DataError with the line of a syntax error."""
    try:
        value = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: byte {error.start} is not UTF-8; is this the right file?") from None
    except (json.JSONDecodeError, RecursionError) as error:
        line = f" line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(f"{where}:{line} not JSON ({error}); is this the right file?") from None
    if not isinstance(value, dict):
        raise DataError(f"{where}: a JSON object is needed, got {type(value).__name__}")
    return value
