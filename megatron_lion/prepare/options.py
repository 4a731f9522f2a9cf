"""The settings of a preparation, checked when they are made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_lion import __version__
from megatron_lion.data.indexed_writer import token_dtype
from megatron_lion.data.manifest import Manifest, TokenizerInfo
from megatron_lion.data.tokenizers import Tokenizer
from megatron_lion.errors import ConfigError
from megatron_lion.prepare.encoders import EncoderName
from megatron_lion.prepare.pieces import OnError, TxtDocuments
from megatron_lion.prepare.sentences import SplitterName
from megatron_lion.prepare.splits import parse_split


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """What to prepare, from what, how.

    Attributes:
        inputs: files, folders and glob patterns; may be empty when `prepare` is given documents.
        tokenizer: what `load_tokenizer` takes, or a loaded tokenizer.
        output: dataset folder to make.
        split: relative shares of train, valid, test, as "99.9,0.05,0.05" or numbers.
        seed: of the documents' hashes that decide the split.
        workers: processes; 0 takes one a usable core.
        on_error: "stop" at the first bad line, or "skip" and count.
        append_eod: end every document with the end-of-document token.
        json_key: key (JSON lines) or column (Parquet) of the text.
        txt_documents: "file" makes a text file one document, "blank-line" divides it at blank lines.
        task: "gpt" (one sequence a document) or "bert" (one sequence a sentence, WordPiece).
        splitter: of sentences, for "bert": "rules" or "punkt".
        format: "auto" by the files' endings, or "jsonl", "txt", "parquet".
        eod_token: end-of-document token where the tokenizer does not say it.
        encoder: "tokenizers", "gigatoken", or "auto": gigatoken where it is installed; same ids either way.
        overwrite: replace an existing dataset folder that differs.
    """

    inputs: Sequence[str | Path] = ()
    tokenizer: str | Path | Tokenizer
    output: str | Path
    split: str | Sequence[float] = "99.9,0.05,0.05"
    seed: int = 1234
    workers: int = 0
    on_error: OnError = "stop"
    append_eod: bool = True
    json_key: str = "text"
    txt_documents: TxtDocuments = "file"
    task: Literal["gpt", "bert"] = "gpt"
    splitter: SplitterName = "rules"
    format: str = "auto"
    eod_token: str | None = None
    encoder: EncoderName = "auto"
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise ConfigError(f"workers {self.workers}: 0 (one a core) or more is needed")
        choices = {
            "on_error": ("stop", "skip"),
            "txt_documents": ("file", "blank-line"),
            "format": ("auto", "jsonl", "txt", "parquet"),
            "encoder": ("auto", "tokenizers", "gigatoken"),
            "task": ("gpt", "bert"),
            "splitter": ("rules", "punkt"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} {getattr(self, name)!r}: one of {', '.join(allowed)} is needed")

    @property
    def output_folder(self) -> Path:
        """The dataset folder's path."""
        return Path(self.output).expanduser()

    @property
    def ends_documents(self) -> bool:
        """Whether the end-of-document token follows every document; BERT's samples have their own marks."""
        return self.append_eod and self.task == "gpt"


def plan_manifest(options: PrepareOptions, tokenizer: Tokenizer) -> Manifest:
    """The manifest as far as it is known before the first document is read."""
    has_eod = options.ends_documents or tokenizer.eod_token is not None
    by_sentences = {"splitter": options.splitter} if options.task == "bert" else {}
    return Manifest(
        version=__version__,
        encoder="",
        kind=options.task,
        sources=(),
        tokenizer=TokenizerInfo(
            sha256=tokenizer.sha256,
            kind=tokenizer.kind,
            vocab_size=tokenizer.vocab_size,
            eod_token=tokenizer.eod_token,
            eod_id=tokenizer.eod_id if has_eod else None,
        ),
        dtype=token_dtype(tokenizer.vocab_size).name,
        split=parse_split(options.split),
        seed=options.seed,
        options={
            "append_eod": options.ends_documents,
            **by_sentences,
            "json_key": options.json_key,
            "on_error": options.on_error,
            "txt_documents": options.txt_documents,
        },
        documents=0,
        tokens=0,
        text_bytes=0,
        duplicate_documents=0,
        skipped={},
        rejected={},
        splits={},
    )
