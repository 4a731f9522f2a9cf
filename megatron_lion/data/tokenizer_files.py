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

import hashlib
import json
from pathlib import Path
from typing import Any

from megatron_lion.data.bert_vocab import is_cased, parse_wordpieces, wordpiece_definition
from megatron_lion.errors import DataError

PAIRS = (("vocab.json", "merges.txt"), ("gpt2-vocab.json", "gpt2-merges.txt"), ("encoder.json", "vocab.bpe"))
SINGLE = "tokenizer.json"
WORDPIECES = "vocab.txt"
CONFIG = "tokenizer_config.json"
WANTED = "a folder with vocab.json + merges.txt, vocab.txt or tokenizer.json, one of these files, or hf:NAME"

# Settings of a pre-tokenizer or model that cannot change a token id. Some library versions write them and some do not,
# so they must not change the hash.
_WITHOUT_EFFECT = frozenset({"trim_offsets", "dropout"})


def read_files(source: Path) -> dict[str, bytes]:
    """Reads the files of the tokenizer at `source`, under their canonical names.

    Args:
        source: a folder, or any of the tokenizer's files.

    Returns:
        Contents by name: {"tokenizer.json": …}, {"vocab.json": …, "merges.txt": …} or {"vocab.txt": …}, and
        "tokenizer_config.json" if the folder has one.

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
        if (folder / CONFIG).is_file():
            found[CONFIG] = read_bytes(folder / CONFIG)
        return found
    raise DataError(f"{source}: contains no tokenizer; needed: {WANTED}")


def read_bytes(path: Path) -> bytes:
    """Returns the content of a file; raises a DataError that names the file if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def build_definition(files: dict[str, bytes], where: str) -> dict[str, Any]:
    """Converts the files to the definition that `tokenizers.Tokenizer.from_str` accepts.

    Truncation, padding, BPE dropout and the post-processor (which adds special tokens) are switched off: encoding must
    depend on the text alone.

    Args:
        files: contents by name, from `read_files`.
        where: name of the source, for messages.

    Raises:
        DataError: a file has the wrong content; the message names the file and, if possible, the line.
    """
    if SINGLE in files:
        definition = parse_json(files[SINGLE], f"{where}: {SINGLE}")
        model = definition.get("model")
        if not isinstance(model, dict) or "vocab" not in model:
            raise DataError(f"{where}: {SINGLE} has no model with a vocabulary; needed: {WANTED}")
        model["dropout"] = None
        return {**definition, "truncation": None, "padding": None, "post_processor": None}
    if WORDPIECES in files:
        pieces = parse_wordpieces(files[WORDPIECES], where if where.endswith(".txt") else f"{where}: {WORDPIECES}")
        config = parse_json(files[CONFIG], f"{where}: {CONFIG}") if CONFIG in files else {}
        return wordpiece_definition(pieces, lowercase=bool(config.get("do_lower_case", not is_cased(pieces))))
    vocab = parse_vocab(files["vocab.json"], f"{where}: vocab.json")
    merges = parse_merges(files["merges.txt"], vocab, f"{where}: merges.txt")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }


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


def definition_sha256(definition: dict[str, Any]) -> str:
    """Returns the SHA-256 of everything that determines the ids of a text, and of nothing else.

    It covers the vocabulary with special tokens, the merges in order, the normaliser, the pre-tokenizer and the added
    tokens that are cut out of ordinary text. So vocab.json + merges.txt and an equivalent tokenizer.json have the same
    hash.
    """
    model = {key: value for key, value in definition["model"].items() if key not in ("vocab", "merges")}
    added = definition.get("added_tokens") or []
    vocab = definition["model"]["vocab"]
    if isinstance(vocab, dict):
        ids = {**vocab, **{token["content"]: token["id"] for token in added}}
        table: list[Any] = sorted(([index, token] for token, index in ids.items()), key=lambda row: (row[0], row[1]))
    else:  # Unigram: a list of (token, score) pairs, ordered by id
        table = [vocab, sorted([token["id"], token["content"]] for token in added)]
    # A tokenizer.json stores a pair as one string "a b" or as a list, depending on the version that wrote it.
    merges = [
        pair.split(" ", 1) if isinstance(pair, str) else list(pair) for pair in definition["model"].get("merges", [])
    ]
    meaning = {
        "model": _essential(model),
        "vocab": table,
        "merges": merges,
        "normalizer": _essential(definition.get("normalizer")),
        "pre_tokenizer": _essential(definition.get("pre_tokenizer")),
        "cut_out": [_essential(token) for token in added if not token.get("special")],
    }
    text = json.dumps(meaning, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _essential(value: Any) -> Any:
    """Removes entries that are unset, false or without effect: an absent entry and its default must hash alike.

    The default of `use_regex` is true, so only false is kept there.
    """
    if isinstance(value, list):
        return [_essential(item) for item in value]
    if not isinstance(value, dict):
        return value
    kept = {key: _essential(item) for key, item in value.items() if key not in _WITHOUT_EFFECT and key != "use_regex"}
    kept = {key: item for key, item in kept.items() if item or (item == 0 and item is not False)}
    if value.get("use_regex") is False:
        kept["use_regex"] = False
    return kept
