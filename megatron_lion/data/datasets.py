"""Builds Megatron's datasets from a run's corpora.

The sample order depends on the seed and the sample number alone. Index caches are keyed by the content of the data: a
cache keyed by path gave 152 of 289 wrong samples after the data at that path had been made again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from megatron_lion.config import ModelConfig
from megatron_lion.data.blends import index_contents, open_datasets
from megatron_lion.data.corpora import Corpora, check_splits, shares
from megatron_lion.data.index_cache import Content, index_folder
from megatron_lion.data.indexed_check import IndexedInfo, sequence_lengths
from megatron_lion.data.manifest import SPLITS
from megatron_lion.errors import DataError
from megatron_lion.files import storage_errors
from megatron_lion.parallel import agree


class _DatasetTokenizer:
    """The attributes of a tokenizer that Megatron's GPT dataset reads, with a content hash for its cache key.

    The padding id is -1, no token's id: GPT samples are cut from one stream and are always full.
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
    """Builds Megatron's train, validation and test datasets; a collective call.

    Args:
        corpora: from `open_corpora`.
        model: model settings; the kind and the sequence length are used.
        num_samples: number of samples needed of train, valid and test; 0 builds no dataset.
        seed: seed of the shuffle and of BERT's masks.
        cache: folder for the index files, with one subfolder for each content digest, seed and number of samples.

    Returns:
        Three datasets, None for a split with 0 samples. For GPT-2, item i is a dict of int64 (S,) tokens, labels,
        position_ids and float32 (S,) loss_mask. For BERT see `BertDataset`.

    Raises:
        DataError: a split is absent, has too few documents or tokens for a sample, or fewer samples than will be read.
        StorageError: the index files cannot be written or read.
        BusyError: another job is building the same index files.
    """
    check_splits(corpora, num_samples)
    dataset_class, config_class, special = _dataset_classes(corpora, model, num_samples)
    common: dict[str, Any] = {"random_seed": seed, "sequence_length": model.seq_length, **special}
    paths = {split: [str(prefix) for prefix in corpora.prefixes[split]] for split in SPLITS}
    if corpora.split is None:
        sizes = [count or None for count in num_samples]
        common["blend_per_split"] = [
            (paths[split], corpora.weights) if size else None for split, size in zip(SPLITS, sizes, strict=True)
        ]
    else:
        # Megatron then builds every split that has a share, wanted or not, and needs a size for each.
        sizes = [count or 1 for count in num_samples]
        common.update(blend=(paths["train"], corpora.weights), split=corpora.split)

    def opened(folder: Path) -> list[Any]:
        return open_datasets(dataset_class, config_class(path_to_cache=str(folder), **common), sizes)

    def build(folder: Path) -> list[Content]:
        try:
            datasets = opened(folder)
        except IndexError as error:  # Megatron gives each corpus its share of the samples and 0.5 % more
            raise DataError(
                f"data.weights: {corpora.weights} over {len(paths['train'])} corpora draw more samples from one of them than its "
                f"share of {sizes}: too few samples for so many corpora; give fewer corpora, or a larger train.test_batches, "
                "train.steps or train.global_batch_size"
            ) from error
        return [content for dataset in datasets if dataset is not None for content in index_contents(dataset)]

    key = {
        "megatron_core": metadata.version("megatron-core"), "class": dataset_class.__name__, "samples": sizes,
        "settings": json.loads(json.dumps(common, default=lambda value: value.unique_identifiers)),
    }  # fmt: skip
    folder = index_folder(cache, corpora.digest, key, build)
    with agree("opening the index files"), storage_errors(folder, "read"):
        datasets = [dataset if count else None for dataset, count in zip(opened(folder), num_samples, strict=True)]
        _check_lengths(datasets, num_samples, corpora, model)
    return datasets


def _check_lengths(
    datasets: Sequence[Any], num_samples: Sequence[int | None], corpora: Corpora, model: ModelConfig
) -> None:
    """Rejects datasets with fewer samples than will be read, before the first step."""
    for split, dataset, count in zip(SPLITS, datasets, num_samples, strict=True):
        found = 0 if dataset is None else len(dataset)
        if count and found < count:
            fewer = "train.steps" if split == "train" else "train.test_batches or probe.num_batches"
            raise DataError(
                f"{corpora.prefixes[split][0]}: the {split} data holds {found:,} samples of {model.seq_length:,} tokens, {count:,} "
                f"will be read; give more text, a larger share in data.split, or a smaller {fewer}"
            )


def _parts_in_use(corpora: Corpora, num_samples: Sequence[int | None]) -> Iterator[tuple[IndexedInfo, float, float]]:
    """Yields (files, begin, end) for the documents of each split that is built; begin and end are shares in [0, 1]."""
    ends = [0.0, *np.cumsum(shares(corpora.split))] if corpora.split else None
    for number, (split, count) in enumerate(zip(SPLITS, num_samples, strict=True)):
        begin, end = (float(ends[number]), float(ends[number + 1])) if ends else (0.0, 1.0)
        # If the split is made by position, Megatron builds all three that have a share.
        if begin < end if ends else count:
            for prefix in corpora.prefixes[split]:
                yield corpora.infos[prefix], begin, end


def check_documents(info: IndexedInfo, begin: float, end: float, needed: int = 1) -> None:
    """Rejects a part of the documents with too few tokens. For an empty part Megatron would loop without end.

    Args:
        info: the pair of token files.
        begin, end: range of the documents, as shares in [0, 1].
        needed: tokens that the part must have.

    Raises:
        DataError: the part has fewer tokens.
    """
    # Rounded as Megatron rounds its split matrix; another rounding would check other documents.
    first, last = round(begin * info.num_sequences), round(end * info.num_sequences)
    tokens = int(sequence_lengths(info)[first:last].sum(dtype=np.int64))
    more = "give more text, or larger shares (or 0) in data.split"
    if tokens == 0:
        raise DataError(
            f"{info.prefix}: too little data: none of its {info.num_documents} documents is in the part from "
            f"{begin:.2%} to {end:.2%}; {more}"
        )
    if tokens < needed:
        raise DataError(
            f"{info.prefix}: too little data: the part from {begin:.2%} to {end:.2%} has {tokens:,} tokens, {needed:,} are needed "
            f"for one sample (model.seq_length and its last label); {more}, or data.weights"
        )


def _dataset_classes(
    corpora: Corpora, model: ModelConfig, num_samples: Sequence[int | None]
) -> tuple[Any, Any, dict[str, Any]]:
    """Returns Megatron's dataset class, its config class and the settings that only this kind of model has."""
    if model.kind == "bert":
        from megatron_lion.data import bert_datasets as bert

        assert corpora.tokenizer is not None, "open_corpora requires a tokenizer for BERT"
        for info, begin, end in _parts_in_use(corpora, num_samples):
            bert.check_sentences(info, begin, end)
        special = bert.bert_settings(corpora.tokenizer, corpora.digest, corpora.settings)
        return bert.BertDataset, bert.BertDatasetConfig, special
    # Several corpora without weights are blended by their numbers of samples in one pass; none may be 0.
    needed = model.seq_length + 1 if len(corpora.prefixes["train"]) > 1 and corpora.weights is None else 1
    for info, begin, end in _parts_in_use(corpora, num_samples):
        check_documents(info, begin, end, needed)
    # Without a tokenizer the last id stands in: no mask or position is reset at this token, so its value has no effect.
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
