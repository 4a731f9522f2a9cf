"""`merge`: joins dataset folders of one tokenizer into one, split by split, in the order in which they are given.

Datasets that were prepared with other shares or another seed may hold one document in different splits. A document that
equals one of a later split of any dataset (test after valid after train) is therefore left out, so that no held-out
document is in the training split. Documents are equal if their tokens are; they are compared by a 128-bit hash.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_lion import __version__
from megatron_lion.data.indexed_check import IndexedInfo, check_indexed, sequence_lengths
from megatron_lion.data.indexed_writer import IndexedWriter
from megatron_lion.data.inspection import boundaries_of, document_lengths
from megatron_lion.data.manifest import NAME, SPLITS, Manifest, Overlap, SplitInfo, read_manifest, write_manifest
from megatron_lion.data.tokenizers import load_tokenizer_of
from megatron_lion.errors import ConfigError, DataError
from megatron_lion.files import storage_errors
from megatron_lion.prepare.equal_hashes import Halves, equal_hashes
from megatron_lion.prepare.kept_documents import DUPLICATE
from megatron_lion.prepare.pool import usable_cores
from megatron_lion.prepare.progress import NoProgress, Progress
from megatron_lion.prepare.workfolder import check_free_space, check_output, locked_work_folder, publish

logger = logging.getLogger(__name__)

HELD_OUT = "in_a_held_out_split"
"""Name under which documents are counted that equal one of a later split."""
MERGED = "merged"
"""Key of the manifest's options for the datasets that were joined, and for the rule."""


@dataclass(frozen=True)
class _Part:
    """One split of one dataset, and which of its D documents are kept, (D,) bool."""

    info: IndexedInfo
    kept: npt.NDArray[np.bool_]


def merge_datasets(
    inputs: Sequence[str | Path],
    output: str | Path,
    *,
    deduplicate: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Joins dataset folders, or verifies the one that was already joined from them.

    Args:
        inputs: dataset folders, at least two, in the order of their documents in the result.
        output: dataset folder to make.
        deduplicate: whether a document that equals an earlier one of its split is left out.
        overwrite: whether a dataset folder at `output` that differs is replaced.
        progress: receives the number of bytes done; None reports nothing.

    Returns:
        The manifest of the result. If documents are left out, its `text_bytes` is in proportion to the tokens that are
        kept, because the texts are not stored.

    Raises:
        ConfigError: the datasets do not fit together, or the output is another dataset or no dataset.
        DataError: a dataset is missing or damaged.
        StorageError: the disk has too little space, or the file system refused.
        BusyError: another command is writing the same output.
    """
    progress = progress or NoProgress()
    folders = [Path(one).expanduser() for one in inputs]
    output = Path(output).expanduser()
    manifests = _fitting(folders, output)
    check_output(output, overwrite)
    planned = _planned(manifests, deduplicate)
    with locked_work_folder(output) as work:
        if existing := _existing(output, planned, overwrite):
            shutil.rmtree(work, ignore_errors=True)
            return existing
        infos = {
            name: [
                check_indexed(folder / one.splits[name].prefix)
                for folder, one in zip(folders, manifests, strict=True)
                if name in one.splits
            ]
            for name in SPLITS
        }
        infos = {name: found for name, found in infos.items() if found}
        size = sum(info.bin_bytes + info.idx_bytes for found in infos.values() for info in found)
        hashes = 16 * sum(info.num_documents for found in infos.values() for info in found)
        check_free_space(work, size + hashes)
        progress.stage("comparing documents", sum(info.bin_bytes for found in infos.values() for info in found))
        parts, dropped, repeats = _selected(infos, work, deduplicate, progress)
        result = work / "result"
        shutil.rmtree(result, ignore_errors=True)  # left by a run that was killed
        with storage_errors(result, "made"):
            result.mkdir()
        progress.stage("writing the splits", sum(info.bin_bytes for found in infos.values() for info in found))
        vocab_size = planned.tokenizer.vocab_size
        splits = {
            name: _write(result, found, vocab_size, progress)
            for name, found in parts.items()
            if any(p.kept.any() for p in found)
        }
        if "train" not in splits:
            raise DataError(f"{output}: no document would be left in the train split; the datasets repeat each other")
        load_tokenizer_of(planned.tokenizer.sha256, folders[0] / "tokenizer").save(result / "tokenizer")
        manifest = _finished(planned, manifests, splits, parts, dropped, repeats)
        if not dropped:  # else fewer passages may be left than the datasets had
            manifest = dataclasses.replace(manifest, overlaps=_overlaps(manifests))
        write_manifest(result, manifest)
        publish(result, output, work)
    return manifest


def _fitting(folders: Sequence[Path], output: Path) -> list[Manifest]:
    """Reads the manifests and checks that the datasets fit together.

    Raises:
        ConfigError: they do not; the message names the two that differ.
    """
    if len(folders) < 2:
        raise ConfigError("give at least two dataset folders to join")
    real = [folder.resolve() for folder in folders]
    for number, folder in enumerate(folders):
        if real[number] in real[:number]:
            raise ConfigError(f"{folder}: named twice, so its documents would be counted twice; name it once")
        if real[number] == output.resolve():
            raise ConfigError(f"{folder}: is the output too; choose another --output")
    manifests = [read_manifest(folder) for folder in folders]
    for folder, one in zip(folders, manifests, strict=True):
        for what, mine, first in (
            ("kind", one.kind, manifests[0].kind),
            ("tokenizer", one.tokenizer.sha256[:12], manifests[0].tokenizer.sha256[:12]),
            ("end-of-document token", one.tokenizer.eod_id, manifests[0].tokenizer.eod_id),
            ("append_eod", _append_eod(one), _append_eod(manifests[0])),
        ):
            if mine != first:
                raise ConfigError(
                    f"{folder}: {what} {mine} differs from {first} of {folders[0]}; prepare both with the same tokenizer and settings"
                )
    return manifests


def _append_eod(manifest: Manifest) -> Any:
    return manifest.options.get("append_eod")


def _planned(manifests: Sequence[Manifest], deduplicate: bool) -> Manifest:
    """Returns the manifest as far as it is known before documents are compared."""
    first = manifests[0]
    common = {
        key: value for key, value in first.options.items() if all(one.options.get(key) == value for one in manifests)
    }
    contents = [[split.bin_sha256 + split.idx_sha256 for _, split in sorted(one.splits.items())] for one in manifests]
    digests = [hashlib.sha256("".join(content).encode()).hexdigest() for content in contents]
    rule = {"deduplicate": True} if deduplicate else {}
    return dataclasses.replace(
        first,
        version=__version__,
        encoder=" and ".join(dict.fromkeys(one.encoder for one in manifests)),
        sources=tuple(source for one in manifests for source in one.sources),
        options={**common, MERGED: digests, **rule},
        sentences=_sums(one.sentences for one in manifests),
        skipped=_sums(one.skipped for one in manifests),
        rejected=_sums(one.rejected for one in manifests),
        unread_files=_sums(one.unread_files for one in manifests),
        overlaps=(),
    )


def _overlaps(manifests: Sequence[Manifest]) -> tuple[Overlap, ...]:
    """Returns all entries about the texts for which every dataset was searched; the union of their passages is not known."""
    searched = [{overlap.sha256 for overlap in one.overlaps} for one in manifests]
    everywhere = set.intersection(*searched)
    return tuple(overlap for one in manifests for overlap in one.overlaps if overlap.sha256 in everywhere)


def _sums(counts: Iterator[dict[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for one in counts:
        total.update(one)
    return dict(sorted(total.items()))


def _existing(output: Path, planned: Manifest, overwrite: bool) -> Manifest | None:
    """Returns the manifest at `output` if it was joined from the same datasets, or None if it must be made.

    Raises:
        ConfigError: `output` is another dataset and `overwrite` is false.
        DataError: the dataset is damaged and `overwrite` is false.
    """
    if not (output / NAME).exists() or overwrite:
        return None
    found = read_manifest(output)
    rules = (MERGED, "deduplicate")
    if [found.options.get(key) for key in rules] != [planned.options.get(key) for key in rules]:
        raise ConfigError(
            f"{output}: contains another dataset; choose another --output, or replace it with --overwrite"
        )
    for split in found.splits.values():
        check_indexed(output / split.prefix).verify_content()
    logger.info("%s is already complete, joined from the same datasets", output)
    return found


def _selected(
    infos: Mapping[str, Sequence[IndexedInfo]], work: Path, deduplicate: bool, progress: Progress
) -> tuple[dict[str, list[_Part]], dict[str, int], int]:
    """Returns (parts by split, number of documents that are left out by reason, number of repeats that are kept)."""
    # In this order, a document that equals one before it equals one of a later split or an earlier one of its own.
    names = [*reversed([*infos])]
    every = [info for name in names for info in infos[name]]
    files = [work / f"hashes-{number}" for number in range(len(every))]
    for info, path in zip(every, files, strict=True):
        _write_hashes(info, path, progress)
    ends = np.cumsum([info.num_documents for info in every])
    first_of_split = np.cumsum([0, *(sum(info.num_documents for info in infos[name]) for name in names)])
    held_out, repeated = (np.zeros(int(ends[-1]), dtype=np.bool_) for _ in range(2))
    for places, equal in equal_hashes(lambda: map(_read_hashes, files), int(ends[-1])):
        split = np.searchsorted(first_of_split, places, "right")
        group = np.cumsum(~equal) - 1
        held_out[places[split[~equal][group] != split]] = True
        repeated[places[equal]] = True
    for path in files:
        with storage_errors(path, "removed"):
            path.unlink()
    dropped = {HELD_OUT: int(held_out.sum()), DUPLICATE: int((repeated & ~held_out).sum()) if deduplicate else 0}
    kept = ~held_out & ~(repeated & deduplicate)
    of_info = {id(info): mine for info, mine in zip(every, np.split(kept, ends[:-1]), strict=True)}
    parts = {name: [_Part(info, of_info[id(info)]) for info in found] for name, found in infos.items()}
    return parts, {reason: count for reason, count in dropped.items() if count}, int((repeated & kept).sum())


def _write_hashes(info: IndexedInfo, path: Path, progress: Progress) -> None:
    """Writes a 128-bit hash of each document's tokens to a file."""
    with (
        storage_errors(info.bin_path, "read"),
        open(info.bin_path, "rb", buffering=1 << 20) as stream,
        storage_errors(path),
        open(path, "wb") as hashes,
    ):
        for lengths in document_lengths(info):
            found = bytearray()
            with storage_errors(info.bin_path, "read"):
                for length in lengths.tolist():
                    content = stream.read(length * info.dtype.itemsize)
                    found += hashlib.blake2b(content, digest_size=16).digest()
                    progress.advance(len(content))
            hashes.write(found)


def _read_hashes(path: Path) -> Halves:
    """Returns the halves of the hashes in a file, (2, D)."""
    with storage_errors(path, "read"):
        return np.fromfile(path, dtype="<u8").reshape(-1, 2).T


def _write(result: Path, parts: Sequence[_Part], vocab_size: int, progress: Progress) -> SplitInfo:
    """Writes the documents of a split that are kept; each run of neighbours is one write."""
    prefix = result / parts[0].info.prefix.name
    with IndexedWriter(prefix, vocab_size, threads=usable_cores()) as writer:
        for part in parts:
            info, lengths, boundaries = part.info, sequence_lengths(part.info), boundaries_of(part.info)
            place = sequence = 0
            edges = np.flatnonzero(np.diff(part.kept, prepend=False, append=False))
            with storage_errors(info.bin_path, "read"):
                tokens = np.memmap(info.bin_path, dtype=info.dtype, mode="r")
            for begin, end in _runs(edges.reshape(-1, 2)):
                first, last = int(boundaries[begin]), int(boundaries[end])
                place += int(lengths[sequence:first].sum(dtype=np.int64))
                size = int(lengths[first:last].sum(dtype=np.int64))
                sequences = np.diff(boundaries[begin : end + 1])
                writer.add_documents([tokens[place : place + size]], lengths[first:last], sequences)
                progress.advance(size * info.dtype.itemsize)
                place, sequence = place + size, last
        info = writer.finalize()
    return SplitInfo(
        prefix=prefix.name, documents=info.num_documents, tokens=info.num_tokens, bin_bytes=info.bin_bytes, idx_bytes=info.idx_bytes,
        bin_sha256=info.bin_sha256, idx_sha256=info.idx_sha256,
    )  # fmt: skip


def _runs(edges: npt.NDArray[np.int64], most: int = 1 << 14) -> Iterator[tuple[int, int]]:
    """Yields runs of documents [begin, end), cut so that none has more than `most`: a write holds its tokens in memory."""
    for begin, end in edges.tolist():
        for first in range(begin, end, most):
            yield first, min(first + most, end)


def _finished(
    planned: Manifest, manifests: Sequence[Manifest], splits: dict[str, SplitInfo], parts: Mapping[str, Sequence[_Part]],
    dropped: dict[str, int], repeats: int,
) -> Manifest:  # fmt: skip
    """Returns the manifest with its counts."""
    documents = sum(split.documents for split in splits.values())
    tokens = sum(split.tokens for split in splits.values())
    before = sum(one.tokens for one in manifests)
    train, valid, test = (100 * splits[name].documents / documents if name in splits else 0.0 for name in SPLITS)
    same = all(one.split == planned.split for one in manifests)
    sentences = dict(planned.sentences)
    if sentences:
        counts = [np.diff(boundaries_of(part.info))[part.kept] for found in parts.values() for part in found]
        sentences["sentences"] = int(sum(count.sum() for count in counts))
        sentences["documents_of_one_sentence"] = int(sum((count == 1).sum() for count in counts))
    return dataclasses.replace(
        planned,
        split=planned.split if same else (train, valid, test),
        documents=documents,
        tokens=tokens,
        text_bytes=round(sum(one.text_bytes for one in manifests) * tokens / max(before, 1)),
        duplicate_documents=repeats,
        sentences=sentences,
        dropped=_sums(iter([*(one.dropped for one in manifests), dropped])),
        splits=splits,
    )
