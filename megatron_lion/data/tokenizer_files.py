"""Reads and checks a tokenizer's files, converts them to one definition and hashes it.

Three forms are read:

- GPT-2's pair `vocab.json` + `merges.txt`, also named `gpt2-vocab.json` + `gpt2-merges.txt` or `encoder.json` +
  `vocab.bpe`;
- BERT's `vocab.txt`; if a file is given, any name that ends in .txt;
- Hugging Face's single `tokenizer.json`.

All become one *definition*, the dictionary that `tokenizers` serialises. The rest of the project does not depend on the
form.
"""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import orjson

from megatron_lion.data.bert_vocab import (
    SPECIAL_TOKENS,
    is_cased,
    parse_wordpieces,
    special_tokens,
    wordpiece_definition,
)
from megatron_lion.data.tokenizer_settings import (
    BERT_CLASSES,
    CONFIG,
    GPT2_CLASSES,
    SIDE_FILES,
    SideSettings,
    meaning,
    parse_json,
    side_settings,
)
from megatron_lion.errors import DataError

PAIRS = (("vocab.json", "merges.txt"), ("gpt2-vocab.json", "gpt2-merges.txt"), ("encoder.json", "vocab.bpe"))
SINGLE = "tokenizer.json"
WORDPIECES = "vocab.txt"
WANTED = "a folder with vocab.json + merges.txt, vocab.txt or tokenizer.json, one of these files, or hf:NAME"


def read_files(source: Path) -> dict[str, bytes]:
    """Reads the files of the tokenizer at `source`, under their canonical names.

    Args:
        source: a folder, or any of the tokenizer's files.

    Returns:
        Contents by name: {"tokenizer.json": …}, {"vocab.json": …, "merges.txt": …} or {"vocab.txt": …}, together with
        the `tokenizer_settings.SIDE_FILES` that the folder contains.

    Raises:
        DataError: there is no tokenizer, one file of a pair is missing, or a file cannot be read.
    """
    folder = source if source.is_dir() else source.parent
    candidates: list[tuple[str, ...]] = [(SINGLE,), *PAIRS, (WORDPIECES,)]
    if not source.is_dir():
        candidates = [names for names in candidates if source.name in names] or [(source.name,)]
    for names in candidates:
        if not (folder / names[0]).is_file() and not (folder / names[-1]).is_file():
            continue
        lacking = [name for name in names if not (folder / name).is_file()]
        if lacking:
            raise DataError(f"{folder}: {lacking[0]} is missing beside the tokenizer's other file; needed: {WANTED}")
        single = WORDPIECES if names[0].endswith(".txt") else SINGLE
        canonical = (single,) if len(names) == 1 else PAIRS[0]
        found = {new: read_bytes(folder / name) for new, name in zip(canonical, names, strict=True)}
        return found | {name: read_bytes(folder / name) for name in SIDE_FILES if (folder / name).is_file()}
    raise DataError(f"{source}: contains no tokenizer; needed: {WANTED}")


def read_bytes(path: Path) -> bytes:
    """Returns the content of a file; raises a DataError that names the file if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def build_definition(files: dict[str, bytes], where: str, *, as_before: bool = False) -> dict[str, Any]:
    """Converts the files to the definition that `tokenizers.Tokenizer.from_str` accepts.

    Truncation, padding, BPE dropout and the post-processor (which adds special tokens) are switched off: encoding must
    depend on the text alone.

    Args:
        files: contents by name, from `read_files`.
        where: name of the source, for messages.
        as_before: whether to read only `do_lower_case` from the side files, as earlier versions did.

    Raises:
        DataError: a file has the wrong content; the message names the file and, if possible, the line.
    """
    side = side_settings({} if as_before else files, where)
    if SINGLE in files:
        definition = parse_json(files[SINGLE], f"{where}: {SINGLE}")
        model = definition.get("model")
        if not isinstance(model, dict) or "vocab" not in model:
            raise DataError(f"{where}: {SINGLE} has no model with a vocabulary; needed: {WANTED}")
        model["dropout"] = None
        definition |= {"truncation": None, "padding": None, "post_processor": None}
        side.check(definition)
        return definition
    if WORDPIECES in files:
        side.check_class(BERT_CLASSES, WORDPIECES)
        unknown = side.named.get("unk_token", "[UNK]")
        path = where if where.endswith(".txt") else f"{where}: {WORDPIECES}"
        pieces = parse_wordpieces(files[WORDPIECES], path)
        added = side.added_to(pieces, special_tokens(pieces), BERT_CLASSES[0])
        if unknown not in pieces:
            raise DataError(f"{path}: {unknown} is missing; a BERT vocabulary has {', '.join(SPECIAL_TOKENS)}")
        return wordpiece_definition(
            pieces,
            lowercase=_lowercase(files, side, pieces, as_before),
            strip_accents=side.flag("strip_accents", None),
            chinese_characters=bool(side.flag("tokenize_chinese_chars", True)),
            unknown=unknown,
            added=added,
        )
    side.check_class(GPT2_CLASSES, "vocab.json and merges.txt")
    vocab = parse_vocab(files["vocab.json"], f"{where}: vocab.json")
    merges = parse_merges(files["merges.txt"], vocab, f"{where}: merges.txt")
    prefix = bool(side.flag("add_prefix_space", False))
    byte_level = {"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": side.added_to(vocab, [], GPT2_CLASSES[0]),
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }


def _lowercase(files: dict[str, bytes], side: SideSettings, vocab: dict[str, int], as_before: bool) -> bool:
    """Returns whether words are lowercased: by do_lower_case, else if the vocabulary has no capital letters."""
    if as_before:  # any value was taken for true or false
        config = parse_json(files[CONFIG], CONFIG) if CONFIG in files else {}
        return bool(config.get("do_lower_case", not is_cased(vocab)))
    given = side.flag("do_lower_case", None)
    return not is_cased(vocab) if given is None else given


def saved_files(
    files: dict[str, bytes], definition: dict[str, Any], eod_token: str | None, where: str
) -> dict[str, bytes]:
    """Returns the files of a saved tokenizer by name: the vocabulary, a complete tokenizer.json, tokenizer_config.json.

    Some versions of the transformers classes named in tokenizer_config.json read settings from that file instead of
    tokenizer.json, so both files contain them.

    Args:
        files: contents from which the tokenizer was built.
        definition: the definition, from `build_definition`.
        eod_token: the end-of-document token, or None.
        where: name of the source, for messages.
    """
    side = side_settings(files, where)
    config = {**side.values, **side.named}
    built = (*BERT_CLASSES, *GPT2_CLASSES)
    if SINGLE in files and side.class_name not in built:
        # Newer versions of transformers build other classes from the vocabulary and ignore steps of tokenizer.json.
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    elif side.class_name not in built:
        config["tokenizer_class"] = "BertTokenizer" if WORDPIECES in files else "GPT2Tokenizer"
    normalizer, splitter = definition.get("normalizer") or {}, definition.get("pre_tokenizer") or {}
    if normalizer.get("type") == "BertNormalizer":
        config["do_lower_case"] = normalizer["lowercase"]
        config["tokenize_chinese_chars"] = normalizer["handle_chinese_chars"]
        config["strip_accents"] = normalizer["strip_accents"]
    if splitter.get("type") == "ByteLevel":
        config["add_prefix_space"] = splitter["add_prefix_space"]
    added = {
        str(token["id"]): {key: token[key] for key in token if key != "id"} for token in definition["added_tokens"]
    }
    if added:
        config["added_tokens_decoder"] = added
    if eod_token is not None:
        config["eos_token"] = eod_token
    contents = {CONFIG: _json_bytes(config, sort_keys=True), SINGLE: files.get(SINGLE, b"")}
    if SINGLE not in files:
        contents[SINGLE] = _json_bytes({**definition, "post_processor": _post_processor(definition, side.named)})
    if config["tokenizer_class"].removesuffix("Fast") in built:
        contents |= _vocabulary_files(definition)
    return contents


def _vocabulary_files(definition: dict[str, Any]) -> dict[str, bytes]:
    """Returns the vocabulary files that Megatron-LM and older versions of transformers read; {} if none can hold it."""
    model = definition["model"]
    vocab: dict[str, int] = model["vocab"]
    tokens = sorted(vocab, key=vocab.__getitem__)
    if model["type"] == "WordPiece":
        whole = [vocab[token] for token in tokens] == list(range(len(tokens))) and not any(
            "\n" in token for token in tokens
        )
        return {WORDPIECES: "".join(f"{token}\n" for token in tokens).encode("utf-8")} if whole else {}
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    lines = "\n".join(["#version: 0.2", *merges, ""])
    return dict(
        zip(PAIRS[0], (json.dumps(vocab, ensure_ascii=False).encode("utf-8"), lines.encode("utf-8")), strict=True)
    )


def _json_bytes(value: dict[str, Any], sort_keys: bool = False) -> bytes:
    # As json.dumps(indent=2) writes it, which takes half a second for GPT-2's vocabulary, because it is Python code.
    options = orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE | (orjson.OPT_SORT_KEYS if sort_keys else 0)
    return orjson.dumps(value, option=options)


def _post_processor(definition: dict[str, Any], named: dict[str, str]) -> dict[str, Any] | None:
    """Returns a post-processor that adds [CLS] and [SEP] for BERT, nothing for GPT-2; None if such a token is missing."""
    if definition["model"]["type"] != "WordPiece":
        return {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    first, last = named.get("cls_token", "[CLS]"), named.get("sep_token", "[SEP]")
    ids = {**definition["model"]["vocab"], **{token["content"]: token["id"] for token in definition["added_tokens"]}}
    if not {first, last} <= ids.keys():
        return None

    def special(name: str, kind: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": name, "type_id": kind}}

    one = [special(first, 0), {"Sequence": {"id": "A", "type_id": 0}}, special(last, 0)]
    return {
        "type": "TemplateProcessing", "single": one, "pair": [*one, {"Sequence": {"id": "B", "type_id": 1}}, special(last, 1)],
        "special_tokens": {name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in (first, last)},
    }  # fmt: skip


def check_complete(definition: dict[str, Any], where: str) -> None:
    """Rejects a tokenizer that cannot encode every text.

    With such a tokenizer, the library fails in the middle of a corpus or drops characters.

    Args:
        definition: from `build_definition`.
        where: name of the source, for messages.

    Raises:
        DataError: the unknown token is not in the vocabulary; or there is no unknown token and some byte has no token.
    """
    model, vocab = definition["model"], definition["model"]["vocab"]
    kind = model.get("type") or "BPE"
    tokens = set(vocab if isinstance(vocab, dict) else (row[0] for row in vocab))
    if model.get("byte_fallback") and {f"<0x{byte:02X}>" for byte in range(256)} <= tokens:
        return
    if kind == "Unigram":
        if model.get("unk_id") is None:
            raise DataError(f"{where}: the {kind} model has no unk_id, so an unknown character has no id; set unk_id")
        return
    unknown = model.get("unk_token")
    if unknown is not None:
        if unknown not in tokens:
            raise DataError(
                f"{where}: the {kind} model's unknown token {unknown!r} is not in its vocabulary, so an unknown "
                f"{'character' if kind == 'BPE' else 'word'} has no id; add the token to the vocabulary"
            )
        return
    byte_level = any(_has_type(definition.get(part), "ByteLevel") for part in ("normalizer", "pre_tokenizer"))
    if not (byte_level and set(byte_letters()) <= tokens):
        raise DataError(
            f"{where}: the {kind} model has neither an unknown token nor all 256 bytes, so it would silently drop "
            "characters; set unk_token, or train it with the whole byte alphabet"
        )


def _has_type(value: Any, wanted: str) -> bool:
    """Whether a part of a definition has a type, or contains a part that has it."""
    if isinstance(value, list):
        return any(_has_type(item, wanted) for item in value)
    if not isinstance(value, dict):
        return False
    return value.get("type") == wanted or any(_has_type(item, wanted) for item in value.values())


def parse_vocab(data: bytes, where: str) -> dict[str, int]:
    """Parses GPT-2's vocab.json into a dictionary from token to id.

    Raises:
        DataError: an id is no integer from 0, two tokens share an id, or one of the 256 byte letters is missing.
    """
    vocab = parse_json(data, where)
    for token, index in vocab.items():
        if type(index) is not int or index < 0:
            raise DataError(f"{where}: token {token!r} has id {index!r}; an integer of at least 0 is needed")
    if len(set(vocab.values())) != len(vocab):
        raise DataError(f"{where}: two tokens share an id; {len(vocab)} tokens have {len(set(vocab.values()))} ids")
    absent = [letter for letter in byte_letters() if letter not in vocab]
    if absent:
        raise DataError(
            f"{where}: {len(absent)} of the 256 byte letters are missing (the first: {absent[0]!r}), "
            "so some text could not be encoded; a byte-level BPE vocabulary such as GPT-2's is needed"
        )
    return vocab


def parse_merges(data: bytes, vocab: dict[str, int], where: str) -> list[list[str]]:
    """Parses GPT-2's merges.txt: one pair on each line in order of rank, after an optional `#version` line.

    Raises:
        DataError: a line is no pair, a token is not in `vocab`, or there are no merges.
    """
    try:
        lines = data.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: byte {error.start} is not UTF-8; is this the right file?") from None
    merges = []
    for number, line in enumerate(lines, start=1):
        pair = line.rstrip("\r").split(" ")
        if line.startswith("#version") or pair == [""]:
            continue
        if len(pair) != 2 or not all(pair):
            raise DataError(f"{where}: line {number}: two parts separated by one space are needed, got {line[:60]!r}")
        for token in (*pair, "".join(pair)):
            if token not in vocab:
                raise DataError(f"{where}: line {number}: {token!r} is not in vocab.json; are the two files a pair?")
        merges.append(pair)
    if not merges:
        raise DataError(f"{where}: contains no merges; is this the right file?")
    return merges


def byte_letters() -> list[str]:
    """Returns the 256 letters that represent the byte values 0..255 in a byte-level vocabulary.

    Printable bytes of Latin-1 represent themselves; the others map to code points from 256 up.

    >>> byte_letters()[ord("a")], byte_letters()[ord(" ")]
    ('a', 'Ġ')

    Source: GPT-2 (Radford et al. 2019), its byte-level BPE.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    letters, moved = [], 256
    for byte in range(256):
        letters.append(chr(byte) if byte in printable else chr(moved))
        moved += byte not in printable
    return letters


def definition_sha256(definition: dict[str, Any], *, as_before: bool = False) -> str:
    """Returns the SHA-256 of everything that determines the ids of a text, and of nothing else.

    It covers the vocabulary with special tokens, the merges in order, the normaliser, the pre-tokenizer and the added
    tokens that are cut out of ordinary text. So vocab.json + merges.txt and an equivalent tokenizer.json have the same
    hash.

    Args:
        definition: from `build_definition`.
        as_before: whether to ignore `split: false` and `strip_accents: false`, as earlier versions did.
    """
    essential = functools.partial(meaning, as_before=as_before)
    model = {key: value for key, value in definition["model"].items() if key not in ("vocab", "merges")}
    added = definition.get("added_tokens") or []
    vocab = definition["model"]["vocab"]
    if isinstance(vocab, dict):
        ids = {**vocab, **{token["content"]: token["id"] for token in added}}
        table: list[Any] = sorted((index, token) for token, index in ids.items())
    else:  # Unigram: a list of (token, score) pairs, ordered by id
        table = [vocab, sorted([token["id"], token["content"]] for token in added)]
    # A tokenizer.json stores a pair as one string "a b" or as a list, depending on the version that wrote it.
    merges = [
        pair.split(" ", 1) if isinstance(pair, str) else list(pair) for pair in definition["model"].get("merges", [])
    ]
    content = {
        "model": essential(model),
        "vocab": table,
        "merges": merges,
        "normalizer": essential(definition.get("normalizer")),
        "pre_tokenizer": essential(definition.get("pre_tokenizer")),
        "cut_out": [essential(token) for token in added if not token.get("special")],
    }
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()
