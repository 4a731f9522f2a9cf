"""LAMBADA: accuracy and perplexity of the last word of passages, as lm-evaluation-harness measures them.

The target is the last word with the blank before it. All text before it is context, without a start token. A
passage counts as correct if greedy decoding gives every token of the target. Perplexity is per *word*: exp of
the mean over passages of the target's summed negative log likelihood.

Source: Paperno et al. 2016; the processed test set of Radford et al. 2019 (5,153 passages), scored as the
`lambada_openai` task of lm-evaluation-harness does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_lion.errors import DataError
from megatron_lion.evaluate.known_texts import LAMBADA, UNKNOWN
from megatron_lion.evaluate.text_rows import place, read_rows
from megatron_lion.evaluate.token_scores import Segment
from megatron_lion.prepare.find_files import input_file, kind_of
from megatron_lion.prepare.inputs import opened, reading
from megatron_lion.prepare.lines import BOM, BadLine, Skip, text_of_line


@dataclass(frozen=True, kw_only=True)
class Passages:
    """A LAMBADA file.

    Attributes:
        path: the file.
        sha256: SHA-256 of a published file's bytes, otherwise of the list of passages as JSON.
        version: name of the published file, or "unknown".
        texts: the passages; the last word of each is the target.
    """

    path: str
    sha256: str
    version: str
    texts: list[str]


def read_passages(path: str | Path, json_key: str = "text") -> Passages:
    """Reads passages: the rows of a JSON, Parquet or Arrow file, or the lines of a .txt file.

    A published file is recognised by its hash. It is read as JSON lines with the key `text`, whatever its name.

    Args:
        path: the file, plain or compressed; a file with an unknown ending is read as JSON lines.
        json_key: key or column of the passages.

    Raises:
        DataError: the file cannot be read, or a line has no passage of two words; the message names the line.
    """
    path = Path(path)
    if path.is_dir():
        raise DataError(f"{path}: a folder was given; give the LAMBADA file")
    format, _ = kind_of(path) or ("jsonl", "")
    with reading(path), opened(input_file(path, format)) as (stream, _):
        content = stream.read()
    sha256 = hashlib.sha256(content).hexdigest()
    version = LAMBADA.get(sha256, UNKNOWN)
    if version != UNKNOWN:
        rows = read_rows(input_file(path, "jsonl"), "text")
    elif format == "txt":
        rows = _lines(path, content.removeprefix(BOM))
    else:
        rows = read_rows(input_file(path, format), json_key)
    texts = []
    for where, text in rows:
        if " " not in text.strip():
            raise DataError(f"{where}: a passage needs at least two words")
        texts.append(text.strip())
    if not texts:
        raise DataError(f"{path}: no passage found; needed: JSONL with a passage under {json_key!r} in each line")
    if version == UNKNOWN:
        # The bytes of a file do not determine how it is read: that depends on its name and on the key.
        sha256 = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
    return Passages(path=str(path), sha256=sha256, version=version, texts=texts)


def _lines(path: Path, content: bytes) -> Iterator[tuple[str, str]]:
    """Yields (place, text) of the lines of a .txt file that are not blank."""
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        where = place(path, number, "line")
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: not UTF-8 at byte {error.start + 1}; convert the file to UTF-8 first") from None
        if line.lstrip().startswith(b"{"):
            with suppress(BadLine, Skip):
                text_of_line(line)
                raise DataError(
                    f"{where}: a JSON object with the key 'text', but a .txt file has a passage on each line; if the file is "
                    "JSON lines, name it .jsonl"
                )
        yield where, text


def passage_segment(text: str, encode: Callable[[str], list[int]], seq_length: int) -> Segment:
    """Returns the tokens of a passage with its last word scored; a passage that is too long loses its beginning.

    Args:
        text: the passage.
        encode: function from text to token ids.
        seq_length: the model's context length in tokens.

    Raises:
        DataError: the last word leaves no room for context.

    >>> segment = passage_segment("ab cd ef", lambda s: [ord(c) for c in s], seq_length=5)
    >>> "".join(map(chr, segment.ids)), segment.num_scored
    (' cd ef', 3)
    """
    context, _, word = text.rpartition(" ")
    before = encode(context)
    # The whole passage is encoded at once: a tokenizer may merge across the blank, and encoding the halves apart would
    # score a split that it never produces.
    ids = encode(f"{context} {word}")
    target = ids[len(before) :] or ids[-1:]
    if not before or len(target) > seq_length:
        raise DataError(f"passage {text[:40]!r}: no room for context before a last word of {len(target)} tokens")
    kept = ids[-(seq_length + 1) :]
    return Segment(ids=torch.tensor(kept, dtype=torch.int64), num_scored=len(target))
