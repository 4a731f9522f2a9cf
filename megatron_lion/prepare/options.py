"""PrepareOptions: the settings of a preparation, checked when created, and the manifest planned from them."""

from __future__ import annotations

import dataclasses
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
from megatron_lion.prepare.kept_documents import Rules
from megatron_lion.prepare.pieces import OnError, TxtDocuments
from megatron_lion.prepare.sentences import SplitterName
from megatron_lion.prepare.splits import AUTO, LARGE_SPLIT, parse_split


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """Input, output and settings of a preparation.

    Attributes:
        inputs: files, folders and glob patterns; may be empty if `prepare` is called with documents.
        tokenizer: source for `load_tokenizer`, or a loaded tokenizer.
        output: dataset folder to make.
        split: relative shares of train, valid, test, as "99.9,0.05,0.05" or numbers, or "auto" for shares that fit the
            size of the text (`splits.auto_split`).
        seed: seed of the documents' hashes that determine the split.
        workers: number of processes; 0 starts one for each usable core.
        on_error: "stop" at the first bad line, or "skip" and count bad lines.
        append_eod: whether the end-of-document token follows every document.
        json_key: key (JSON) or column (Parquet, Arrow) of the text; `a.b` is the key b inside a.
        txt_documents: "file" makes a text file one document, "blank-line" divides it at blank lines.
        divide_documents: "auto" divides documents by position (`positions`) if there are fewer distinct ones than
            splits; "always" and "never" do not depend on their number.
        task: "gpt" (one sequence for each document) or "bert" (one for each sentence, WordPiece).
        splitter: sentence splitter for "bert": "rules" or "punkt".
        format: "auto" for the format of each file's ending, or "jsonl", "txt", "parquet", "arrow", "tar".
        eod_token: end-of-document token, if the tokenizer does not define it.
        encoder: "tokenizers", "gigatoken", or "auto" (gigatoken if it is installed); the ids are the same.
        overwrite: whether a dataset folder that differs is replaced.
        min_tokens: a document of fewer tokens, without the end-of-document token, is left out.
        deduplicate: whether a document is left out whose text equals an earlier one's.
        decontaminate: files, folders and patterns of texts whose passages are searched in the documents (`overlap`).
        drop_contaminated: whether documents with such a passage are left out.

    Raises:
        ConfigError: a number is negative, a choice is unknown, or `drop_contaminated` is given without texts.
    """

    inputs: Sequence[str | Path] = ()
    tokenizer: str | Path | Tokenizer
    output: str | Path
    split: str | Sequence[float] = AUTO
    seed: int = 1234
    workers: int = 0
    on_error: OnError = "stop"
    append_eod: bool = True
    json_key: str = "text"
    txt_documents: TxtDocuments = "file"
    divide_documents: Literal["auto", "always", "never"] = "auto"
    task: Literal["gpt", "bert"] = "gpt"
    splitter: SplitterName = "rules"
    format: str = "auto"
    eod_token: str | None = None
    encoder: EncoderName = "auto"
    overwrite: bool = False
    min_tokens: int = 0
    deduplicate: bool = False
    decontaminate: Sequence[str | Path] = ()
    drop_contaminated: bool = False

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise ConfigError(f"workers {self.workers}: must be 0 (one for each core) or more")
        if self.min_tokens < 0:
            raise ConfigError(f"min_tokens {self.min_tokens}: must be 0 (keep all documents) or more")
        if self.drop_contaminated and not self.decontaminate:
            raise ConfigError("drop_contaminated: no texts are given; name them with --decontaminate FILE")
        choices = {
            "on_error": ("stop", "skip"),
            "txt_documents": ("file", "blank-line"),
            "divide_documents": ("auto", "always", "never"),
            "format": ("auto", "jsonl", "txt", "parquet", "arrow", "tar"),
            "encoder": ("auto", "tokenizers", "gigatoken"),
            "task": ("gpt", "bert"),
            "splitter": ("rules", "punkt"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} {getattr(self, name)!r}: must be one of {', '.join(allowed)}")

    @property
    def output_folder(self) -> Path:
        """Path of the dataset folder."""
        return Path(self.output).expanduser()

    @property
    def shares(self) -> tuple[float, float, float]:
        """Shares of train, valid and test in percent; with "auto", those of a large corpus."""
        return LARGE_SPLIT if self.split == AUTO else parse_split(self.split)

    @property
    def rules(self) -> Rules:
        """Which documents are left out."""
        return Rules(min_tokens=self.min_tokens, deduplicate=self.deduplicate, drop_contaminated=self.drop_contaminated)

    @property
    def ends_documents(self) -> bool:
        """Whether the end-of-document token follows every document; never for BERT, whose samples have [SEP]."""
        return self.append_eod and self.task == "gpt"


def plan_manifest(options: PrepareOptions, tokenizer: Tokenizer) -> Manifest:
    """Returns the manifest as far as it is known before reading documents; counts are 0 and `splits` is empty.

    With the split "auto", its shares are those of a large corpus until the size of the text is known.

    Raises:
        ConfigError: the split is invalid.
        DataError: the end-of-document token is needed and unknown.
    """
    has_eod = options.ends_documents or tokenizer.eod_token is not None
    by_sentences = {"splitter": options.splitter} if options.task == "bert" else {}
    # Only if they leave something out: datasets of versions without them are then the same.
    rules = {name: value for name, value in dataclasses.asdict(options.rules).items() if value}
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
        split=options.shares,
        seed=options.seed,
        options={
            "append_eod": options.ends_documents,
            **by_sentences,
            "json_key": options.json_key,
            "on_error": options.on_error,
            "txt_documents": options.txt_documents,
            **rules,
        },
        documents=0,
        tokens=0,
        text_bytes=0,
        duplicate_documents=0,
        skipped={},
        rejected={},
        splits={},
    )
