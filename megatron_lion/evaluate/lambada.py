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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_lion.errors import DataError
from megatron_lion.evaluate.known_texts import LAMBADA, UNKNOWN
from megatron_lion.evaluate.token_scores import Segment


@dataclass(frozen=True, kw_only=True)
class Passages:
    """A LAMBADA file.

    Attributes:
        path: the file.
        sha256: SHA-256 of its bytes.
        version: name of the published file, or "unknown".
        texts: the passages; the last word of each is the target.
    """

    path: str
    sha256: str
    version: str
    texts: list[str]


def read_passages(path: str | Path) -> Passages:
    """Reads a JSONL file with a passage under `text` in each line.

    Raises:
        DataError: the file cannot be read, or a line has no passage of two words; the message names the line.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give LAMBADA as JSONL") from None
    texts = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{path}:{number}: not a JSON object with a passage under 'text'") from None
        if not isinstance(text, str) or " " not in text.strip():
            raise DataError(f"{path}:{number}: a passage needs at least two words under 'text'")
        texts.append(text.strip())
    if not texts:
        raise DataError(f"{path}: no passage found; needed: JSONL with a passage under 'text' in each line")
    sha256 = hashlib.sha256(content).hexdigest()
    return Passages(path=str(path), sha256=sha256, version=LAMBADA.get(sha256, UNKNOWN), texts=texts)


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
