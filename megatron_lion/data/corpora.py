"""Opens and checks the data of a run: dataset folders of `prepare`, or prefixes of .bin/.idx files."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_lion.config import DataConfig, ModelConfig
from megatron_lion.config_hints import NO_DATA
from megatron_lion.data.indexed_check import IndexedInfo, TokenContent, check_indexed, rebuild_hint, with_ending
from megatron_lion.data.manifest import NAME as MANIFEST_NAME
from megatron_lion.data.manifest import SPLITS, Manifest, read_manifest
from megatron_lion.data.token_memory import known_content
from megatron_lion.data.tokenizers import Tokenizer, load_tokenizer, load_tokenizer_of
from megatron_lion.errors import ConfigError, DataError

DATA_KINDS = {"gpt2": "gpt", "bert": "bert"}
"""model.kind to the name of its data in `prepare --task`."""


@dataclass(frozen=True)
class Corpora:
    """The checked data of a run.

    Attributes:
        prefixes: prefixes to draw from, for each of train, valid and test; the same list three times if the split
            is made by document position.
        infos: counts, dtype and hashes of each distinct prefix.
        weights: draw weight of each path, or None to draw in proportion to sizes.
        split: Megatron's split string for plain prefixes, None for dataset folders.
        tokenizer: tokenizer of the data, or None if only the vocabulary's size is known.
        vocab_size: number of ids before padding.
        digest: SHA-256 over the data's content hashes, weights and split; equal digests mean the same data.
        settings: the config's data section, for settings that apply when samples are drawn (BERT's masking).
        absent: for valid and test, if a dataset folder lacks the split: what is wrong and how to make it; see
            `check_splits`.
        overlaps: for each dataset folder, the entries of its manifest about the texts of `prepare --decontaminate`.
    """

    prefixes: dict[str, list[Path]]
    infos: dict[Path, IndexedInfo]
    weights: list[float] | None
    split: str | None
    tokenizer: Tokenizer | None
    vocab_size: int
    digest: str
    settings: DataConfig = field(default_factory=DataConfig)
    absent: dict[str, str] = field(default_factory=dict)
    overlaps: list[list[dict[str, Any]]] = field(default_factory=list)

    @property
    def train_tokens(self) -> int:
        """Tokens of the training split; estimated from the split's share for plain prefixes."""
        total = sum(self.infos[prefix].num_tokens for prefix in self.prefixes["train"])
        return total if self.split is None else int(total * shares(self.split)[0])


@dataclass(frozen=True)
class PairContent:
    """What the checks of a plain pair of token files found: the hash of its index, and its tokens'."""

    idx_sha256: str
    tokens: TokenContent


def open_corpora(
    data: DataConfig,
    model: ModelConfig,
    *,
    cache: Path | None = None,
    checked: dict[Path, PairContent] | None = None,
) -> Corpora:
    """Opens and checks everything that `data.path` names.

    Of prepared folders it reads manifests and index files. Plain prefixes have no manifest, so their tokens are read
    as well, for the content hash and the largest id. A dataset folder may lack valid or test; `check_splits` refuses that
    if they are read.

    Args:
        data, model: settings.
        cache: folder that keeps what was read of plain token files, see `known_content`; None reads them.
        checked: what another process of this node found for each plain prefix, {} for dataset folders; it has made the checks
            that read index files and tokens, and they are not repeated. None makes them.

    Raises:
        ConfigError: no path is given, or folders are mixed with prefixes.
        DataError: files are missing, damaged, of another tokenizer, or have ids beyond the vocabulary.
    """
    if not data.path:
        raise ConfigError(NO_DATA)
    paths = [Path(path) for path in data.path]
    check_paths(data.path)
    folders = [path for path in paths if (path / MANIFEST_NAME).is_file()]
    if folders and len(folders) != len(paths):
        other = next(path for path in paths if path not in folders)
        raise ConfigError(
            f"data.path: {other} has no {MANIFEST_NAME} while {folders[0]} is a prepared dataset folder; give only folders or only prefixes"
        )
    if folders:
        return _open_folders(paths, data, model, contents=checked is None)
    checked = checked or {}
    infos = {path: check_indexed(path, contents=path not in checked) for path in paths}
    for path, found in checked.items():
        infos[path].__dict__.update(idx_sha256=found.idx_sha256, content=found.tokens)
    return _open_prefixes(infos, data, model, cache)


def check_paths(given: Sequence[str]) -> None:
    """Checks that each path of `data.path` is a dataset folder or the prefix of a .bin/.idx pair; reads nothing.

    Raises:
        ConfigError: a comma in a path divided it into two.
        DataError: a path does not exist, or is something else.
    """
    _check_commas(given)
    for path in given:
        _check_there(Path(path))


def _check_commas(paths: Sequence[str]) -> None:
    """Detects one path with a comma that was parsed as two paths.

    Raises:
        ConfigError: two consecutive paths do not exist, but the two joined by a comma do.
    """
    for one, other in itertools.pairwise(paths):
        for whole in (f"{one},{other}", f"{one}, {other}"):
            if not _is_there(one) and not _is_there(other) and _is_there(whole):
                raise ConfigError(
                    f"data.path: neither {one} nor {other} exists, but {whole} does: a comma separates two paths; quote the path: "
                    f"--data.path '[\"{whole}\"]'"
                )


def _check_there(path: Path) -> None:
    """Rejects a path that is neither a dataset folder nor the prefix of a .bin/.idx pair.

    Raises:
        DataError: the path does not exist or is something else; the message names what was found and what to give.
    """
    pair = any(with_ending(path, ending).exists() for ending in (".bin", ".idx"))
    if (path / MANIFEST_NAME).is_file() or path.suffix in (".bin", ".idx") or pair:
        return
    if path.is_file():
        raise DataError(
            f"data.path: {path} is a file; training reads a dataset: make one with `megatron-lion prepare --input {shlex.quote(str(path))} "
            f"--tokenizer PATH --output DIR`, and give DIR; or train on the text itself with --text {shlex.quote(str(path))}"
        )
    if path.is_dir():
        pairs = sorted(one.with_suffix("") for one in path.glob("*.idx"))
        remedy = f"the prefix of one of its pairs, such as {pairs[0]}" if pairs else "a folder that has one"
        raise DataError(
            f"data.path: {path} has no {MANIFEST_NAME}, so `megatron-lion prepare` did not make it; give {remedy}"
        )
    if (path.parent / MANIFEST_NAME).is_file():
        raise DataError(
            f"data.path: {path} does not exist; {path.parent} is a dataset folder; give it, or the prefix of one of its splits"
        )
    raise DataError(
        f"data.path: there is neither a folder {path} nor {path}.idx; give a folder that `megatron-lion prepare` made, or the prefix of "
        "a pair of .bin and .idx files"
    )


def _is_there(path: str) -> bool:
    return Path(path).exists() or with_ending(path, ".idx").exists()


def _open_folders(paths: Sequence[Path], data: DataConfig, model: ModelConfig, *, contents: bool) -> Corpora:
    manifests: list[Manifest] = [read_manifest(path) for path in paths]
    prefixes: dict[str, list[Path]] = {split: [] for split in SPLITS}
    infos: dict[Path, IndexedInfo] = {}
    for path, manifest in zip(paths, manifests, strict=True):
        if manifest.kind != DATA_KINDS[model.kind]:
            raise DataError(
                f"{path}: prepared for {manifest.kind}, but model.kind is {model.kind}; prepare it in another folder with "
                f"`megatron-lion prepare --task {DATA_KINDS[model.kind]}`, or give another model.kind"
            )
        if manifest.tokenizer.sha256 != manifests[0].tokenizer.sha256:
            raise DataError(
                f"{path}: tokenizer {manifest.tokenizer.sha256[:12]} differs from {manifests[0].tokenizer.sha256[:12]} "
                f"of {paths[0]}; prepare both with one --tokenizer"
            )
        for split, info in manifest.splits.items():
            prefix = path / info.prefix
            _check_inside(path, prefix)
            prefixes[split].append(prefix)
            infos[prefix] = check_indexed(prefix, contents=contents)
    absent: dict[str, str] = {}
    for path, manifest in zip(paths, manifests, strict=True):
        for split in SPLITS:
            if split not in manifest.splits:
                absent.setdefault(split, _absent(path, manifest, split))
    if "train" in absent:
        raise DataError(absent["train"])
    vocab_size = _check_vocab_size(model, manifests[0].tokenizer.vocab_size, f"{paths[0]}/{MANIFEST_NAME}")
    tokenizer = load_tokenizer_of(manifests[0].tokenizer.sha256, data.tokenizer or paths[0] / "tokenizer")
    if tokenizer.sha256 != manifests[0].tokenizer.sha256:
        raise DataError(
            f"data.tokenizer: {data.tokenizer} has hash {tokenizer.sha256[:12]}, the data in {paths[0]} was made with "
            f"{manifests[0].tokenizer.sha256[:12]}; leave data.tokenizer out to use the data's tokenizer"
        )
    if tokenizer.vocab_size != manifests[0].tokenizer.vocab_size:
        raise DataError(
            f"{paths[0]}/{MANIFEST_NAME}: tokenizer.vocab_size is {manifests[0].tokenizer.vocab_size}, its tokenizer has "
            f"{tokenizer.vocab_size} ids; {rebuild_hint(prefixes['train'][0])}"
        )
    # From the manifests: hashing the tokens here would cost a second for every 1.9 GB.
    hashes = [[s.idx_sha256 + s.bin_sha256 for s in manifest.splits.values()] for manifest in manifests]
    digest = _digest([hashes, data.weights])
    overlaps = [[dataclasses.asdict(one) for one in manifest.overlaps] for manifest in manifests]
    return Corpora(prefixes, infos, data.weights, None, tokenizer, vocab_size, digest, data, absent, overlaps)


def _absent(path: Path, manifest: Manifest, split: str) -> str:
    """Returns why a dataset folder lacks a split, and how to prepare it again with the split."""
    if not manifest.split[SPLITS.index(split)]:
        shares = ",".join(f"{share:g}" for share in manifest.split)
        return (
            f"{path}: has no {split} split, because it was prepared with --split {shares}; prepare it again with --overwrite and a "
            "share for it, such as --split 90,5,5"
        )
    count = manifest.documents
    return (
        f"{path}: has no {split} split, because the dataset has {count} document{'s' * (count != 1)}; prepare it again with "
        "--overwrite --divide-documents always, which divides each document by position"
    )


def check_splits(corpora: Corpora, num_samples: Sequence[int | None]) -> None:
    """Rejects corpora that lack a split of which samples will be read.

    Args:
        corpora: from `open_corpora`.
        num_samples: number of samples that will be read of train, valid and test; None counts as 0.

    Raises:
        DataError: the message names the dataset folder, and what works with and without preparing it again.
    """
    for split, count in zip(SPLITS, num_samples, strict=True):
        if count and split in corpora.absent:
            without = "--train.test_every 0" if num_samples[0] else "probe.data fixed"
            raise DataError(f"{corpora.absent[split]}; or do without it: {without}")


def _check_inside(folder: Path, prefix: Path) -> None:
    """Rejects token files that are links out of their dataset folder: their targets may change, and `prepare` did not write them."""
    for ending in (".bin", ".idx"):
        file = with_ending(prefix, ending)
        if file.is_symlink() and not file.resolve().is_relative_to(folder.resolve()):
            raise DataError(
                f"{file}: is a link to {file.resolve()}, outside of the dataset folder; copy the file, or link the folder as a whole"
            )


def _open_prefixes(infos: dict[Path, IndexedInfo], data: DataConfig, model: ModelConfig, cache: Path | None) -> Corpora:
    for path, info in infos.items():
        _check_sequences(path, info, model.kind)
    tokenizer = load_tokenizer(data.tokenizer) if data.tokenizer else None
    if tokenizer is None and model.kind == "bert":
        raise ConfigError(
            "data.tokenizer: not given; masking needs the vocabulary of the .bin/.idx files; give its vocab.txt"
        )
    if tokenizer is None and model.vocab_size is None:
        raise ConfigError(
            "model.vocab_size: not given, and plain .bin/.idx files do not store it; give it, or data.tokenizer"
        )
    wanted = model.vocab_size or (tokenizer.vocab_size if tokenizer else 0)
    for path, info in infos.items():
        if cache is not None:
            info.__dict__["content"] = known_content(info, cache)
        if info.token_range[0] < 0:
            raise DataError(
                f"{path}.bin holds token id {info.token_range[0]}, ids begin at 0: the file is damaged; prepare it again"
            )
        if info.max_token >= wanted:
            raise DataError(
                f"{path}.bin holds token id {info.max_token}, the vocabulary has {wanted} ids; "
                "give the tokenizer the data was made with, or a larger model.vocab_size"
            )
    shares(data.split)
    hashes = [info.idx_sha256 + info.content.sha256 for info in infos.values()]
    digest = _digest([hashes, data.weights, data.split])
    prefixes = {split: [Path(path) for path in data.path] for split in SPLITS}
    return Corpora(prefixes, infos, data.weights, data.split, tokenizer, wanted, digest, data)


def _check_sequences(path: Path, info: IndexedInfo, kind: str) -> None:
    """Rejects plain prefixes of the other kind of data; without a manifest, only the counts show the kind."""
    by_sentences = info.num_sequences > info.num_documents
    if by_sentences == (kind == "bert"):
        return
    held = "sentences (several sequences a document)" if by_sentences else "whole documents (one sequence each)"
    raise DataError(
        f"{path}: holds {held}, but model.kind is {kind}; make it with `megatron-lion prepare --task {DATA_KINDS[kind]}`, or with "
        f"Megatron-LM's preprocess_data {'with' if kind == 'bert' else 'without'} --split-sentences"
    )


def _check_vocab_size(model: ModelConfig, found: int, where: str) -> int:
    if model.vocab_size is not None and model.vocab_size < found:
        raise DataError(
            f"model.vocab_size: {model.vocab_size} is smaller than the {found} ids of the data ({where}); "
            "leave it out to use the data's vocabulary size"
        )
    return model.vocab_size or found


def shares(split: str) -> list[float]:
    """Shares of train, valid and test in a split string such as "99.9,0.05,0.05", scaled to sum to 1.

    Raises:
        ConfigError: the text is not three finite numbers ≥ 0, or all are 0.
    """
    try:
        parts = [float(part) for part in split.split(",")]
    except ValueError:
        parts = []
    if len(parts) != 3 or not all(0 <= part < math.inf for part in parts) or sum(parts) <= 0:
        raise ConfigError(f"data.split: '{split}' is not three shares such as 99.9,0.05,0.05")
    return [part / sum(parts) for part in parts]


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
