"""Reads the texts whose passages are searched in a corpus (`--decontaminate`), and reports what was found."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_lion.data.manifest import SPLITS, Overlap
from megatron_lion.errors import DataError
from megatron_lion.files import sha256_file
from megatron_lion.prepare.find_files import InputFile, holds_archive, input_file, kind_of, survey
from megatron_lion.prepare.inputs import reading
from megatron_lion.prepare.overlap import Hashes, N, grams_of, save_grams, union_of
from megatron_lion.prepare.pieces import OnError, ReadCount, ReadOptions, read_files
from megatron_lion.prepare.shards import EncodedShard, shard_overlaps


@dataclass(frozen=True)
class GivenTexts:
    """Texts that are searched.

    Attributes:
        grams: name of the file of the 13-grams of all texts (`overlap.save_grams`).
        size: their number.
        members: for each text, the numbers of its 13-grams among them, sorted.
        found: for each text, its description; nothing has been found yet.
    """

    grams: str
    size: int
    members: tuple[npt.NDArray[np.int64], ...]
    found: tuple[Overlap, ...]


def read_given_texts(
    inputs: Sequence[str | Path], folder: Path, key: str = "text", on_error: OnError = "stop"
) -> GivenTexts:
    """Reads the texts and writes their 13-grams to a file.

    Args:
        inputs: files, folders and patterns, of the formats that `prepare` reads. A file with another ending, such as
            wiki.test.tokens, is one text.
        folder: folder for the file.
        key: key or column of the text; files that do not have it are read with the key `text`.
        on_error: "stop" at a bad line, or "skip" it.

    Raises:
        DataError: a file cannot be read, or none of its documents has 13 words.
        StorageError: the file of 13-grams cannot be written.
    """
    grams = grams_of([])
    read: list[tuple[Hashes, Overlap]] = []
    for file in _files(inputs):
        with reading(file.path):
            sha256 = sha256_file(file.path)
        if any(overlap.sha256 == sha256 for _, overlap in read):
            raise DataError(f"{file.path}: has the same content as an earlier text of --decontaminate; name it once")
        documents = _documents(file, key, on_error)
        own = grams_of(documents)
        if not len(own):
            raise DataError(
                f"{file.path}: none of its {len(documents):,} documents has {N} words, so no passage of it can be found; leave it out"
            )
        overlap = Overlap(
            path=str(file.path), bytes=file.bytes, sha256=sha256, documents=len(documents), ngrams=len(own),
            found_ngrams=0, found_in_documents=0, train_ngrams=0, train_documents=0,
        )  # fmt: skip
        read.append((own.hashes, overlap))
        grams = union_of([grams, own])
        del own, documents  # not held beside those of the next text
    members = tuple(np.searchsorted(grams.hashes, hashes) for hashes, _ in read)
    return GivenTexts(save_grams(folder, grams), len(grams), members, tuple(overlap for _, overlap in read))


def _files(inputs: Sequence[str | Path]) -> list[InputFile]:
    found: list[InputFile] = []
    for given in inputs:
        path = Path(given).expanduser()
        is_text = path.is_file() and kind_of(path) is None and not holds_archive(path)
        found += [input_file(path, "txt")] if is_text else survey([given]).files
    return found


def _documents(file: InputFile, key: str, on_error: OnError) -> list[bytes]:
    def read(name: str) -> list[bytes]:
        return [text.encode("utf-8") for text in read_files([file], ReadOptions(name, on_error=on_error), ReadCount())]

    try:
        return read(key)
    except DataError:
        if key == "text":
            raise
        try:
            return read("text")
        except DataError:
            pass
        raise


def found_overlaps(
    texts: GivenTexts, shards: Sequence[EncodedShard], folder: Path, members: npt.NDArray[np.uint8]
) -> tuple[Overlap, ...]:
    """Returns what was found of each text.

    Args:
        texts: the texts.
        shards: shards of the corpus, in its order.
        folder: folder of the shards.
        members: (D,) the split of each document, or another number if it is left out.

    Raises:
        StorageError: a shard cannot be read.
    """
    first = 0
    in_all = [(np.zeros(texts.size, dtype=np.bool_), set[int]()) for _ in texts.found]
    in_train = [(np.zeros(texts.size, dtype=np.bool_), set[int]()) for _ in texts.found]
    for shard in shards:
        pairs = shard_overlaps(folder, shard)
        train = members[first + pairs[:, 0]] == SPLITS.index("train")
        for number, own in enumerate(texts.members):
            mine = np.isin(pairs[:, 1], own)
            for (grams, documents), chosen in ((in_all[number], mine), (in_train[number], mine & train)):
                grams[pairs[chosen, 1]] = True
                documents.update((first + np.unique(pairs[chosen, 0])).tolist())
        first += shard.documents
    return tuple(
        dataclasses.replace(
            overlap,
            found_ngrams=int(everywhere[0].sum()), found_in_documents=len(everywhere[1]),
            train_ngrams=int(train_[0].sum()), train_documents=len(train_[1]),
        )
        for overlap, everywhere, train_ in zip(texts.found, in_all, in_train, strict=True)
    )  # fmt: skip
