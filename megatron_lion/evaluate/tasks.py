"""A measurement on one text: the segments to score, the fields of the result, and its file.

A task is prepared once (the text is read and encoded) and then measured on any number of checkpoints. Its
result is one JSON object that contains its whole convention. A result is reused if all its key fields match.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_lion import __version__
from megatron_lion.errors import ConfigError, DataError
from megatron_lion.evaluate.lambada import Passages, passage_segment
from megatron_lion.evaluate.perplexity import perplexity, plan_windows, stream_segments
from megatron_lion.evaluate.token_scores import Segment, SegmentScores
from megatron_lion.evaluate.wikitext import EvaluationText
from megatron_lion.evaluate.wikitext_pages import page_segments, read_pages
from megatron_lion.files import make_folder
from megatron_lion.runs.paths import step_name
from megatron_lion.runs.sealed_json import read_sealed, write_sealed

FORMAT = 1
DEFAULT_STRIDE = 32
# Results that agree in these fields are of the same measurement, and the earlier one is reused.
KEY_FIELDS = ("format", "kind", "state_sha256", "text_sha256", "stride", "seq_length", "precision", "max_tokens",
              "tokenizer_sha256", "start_id", "documents", "targets")  # fmt: skip


class TokenizerLike(Protocol):
    """The part of a tokenizer's interface that tasks use."""

    @property
    def eod_id(self) -> int: ...
    def encode(self, text: str) -> list[int]: ...


@dataclass(frozen=True, kw_only=True)
class Reader:
    """The tokenizer and settings that all tasks of one command share.

    Attributes:
        tokenizer: the run's tokenizer.
        tokenizer_sha256: SHA-256 of its definition.
        seq_length: the model's context length in tokens.
        precision: "fp32", "tf32" or "bf16", of the forward pass.
        max_tokens: number of tokens to score from the beginning of a stream; None scores all.
    """

    tokenizer: TokenizerLike
    tokenizer_sha256: str
    seq_length: int
    precision: str
    max_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class Task:
    """A measurement that is ready to run on a checkpoint.

    Attributes:
        conditions: the fields of the result that are known before the measurement, such as `kind`.
        suffix: part of the file's name that differs from the default convention's.
        segments: the token segments to score.
        summarize: function from the scores to the measured fields of the result.

    Raises:
        DataError: the text has no token to score.
    """

    conditions: dict[str, Any]
    suffix: str
    segments: list[Segment] = field(repr=False)
    summarize: Callable[[SegmentScores], dict[str, Any]] = field(repr=False)

    def __post_init__(self) -> None:
        if not self.segments:
            raise DataError(f"{self.conditions['text_path']}: the text has no token to score")

    @property
    def kind(self) -> str:
        """Name of the measurement: wikitext103, text, wikitext103_pages or lambada."""
        return str(self.conditions["kind"])

    @property
    def forward_tokens(self) -> int:
        """Tokens that go through the model."""
        return sum(len(segment.ids) - 1 for segment in self.segments)

    def path(self, folder: Path, step: int) -> Path:
        """Returns the file of a step's result in the evaluation folder."""
        return folder / f"{self.kind}-{step_name(step)}{self.suffix}.json"

    def find(self, folder: Path, step: int, state_sha256: str) -> dict[str, Any] | None:
        """Returns an earlier result of the same measurement on the same weights, or None.

        A damaged file counts as no result, so the step is measured again.
        """
        try:
            found = read_sealed(self.path(folder, step))
        except (OSError, ValueError):
            return None
        wanted = {**self.conditions, "state_sha256": state_sha256}
        same = all(found.get(key) == wanted[key] for key in KEY_FIELDS)
        return found if same else None

    def record(self, scores: SegmentScores, *, step: int, state_sha256: str, seconds: float) -> dict[str, Any]:
        """Returns the result: the measured fields with their conditions.

        JSON has no infinity: a perplexity beyond float64 becomes null. Its natural log is stored beside it.
        """
        measured = {
            key: None if isinstance(value, float) and math.isinf(value) else value
            for key, value in self.summarize(scores).items()
        }
        return {**self.conditions, "step": step, "state_sha256": state_sha256, **measured,
                "num_targets": scores.num_targets, "seconds": round(seconds, 3), "versions": _versions()}  # fmt: skip


@functools.cache
def _versions() -> dict[str, str]:
    """Returns the versions of the packages that compute the logits and the token ids."""
    names = ("torch", "megatron-core", "transformers", "tokenizers")
    return {"megatron_lion": __version__, **{name: metadata.version(name) for name in names}}


def write_result(path: Path, record: dict[str, Any]) -> None:
    """Writes a result atomically; makes its folder if needed.

    Raises:
        StorageError: the file system refused.
    """
    make_folder(path.parent)
    write_sealed(path, record)


def _conditions(reader: Reader, kind: str, path: str, sha256: str, version: str) -> dict[str, Any]:
    return {
        "format": FORMAT, "kind": kind, "text_path": path, "text_sha256": sha256, "text_version": version,
        "stride": None, "seq_length": reader.seq_length, "precision": reader.precision, "max_tokens": None,
        "tokenizer_sha256": reader.tokenizer_sha256, "start_id": None,
        "documents": None, "targets": None,
    }  # fmt: skip


def _suffix(conditions: dict[str, Any], *, named_text: bool) -> str:
    """Marks in the file name for each departure from stride 32, fp32, the whole text and a named text."""
    marks = [] if named_text else [conditions["text_sha256"][:8]]
    if conditions["stride"] not in (None, DEFAULT_STRIDE):
        marks.append(f"stride{conditions['stride']}")
    if conditions["precision"] != "fp32":
        marks.append(conditions["precision"])
    if conditions["max_tokens"] is not None:
        marks.append(f"first{conditions['max_tokens']}")
    return "".join(f"-{mark}" for mark in marks)


def stream_task(reader: Reader, text: EvaluationText, stride: int) -> Task:
    """Returns the task of a text's perplexity as one stream (Megatron's convention; see `evaluate.perplexity`).

    With `max_tokens` the loss is that of the first tokens alone. `n_orig` and `n_tok` stay those of the whole text,
    so the adjusted perplexity uses the whole text's tokens per word. If the text consists of documents, the
    end-of-document token follows each of them, as in a prepared dataset.

    Args:
        reader: tokenizer and settings.
        text: the text to score.
        stride: targets that each window after the first scores.

    Raises:
        ConfigError: the stride is outside 1..seq_length, or max_tokens is below 2.
        DataError: the text has fewer than two tokens, or it has documents and the tokenizer no end-of-document token.
    """
    if text.documents is None:
        ids = reader.tokenizer.encode(text.encoded)
    else:
        ids = [index for part in text.documents for index in (*reader.tokenizer.encode(part), reader.tokenizer.eod_id)]
    if reader.max_tokens is not None and reader.max_tokens < 2:
        raise ConfigError(f"--max-tokens {reader.max_tokens}: perplexity needs at least 2 tokens")
    shortened = reader.max_tokens is not None and reader.max_tokens < len(ids)
    tokens = torch.tensor(ids[: reader.max_tokens] if shortened else ids, dtype=torch.int64)
    plan = plan_windows(len(tokens), reader.seq_length, stride)
    ratio = (len(ids) - 1) / (text.n_orig - 1)

    def summarize(scores: SegmentScores) -> dict[str, Any]:
        return {
            "n_orig": text.n_orig, "n_tok": len(ids), "loss": scores.loss,
            "token_ppl": perplexity(scores.loss), "log_token_ppl": scores.loss,
            "adjusted_ppl": perplexity(scores.loss * ratio), "log_adjusted_ppl": scores.loss * ratio,
        }  # fmt: skip

    conditions = _conditions(reader, text.kind, text.path, text.sha256, text.version)
    conditions |= {"stride": stride, "max_tokens": reader.max_tokens if shortened else None}
    if text.documents is not None:
        conditions |= {"documents": len(text.documents), "start_id": reader.tokenizer.eod_id}
    suffix = _suffix(conditions, named_text=text.kind == "wikitext103")
    return Task(conditions=conditions, suffix=suffix, segments=stream_segments(tokens, plan), summarize=summarize)


def pages_task(reader: Reader, text: EvaluationText) -> Task:
    """Returns the task of word and byte perplexity page by page (as lm-evaluation-harness; see `wikitext_pages`).

    Raises:
        DataError: the text has no page.
    """
    pages, counts = read_pages(text.original)
    eod_id = reader.tokenizer.eod_id
    segments = [
        segment for page in pages for segment in page_segments(reader.tokenizer.encode(page), eod_id, reader.seq_length)
    ]

    def summarize(scores: SegmentScores) -> dict[str, Any]:
        word_loss, byte_loss = counts.word_loss(scores.loss_sum), counts.byte_loss(scores.loss_sum)
        return {
            "n_pages": counts.n_pages, "n_words": counts.n_words, "n_bytes": counts.n_bytes, "loss": scores.loss,
            "token_ppl": perplexity(scores.loss), "word_ppl": perplexity(word_loss), "log_word_ppl": word_loss,
            "byte_ppl": perplexity(byte_loss), "bits_per_byte": counts.bits_per_byte(scores.loss_sum),
        }  # fmt: skip

    conditions = _conditions(reader, f"{text.kind}_pages", text.path, text.sha256, text.version) | {"start_id": eod_id}
    return Task(
        conditions=conditions, suffix=_suffix(conditions, named_text=True), segments=segments, summarize=summarize
    )


def lambada_task(reader: Reader, passages: Passages) -> Task:
    """Returns the task of accuracy and perplexity: of the last word and of its last token (see `evaluate.lambada`).

    Raises:
        DataError: the last word of a passage leaves no room for context.
    """
    segments = [passage_segment(text, reader.tokenizer.encode, reader.seq_length) for text in passages.texts]

    def summarize(scores: SegmentScores) -> dict[str, Any]:
        loss = scores.loss_sum / len(segments)
        last_loss = scores.last_loss_sum / len(segments)
        return {"n_passages": len(segments), "loss": loss, "word_ppl": perplexity(loss), "log_word_ppl": loss,
                "accuracy": scores.num_greedy / len(segments), "last_token_ppl": perplexity(last_loss),
                "log_last_token_ppl": last_loss, "last_token_accuracy": scores.num_last_greedy / len(segments)}  # fmt: skip

    conditions = _conditions(reader, "lambada", passages.path, passages.sha256, passages.version)
    conditions |= {"targets": "last word, last token"}  # earlier results cover only the last word
    return Task(
        conditions=conditions, suffix=_suffix(conditions, named_text=True), segments=segments, summarize=summarize
    )
