"""From dataset folders or .bin/.idx prefixes to Megatron datasets and resumable micro-batches.

The sample order depends on the seed and the sample number alone: step k reads samples [k·G, (k+1)·G) of one shuffled
sequence, whatever the number of processes, and a resumed run goes on at the very next sample. Index caches are keyed
by the content of the data, so that re-made data never meets an old cache.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from megatron_lion.config import DataConfig, ModelConfig
from megatron_lion.data.indexed_check import IndexedInfo, check_indexed
from megatron_lion.data.manifest import NAME as MANIFEST_NAME
from megatron_lion.data.manifest import SPLITS, Manifest, read_manifest
from megatron_lion.data.tokenizers import Tokenizer, load_tokenizer
from megatron_lion.device import Device
from megatron_lion.errors import ConfigError, DataError
from megatron_lion.parallel import Ranks, derive_seed

DATA_KINDS = {"gpt2": "gpt", "bert": "bert"}
"""What `prepare --task` calls the data of each kind of model."""


@dataclass(frozen=True)
class Corpora:
    """The data of a run, checked.

    Attributes:
        prefixes: for each of train, valid, test the prefixes to draw from; the same list three times where the split
            is made by document position.
        infos: what each distinct prefix holds.
        weights: draw weights a path, or None for sizes.
        split: Megatron's split string for plain prefixes, None for dataset folders.
        tokenizer: of the data.
        vocab_size: ids before padding.
        digest: SHA-256 over the data's content hashes, weights and split: equal means the same data.
        settings: the config's section, for what is decided when samples are drawn (BERT's masking).
    """

    prefixes: dict[str, list[Path]]
    infos: dict[Path, IndexedInfo]
    weights: list[float] | None
    split: str | None
    tokenizer: Tokenizer | None
    vocab_size: int
    digest: str
    settings: DataConfig = field(default_factory=DataConfig)

    @property
    def train_tokens(self) -> int:
        total = sum(self.infos[prefix].num_tokens for prefix in self.prefixes["train"])
        return total if self.split is None else int(total * _shares(self.split)[0])


def open_corpora(data: DataConfig, model: ModelConfig) -> Corpora:
    """Opens and checks everything that `data.path` names; reads headers and hashes, not the tokens of prepared folders.

    Raises:
        ConfigError: no path, folders mixed with prefixes.
        DataError: files missing, damaged, of another tokenizer, or with ids beyond the vocabulary.
    """
    if not data.path:
        raise ConfigError(
            "data.path: no dataset given; make one with `megatron-lion prepare` and pass --data.path '[FOLDER]'"
        )
    paths = [Path(path) for path in data.path]
    folders = [path for path in paths if (path / MANIFEST_NAME).is_file()]
    if folders and len(folders) != len(paths):
        other = next(path for path in paths if path not in folders)
        raise ConfigError(
            f"data.path: {other} has no {MANIFEST_NAME} while {folders[0]} is a prepared dataset folder; give all folders or all prefixes"
        )
    return _open_folders(paths, data, model) if folders else _open_prefixes(paths, data, model)


def _open_folders(paths: Sequence[Path], data: DataConfig, model: ModelConfig) -> Corpora:
    manifests: list[Manifest] = [read_manifest(path) for path in paths]
    prefixes: dict[str, list[Path]] = {split: [] for split in SPLITS}
    infos: dict[Path, IndexedInfo] = {}
    for path, manifest in zip(paths, manifests, strict=True):
        if manifest.kind != DATA_KINDS[model.kind]:
            raise DataError(
                f"{path}: made for {manifest.kind}, model.kind is {model.kind}; make it again in another folder with "
                f"`megatron-lion prepare --task {DATA_KINDS[model.kind]}`, or give another model.kind"
            )
        if manifest.tokenizer.sha256 != manifests[0].tokenizer.sha256:
            raise DataError(
                f"{path}: tokenizer {manifest.tokenizer.sha256[:12]} differs from {manifests[0].tokenizer.sha256[:12]} "
                f"of {paths[0]}; prepare both with one --tokenizer"
            )
        for split, info in manifest.splits.items():
            prefix = path / info.prefix
            prefixes[split].append(prefix)
            infos[prefix] = check_indexed(prefix)
    for split in SPLITS:
        if len(prefixes[split]) != len(paths):
            raise DataError(
                f"{paths[0]}: the {split} split is empty; prepare again with a larger share for it (--split)"
            )
    vocab_size = _check_vocab_size(model, manifests[0].tokenizer.vocab_size, f"{paths[0]}/{MANIFEST_NAME}")
    tokenizer = load_tokenizer(data.tokenizer or paths[0] / "tokenizer")
    if tokenizer.sha256 != manifests[0].tokenizer.sha256:
        raise DataError(
            f"data.tokenizer: {data.tokenizer} has hash {tokenizer.sha256[:12]}, the data in {paths[0]} was made with "
            f"{manifests[0].tokenizer.sha256[:12]}; leave data.tokenizer out to take the data's own"
        )
    hashes = [[s.idx_sha256 + s.bin_sha256 for s in manifest.splits.values()] for manifest in manifests]
    return Corpora(prefixes, infos, data.weights, None, tokenizer, vocab_size, _digest([hashes, data.weights]), data)


def _open_prefixes(paths: Sequence[Path], data: DataConfig, model: ModelConfig) -> Corpora:
    infos = {path: check_indexed(path) for path in paths}
    for path, info in infos.items():
        _check_sequences(path, info, model.kind)
    tokenizer = load_tokenizer(data.tokenizer) if data.tokenizer else None
    if tokenizer is None and model.kind == "bert":
        raise ConfigError(
            "data.tokenizer: masking needs the vocabulary that the .bin/.idx files were made with; give its vocab.txt"
        )
    if tokenizer is None and model.vocab_size is None:
        raise ConfigError("model.vocab_size: plain .bin/.idx files do not say it; give it, or data.tokenizer")
    wanted = model.vocab_size or (tokenizer.vocab_size if tokenizer else 0)
    for path, info in infos.items():
        if info.num_tokens and info.max_token >= wanted:
            raise DataError(
                f"{path}.bin holds token id {info.max_token}, the vocabulary has {wanted} ids; "
                "give the tokenizer the data was made with, or a larger model.vocab_size"
            )
    _shares(data.split)
    hashes = [info.idx_sha256 + info.bin_sha256 for info in infos.values()]
    digest = _digest([hashes, data.weights, data.split])
    prefixes = {split: list(paths) for split in SPLITS}
    return Corpora(prefixes, infos, data.weights, data.split, tokenizer, wanted, digest, data)


def _check_sequences(path: Path, info: IndexedInfo, kind: str) -> None:
    """Tells sentences from documents where no manifest does."""
    by_sentences = info.num_sequences > info.num_documents
    if by_sentences == (kind == "bert"):
        return
    held = "sentences (several sequences a document)" if by_sentences else "whole documents (one sequence each)"
    raise DataError(
        f"{path}: holds {held}, model.kind is {kind}; make it with `megatron-lion prepare --task {DATA_KINDS[kind]}`, or with "
        f"Megatron-LM's preprocess_data {'with' if kind == 'bert' else 'without'} --split-sentences"
    )


def _check_vocab_size(model: ModelConfig, found: int, where: str) -> int:
    if model.vocab_size is not None and model.vocab_size < found:
        raise DataError(
            f"model.vocab_size: {model.vocab_size} is smaller than the {found} ids of the data ({where}); "
            "leave it out to take the data's"
        )
    return model.vocab_size or found


def _shares(split: str) -> list[float]:
    try:
        shares = [float(part) for part in split.split(",")]
    except ValueError:
        shares = []
    if len(shares) != 3 or not all(0 <= share < math.inf for share in shares) or sum(shares) <= 0:
        raise ConfigError(f"data.split: '{split}' is not three shares such as 99.9,0.05,0.05")
    return [share / sum(shares) for share in shares]


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


class _DatasetTokenizer:
    """What Megatron's datasets ask of a tokenizer, with a content hash in their cache key.

    There is no padding id: GPT samples are cut from one stream and are always full.
    """

    def __init__(self, vocab_size: int, eod: int, digest: str) -> None:
        self.vocab_size, self.eod, self.pad = vocab_size, eod, -1
        self.unique_identifiers = {"vocab_size": vocab_size, "eod": eod, "data": digest}


def build_datasets(
    corpora: Corpora,
    model: ModelConfig,
    num_samples: Sequence[int | None],
    *,
    seed: int,
    cache: Path,
) -> list[Any]:
    """Builds Megatron's train, validation and test datasets; index files are made on the first rank and shared.

    Args:
        corpora: from `open_corpora`.
        model: for the sequence length.
        num_samples: how many samples of each split are needed; 0 builds none.
        seed: of the shuffle and of BERT's masks.
        cache: folder for the index files; a subfolder a content digest.

    Returns:
        Three datasets (or None). For GPT-2 item i is a dict of int64 [S] tokens, labels, position_ids and float [S]
        loss_mask; for BERT see `BertDataset`.
    """
    blends = []
    for split, count in zip(SPLITS, num_samples, strict=True):
        paths = [str(prefix) for prefix in corpora.prefixes[split]]
        blends.append((paths, corpora.weights) if count else None)
    common: dict[str, Any] = {
        "random_seed": seed,
        "sequence_length": model.seq_length,
        "path_to_cache": str(cache / corpora.digest[:16]),
    }
    dataset_class, config_class, special = _dataset_classes(corpora, model, num_samples)
    common.update(special)
    if corpora.split is None:
        settings = config_class(blend_per_split=blends, **common)
    else:
        settings = config_class(blend=(paths, corpora.weights), split=corpora.split, **common)
    sizes = [count or None for count in num_samples]
    if corpora.split is not None:
        sizes = [count or 1 for count in num_samples]
    try:
        built = BlendedMegatronDatasetBuilder(dataset_class, sizes, lambda: True, settings).build()
    except (AssertionError, IndexError, ValueError, ZeroDivisionError) as error:
        raise DataError(
            f"{corpora.prefixes['train'][0]}: too little data for samples of {model.seq_length} tokens in every split "
            f"({error}); give more text, a shorter model.seq_length or larger shares"
        ) from error
    return [dataset if count else None for dataset, count in zip(built, num_samples, strict=True)]


def _parts_in_use(corpora: Corpora, num_samples: Sequence[int | None]) -> Iterator[tuple[IndexedInfo, float, float]]:
    """The documents that datasets are built of: the files of each split, and the shares of them where it begins and ends."""
    ends = [0.0, *np.cumsum(_shares(corpora.split))] if corpora.split else None
    for number, (split, count) in enumerate(zip(SPLITS, num_samples, strict=True)):
        begin, end = (float(ends[number]), float(ends[number + 1])) if ends else (0.0, 1.0)
        # Where the split is made by position, Megatron builds all three that have a share.
        if begin < end if ends else count:
            for prefix in corpora.prefixes[split]:
                yield corpora.infos[prefix], begin, end


def check_documents(info: IndexedInfo, begin: float, end: float) -> None:
    """Refuses a part of the documents that is empty: Megatron's index counts its epochs for ever.

    Args:
        info: the files.
        begin, end: the part, as shares of the documents.

    Raises:
        DataError: no document is in it.
    """
    first, last = round(begin * info.num_documents), round(end * info.num_documents)
    if first == last or info.num_tokens == 0:
        raise DataError(
            f"{info.prefix}: too little data: none of its {info.num_documents} documents is in the part from "
            f"{begin:.2%} to {end:.2%}; give more text, or larger shares (or 0) in data.split"
        )


def _dataset_classes(
    corpora: Corpora, model: ModelConfig, num_samples: Sequence[int | None]
) -> tuple[Any, Any, dict[str, Any]]:
    """Megatron's dataset and config class for a kind of model, and the settings that only these have."""
    if model.kind == "bert":
        from megatron_lion.data import bert_datasets as bert

        assert corpora.tokenizer is not None, "open_corpora has asked for it"
        for info, begin, end in _parts_in_use(corpora, num_samples):
            bert.check_sentences(info, begin, end)
        special = bert.bert_settings(corpora.tokenizer, corpora.digest, corpora.settings)
        return bert.BertDataset, bert.BertDatasetConfig, special
    for info, begin, end in _parts_in_use(corpora, num_samples):
        check_documents(info, begin, end)
    eod = corpora.tokenizer.eod_id if corpora.tokenizer is not None else corpora.vocab_size - 1
    return (
        GPTDataset,
        GPTDatasetConfig,
        {
            "tokenizer": _DatasetTokenizer(corpora.vocab_size, eod, corpora.digest),
            "reset_position_ids": False,
            "reset_attention_mask": False,
            "eod_mask_loss": False,
            "create_attention_mask": False,
        },
    )


def sample_ids(start: int, step_samples: int, micro_batch_size: int, ranks: Ranks) -> Iterator[list[int]]:
    """Sample numbers of this data rank's micro-batches from `start` on, for ever.

    Micro-batch j of a global batch takes, over all data ranks, the j-th run of `micro_batch_size × dp_size` samples.

    Example:
        >>> one = Ranks(0, 1, 0, 1, 0, 1, 0, 1)
        >>> batches = sample_ids(8, 4, 2, one)
        >>> next(batches), next(batches), next(batches)
        ([8, 9], [10, 11], [12, 13])
    """
    width = micro_batch_size * ranks.dp_size
    while True:
        for first in range(start + ranks.dp_rank * micro_batch_size, start + step_samples, width):
            yield list(range(first, first + micro_batch_size))
        start += step_samples


class _Sampler:
    def __init__(self, start: int, end: int, step_samples: int, micro_batch_size: int, ranks: Ranks) -> None:
        self.arguments = (start, step_samples, micro_batch_size, ranks)
        self.count = (end - start) // (micro_batch_size * ranks.dp_size)

    def __iter__(self) -> Iterator[list[int]]:
        ids = sample_ids(*self.arguments)
        for _ in range(self.count):
            yield next(ids)

    def __len__(self) -> int:
        return self.count


def micro_batches(
    dataset: Any,
    *,
    start: int,
    end: int,
    global_batch_size: int,
    micro_batch_size: int,
    ranks: Ranks,
    device: Device,
    num_workers: int | None = None,
) -> Iterator[dict[str, torch.Tensor]]:
    """Yields this rank's micro-batches of samples [start, end) on the device, read ahead by worker processes.

    Args:
        dataset: from `build_datasets`.
        start, end: sample numbers; both multiples of `global_batch_size`.
        num_workers: default 2 with CUDA, 0 on CPU. The default random state is not touched.
    """
    workers = num_workers if num_workers is not None else (2 if device.kind == "cuda" else 0)
    loader: torch.utils.data.DataLoader[Any] = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=_Sampler(start, end, global_batch_size, micro_batch_size, ranks),
        num_workers=workers,
        pin_memory=device.kind == "cuda",
        generator=torch.Generator().manual_seed(derive_seed(start, "loader")),
    )
    for batch in loader:
        yield {
            key: value.to(device.torch_device, non_blocking=True)
            for key, value in batch.items()
            if key != "dataset_id"  # which of the blended corpora each sample is from
        }
