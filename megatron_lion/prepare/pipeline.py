"""`prepare`: converts text files to a dataset folder with token files, a manifest and the tokenizer.

The result depends only on the content of the input files, the tokenizer and the settings. The number of workers,
interruptions and paths do not affect it. It is made in a hidden folder beside the output and renamed when complete.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from megatron_lion.data.indexed_writer import check_indexed
from megatron_lion.data.manifest import (
    NAME,
    Manifest,
    SplitInfo,
    read_manifest,
    write_manifest,
)
from megatron_lion.data.tokenizers import Tokenizer, load_tokenizer
from megatron_lion.errors import ConfigError, DataError
from megatron_lion.files import storage_errors
from megatron_lion.prepare.encode_piece import EncodeSettings
from megatron_lion.prepare.encoders import Encoder, build_encoder
from megatron_lion.prepare.few_documents import few_documents, total_text_bytes
from megatron_lion.prepare.find_files import InputFile, Survey, input_file, survey
from megatron_lion.prepare.given_texts import GivenTexts, found_overlaps, read_given_texts
from megatron_lion.prepare.hash_inputs import hash_sources
from megatron_lion.prepare.inputs import reading
from megatron_lion.prepare.kept_documents import Selection, select_documents
from megatron_lion.prepare.long_texts import divides_at_blanks
from megatron_lion.prepare.merge_shards import splits_of_documents, warn_of_absent_splits, write_splits
from megatron_lion.prepare.options import PrepareOptions, plan_manifest
from megatron_lion.prepare.pieces import Piece, ReadOptions, cut_pieces
from megatron_lion.prepare.pool import Collector, encode_pieces, usable_cores
from megatron_lion.prepare.positions import MIN_BYTES, shares_text
from megatron_lion.prepare.progress import NoProgress, Progress
from megatron_lion.prepare.shards import EncodedShard
from megatron_lion.prepare.size_estimate import estimate_work, warn_of_memory
from megatron_lion.prepare.splits import AUTO, LARGE_SPLIT, auto_split, small_split_warning, split_names
from megatron_lion.prepare.workfolder import check_free_space, check_output, locked_work_folder, publish

__all__ = ["Manifest", "PrepareOptions", "prepare", "read_manifest"]

logger = logging.getLogger(__name__)

_MIN_PIECE_BYTES, _MAX_PIECE_BYTES, _PIECES = 1 << 18, 1 << 24, 64
_SHARDS_FORMAT = 2
# Earlier versions cut these formats at other places, so their shards have other names.
_CUTS = {"parquet": "parquet-rows"}
DIVIDED = "divided"
"""Key of the manifest's options if documents are divided by position."""
SEARCHED = "decontaminate"
"""Key of the manifest's options for the SHA-256 of the texts whose passages were searched."""


def prepare(
    options: PrepareOptions, documents: Iterable[str] | None = None, progress: Progress | None = None
) -> Manifest:
    """Makes a dataset folder, or verifies the one that exists with the same input and settings.

    With more than one worker, a script that calls this needs `if __name__ == "__main__":`, because worker processes
    are spawned and import the script.

    Args:
        options: input, output and settings.
        documents: texts to prepare before the files of `options.inputs`, which may then be empty.
        progress: receives the number of bytes done; None reports nothing.

    Returns:
        The manifest of the dataset folder.

    Raises:
        ConfigError: options are invalid, or the output is another dataset or no dataset.
        DataError: a line is bad, a file is damaged, or there are no documents.
        StorageError: the disk has too little space, or the file system refused.
        BusyError: another prepare is writing the same output.
        PeerError: a worker process was killed.
        EnvironmentFault: a package for an input format, the encoder or the splitter is not installed.
    """
    progress = progress or NoProgress()
    output = options.output_folder
    tokenizer = options.tokenizer
    if not isinstance(tokenizer, Tokenizer):
        tokenizer = load_tokenizer(tokenizer, eod_token=options.eod_token)
    if options.task == "bert":
        tokenizer.bert_special_ids()  # fails now rather than after an hour of hashing and reading
    check_output(output, options.overwrite)
    planned = plan_manifest(options, tokenizer)
    with locked_work_folder(output) as work:
        files = [_spool(documents, work, options.json_key)] if documents is not None else []
        found = survey(options.inputs, options.format) if options.inputs or documents is None else Survey()
        files += found.files
        for note in found.notes():
            logger.info("%s", note)
        texts = None
        if options.decontaminate:
            texts = read_given_texts(options.decontaminate, work, options.json_key, options.on_error)
        sources = hash_sources(files, work, options.workers or usable_cores(), progress)
        planned = dataclasses.replace(planned, sources=tuple(sources), unread_files=found.unread_counts())
        planned = _divided(options, files, planned)
        if texts is not None:
            searched = {SEARCHED: sorted(overlap.sha256 for overlap in texts.found)}
            planned = dataclasses.replace(planned, options={**planned.options, **searched})
        existing = _existing(output, planned, options)
        if existing is not None:
            shutil.rmtree(work, ignore_errors=True)
            return existing
        return _Preparation(options, tokenizer, planned, files, texts, work, progress).run(output)


def _spool(documents: Iterable[str], work: Path, key: str) -> InputFile:
    """Writes documents that are Python objects into a file of the work folder, which is then read as any other."""
    path = work / "documents.jsonl"
    with storage_errors(path), open(path, "w", encoding="ascii") as stream:
        for text in documents:
            stream.write(json.dumps({key: text}) + "\n")
    return input_file(path, "jsonl")


def _divided(options: PrepareOptions, files: Sequence[InputFile], planned: Manifest) -> Manifest:
    """Decides whether documents are divided by position; if they are, returns the manifest with that and the shares."""
    names = split_names(options.shares)
    read = _read_options(options)
    if options.divide_documents == "never" or len(names) == 1:
        return planned
    if options.divide_documents == "always":
        what = "each document"
    else:
        count = few_documents(files, planned.sources, read, len(names))
        if count is None:
            return planned
        whose = str(files[0].path) if len(files) == 1 else f"{files[0].path} and {len(files) - 1} more"
        what = f"{whose}: {count} document{'s' * (count > 1)} for {len(names)} splits, so each"
    shares = auto_split(total_text_bytes(files, read)) if options.split == AUTO else options.shares
    logger.info(
        "%s is divided by position, at blank lines, else line breaks, sentence ends or blanks: in its order %s",
        what, shares_text(shares),
    )  # fmt: skip
    return dataclasses.replace(planned, split=shares, options={**planned.options, DIVIDED: "by position"})


def _read_options(options: PrepareOptions) -> ReadOptions:
    return ReadOptions(options.json_key, options.txt_documents, options.on_error)


def _existing(output: Path, planned: Manifest, options: PrepareOptions) -> Manifest | None:
    """Returns the manifest of the dataset at `output` if it is the requested one, or None if it must be made.

    Raises:
        ConfigError: `output` is another dataset and `options.overwrite` is false.
        DataError: the dataset is damaged and `options.overwrite` is false.
    """
    overwrite = options.overwrite
    if not (output / NAME).exists():
        return None
    try:
        found = read_manifest(output)
        if options.split == AUTO and DIVIDED not in planned.options:
            # Earlier versions took the shares of a large corpus for every corpus.
            shares = found.split if found.split == LARGE_SPLIT else auto_split(found.text_bytes)
            planned = dataclasses.replace(planned, split=shares)
        different = found.differences(planned)
        if not different:
            for split in found.splits.values():
                check_indexed(output / split.prefix).verify_content()
            logger.info("%s is already complete, made from the same input with the same settings", output)
            return found
    except DataError:
        if overwrite:
            return None
        raise
    if overwrite:
        return None
    raise ConfigError(
        f"{output}: contains another dataset ({'; '.join(different)}); choose another --output, or replace it with --overwrite"
    )


class _Preparation:
    """One run of `prepare`: encodes pieces into shards, then merges these into splits."""

    def __init__(
        self,
        options: PrepareOptions,
        tokenizer: Tokenizer,
        planned: Manifest,
        files: Sequence[InputFile],
        texts: GivenTexts | None,
        work: Path,
        progress: Progress,
    ) -> None:
        self.options = options
        self.tokenizer = tokenizer
        self.planned = planned
        self.files = files
        self.texts = texts
        self.work = work
        self.progress = progress
        self.settings = EncodeSettings(
            read=_read_options(options),
            eod_id=tokenizer.eod_id if options.ends_documents else None,
            splitter=options.splitter if options.task == "bert" else None,
            seed=options.seed,
            vocab_size=tokenizer.vocab_size,
            in_parts=options.task == "gpt" and divides_at_blanks(tokenizer.definition),
            divide=planned.split if DIVIDED in planned.options else None,
            overlap=texts.grams if texts is not None else None,
        )
        self.encoder: Encoder = build_encoder(options.encoder, tokenizer, self.settings.splitter)
        total = sum(file.bytes for file in files)
        # Below 512 KiB, starting processes takes longer than encoding.
        self.workers = (options.workers or usable_cores()) if total >= 2 * _MIN_PIECE_BYTES else 1
        # A power of two: after a small change of the corpus, the other files are cut at the same places and their shards
        # are reused.
        self.piece_bytes = min(max(1 << (total // _PIECES).bit_length(), _MIN_PIECE_BYTES), _MAX_PIECE_BYTES)
        self.shards_folder = work / f"shards-{self._shards_key()[:16]}"

    def _shards_key(self) -> str:
        """Returns a hash of everything that the shards depend on; shards with another key are not reused."""
        parts = (
            _SHARDS_FORMAT,
            self.planned.tokenizer.sha256,
            dataclasses.asdict(self.settings),
            self.piece_bytes,
            self.encoder.name,
        )
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def run(self, output: Path) -> Manifest:
        """Encodes and merges the corpus, then moves the result to `output`; returns its manifest."""
        began = time.monotonic()
        for old in self.work.glob("shards-*"):
            if old != self.shards_folder:
                with storage_errors(old, "removed"):
                    shutil.rmtree(old)
        with storage_errors(self.shards_folder, "made"):
            self.shards_folder.mkdir(exist_ok=True)
        self._check_space()
        try:
            collector = self._encode()
        except DataError:
            self._check_unchanged()  # the file may have changed while it was read, which is then the reason
            raise
        seconds = time.monotonic() - began
        shards = [shard for _, (_, shard) in sorted(collector.shards.items())]
        text_bytes = sum(shard.text_bytes for shard in shards)
        reused = f", {collector.reused} of {len(shards)} pieces from an earlier run" if collector.reused else ""
        logger.info(
            "%.1f MB of text encoded in %.1f s (%.1f MB/s) by %s%s",
            text_bytes / 1e6, seconds, text_bytes / 1e6 / max(seconds, 1e-9), self.encoder.name, reused,
        )  # fmt: skip
        self._check_unchanged()
        if not any(shard.documents for shard in shards):
            raise DataError(_no_documents(self.files, shards))
        end_tokens = 0 if self.settings.eod_id is None else 1
        selection = select_documents(shards, self.shards_folder, self.options.rules, end_tokens)
        if not selection.kept.any():
            left_out = ", ".join(f"{count:,} × {reason}" for reason, count in selection.dropped.items())
            raise DataError(
                f"{self.files[0].path}: every document of the input is left out ({left_out}); change these rules"
            )
        if self.options.split == AUTO and not self.settings.divide:
            self.planned = dataclasses.replace(self.planned, split=auto_split(selection.text_bytes))
            logger.info("split: %s", shares_text(self.planned.split))
        manifest = self._merge(collector, shards, selection, self.work / "result")
        publish(self.work / "result", output, self.work)
        return manifest

    def _named_pieces(self) -> Iterator[tuple[str, Piece]]:
        """Yields (shard name, piece). The name contains the file's hash, so only a changed file is encoded again."""
        times: Counter[str] = Counter()
        for source, file in zip(self.planned.sources, self.files, strict=True):
            content = f"{source.sha256[:24]}-{_CUTS.get(file.format, file.format)}{file.compression}"
            times[content] += 1
            for piece in cut_pieces(file, self.piece_bytes, self.settings.read.json_key):
                yield f"{content}-{times[content]}-{piece.number:06d}", piece

    def _check_space(self) -> None:
        if not self.settings.in_parts and self.options.txt_documents == "file":
            warn_of_memory(self.files, self.options.task)
        estimate = estimate_work(self.files, self.settings, self.encoder)
        logger.info(
            "about %s tokens, %s MB of disk while working, %d s on %d process%s",
            f"{estimate.tokens:,.0f}", f"{estimate.disk_bytes / 1e6:,.0f}", math.ceil(estimate.core_seconds / self.workers), self.workers,
            "es" * (self.workers > 1),
        )  # fmt: skip
        # Shards of an earlier run already occupy part of the estimated space.
        there = sum(path.stat().st_size for path in self.shards_folder.iterdir())
        check_free_space(self.work, estimate.disk_bytes - there)

    def _encode(self) -> Collector:
        self.progress.stage("encoding", sum(file.bytes for file in self.files))

        def on_shard(piece: Piece, _: EncodedShard) -> None:
            self.progress.advance(piece.stored_bytes)

        return encode_pieces(
            self._named_pieces(),
            self.shards_folder,
            self.settings,
            self.tokenizer,
            self.encoder,
            self.workers,
            on_shard,
        )

    def _check_unchanged(self) -> None:
        """Rejects files that changed since they were hashed; the manifest would describe other content than the tokens."""
        for file, source in zip(self.files, self.planned.sources, strict=True):
            with reading(file.path):
                now = file.path.stat()
            if (now.st_size, now.st_mtime_ns) != (source.bytes, file.modified_ns):
                raise DataError(f"{file.path}: changed while it was read; run the same command again")

    def _merge(
        self, collector: Collector, shards: Sequence[EncodedShard], selection: Selection, result: Path
    ) -> Manifest:
        """Writes the splits' token files, the tokenizer and the manifest into `result`."""
        shutil.rmtree(result, ignore_errors=True)  # left by a run that stopped while merging
        with storage_errors(result, "made"):
            result.mkdir()
        divided = self.settings.divide is not None
        members = splits_of_documents(shards, self.shards_folder, self.planned.split, selection, divided)
        splits = write_splits(
            shards, self.shards_folder, members, self.tokenizer.vocab_size, result, self.workers, self.progress
        )
        warn_of_absent_splits(splits, self.planned.split, int(selection.kept.sum()) - selection.duplicates, divided)
        if self.settings.divide is None and any(name not in splits for name in split_names(self.planned.split)):
            logger.warning("--divide-documents always divides each document by position, if it has %d bytes", MIN_BYTES)
        if warning := small_split_warning({name: split.tokens for name, split in splits.items()}):
            logger.warning("%s", warning)
        self.tokenizer.save(result / "tokenizer")
        overlaps = () if self.texts is None else found_overlaps(self.texts, shards, self.shards_folder, members)
        manifest = dataclasses.replace(self._manifest(collector, shards, selection, splits), overlaps=overlaps)
        write_manifest(result, manifest)
        return manifest

    def _manifest(
        self, collector: Collector, shards: Sequence[EncodedShard], selection: Selection, splits: dict[str, SplitInfo]
    ) -> Manifest:
        per_file: Counter[Path] = Counter()
        first = 0
        for _, (piece, shard) in sorted(collector.shards.items()):
            per_file[piece.file.path] += int(selection.kept[first : first + shard.documents].sum())
            first += shard.documents
        sources = (
            dataclasses.replace(source, documents=per_file[file.path])
            for source, file in zip(self.planned.sources, self.files, strict=True)
        )
        return dataclasses.replace(
            self.planned,
            encoder=self.encoder.name,
            sources=tuple(sources),
            documents=int(selection.kept.sum()),
            tokens=selection.tokens,
            text_bytes=selection.text_bytes,
            duplicate_documents=selection.duplicates,
            sentences=_sentences(selection, shards),
            skipped=_total([shard.read.skipped for shard in shards]),
            rejected=_total([shard.read.rejected for shard in shards]),
            dropped=selection.dropped,
            splits=splits,
        )


def _sentences(selection: Selection, shards: Sequence[EncodedShard]) -> dict[str, int]:
    """Returns the counts of sentences; empty if documents are not divided into sentences."""
    if not selection.sentences:
        return {}
    return {
        "sentences": selection.sentences,
        "documents_of_one_sentence": selection.single_sentence_documents,
        "divided_sentences": sum(shard.divided_sentences for shard in shards),
    }


def _total(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(sorted(total.items()))


def _no_documents(files: Sequence[InputFile], shards: Sequence[EncodedShard]) -> str:
    names = str(files[0].path) if len(files) == 1 else f"{files[0].path} and {len(files) - 1} more"
    passed = {**_total([s.read.skipped for s in shards]), **_total([s.read.rejected for s in shards])}
    met = ", ".join(f"{count} × {kind}" for kind, count in passed.items()) or "no lines at all"
    return f"{names}: contains no documents ({met}); is this the right file, and --json-key the right key?"
