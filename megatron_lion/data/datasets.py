"""Builds Megatron's datasets from a run's corpora and yields resumable micro-batches of them.

The sample order depends on the seed and the sample number alone. Step k reads samples [k·G, (k+1)·G) of one shuffled
sequence at any number of processes (G: global batch size), so a resumed run continues with the next sample. Index
caches are keyed by the content of the data: a cache keyed by path gave 152 of 289 wrong samples after the data at that
path had been made again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from megatron_lion.config import ModelConfig
from megatron_lion.data import loader_workers
from megatron_lion.data.blends import index_contents, open_datasets
from megatron_lion.data.corpora import Corpora, check_splits, shares
from megatron_lion.data.index_cache import Content, index_folder
from megatron_lion.data.indexed_check import IndexedInfo, sequence_lengths
from megatron_lion.data.manifest import SPLITS
from megatron_lion.device import Device
from megatron_lion.errors import DataError
from megatron_lion.files import storage_errors
from megatron_lion.parallel import Ranks, agree, derive_seed
from megatron_lion.signals import obey_only_the_parent


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


def sample_ids(start: int, step_samples: int, micro_batch_size: int, ranks: Ranks) -> Iterator[list[int]]:
    """Yields the sample numbers of this data rank's micro-batches from `start` on, without end.

    Micro-batch j of a global batch takes, over all data ranks, the j-th run of `micro_batch_size × dp_size` samples.
    So the samples of a step are the same at every data-parallel size; only their distribution over ranks differs.

    Args:
        start: number of the first sample of a global batch.
        step_samples: samples of a global batch over all ranks.
        micro_batch_size: samples of a micro-batch on one rank.
        ranks: this process's place; the data-parallel rank and size are used.

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
    vocab_size: int | None = None,
    timeout_s: float = 600,
) -> Iterator[dict[str, torch.Tensor]]:
    """Yields this rank's micro-batches of samples [start, end) on the device, read ahead by worker processes.

    The default random state does not change.

    Args:
        dataset: from `build_datasets`.
        start, end: sample numbers, both multiples of `global_batch_size`.
        global_batch_size: samples of a step over all ranks.
        micro_batch_size: samples of a micro-batch on one rank.
        ranks: this process's place among the ranks.
        device: target device of the tensors.
        num_workers: worker processes; None starts 2 with CUDA and none on CPU.
        vocab_size: number of ids of the vocabulary, to detect a damaged token file; None skips this check.
        timeout_s: longest wait for a batch of the workers, seconds.

    Yields:
        Dictionaries of (micro_batch_size, …) tensors, with the keys of the dataset's items.

    Raises:
        DataError: a token id is beyond the vocabulary.
        WorkerError: the workers sent no batch in time.
    """
    workers = num_workers if num_workers is not None else (2 if device.kind == "cuda" else 0)
    # With other ranks a little earlier than the collective in which they wait: they then name the cause.
    limit_s = timeout_s - (min(10.0, timeout_s / 5) if ranks.world_size > 1 else 0.0)
    loader: torch.utils.data.DataLoader[Any] = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=_Sampler(start, end, global_batch_size, micro_batch_size, ranks),
        num_workers=workers,
        pin_memory=device.kind == "cuda",  # only a copy from pinned memory runs beside the kernels (non_blocking below)
        # A loader draws its workers' base seed. From the default generator, every held-out loss and every probe would
        # advance the state that dropout uses, and a resumed run would no longer repeat bit for bit.
        generator=torch.Generator().manual_seed(derive_seed(start, "loader")),
        timeout=limit_s if workers else 0,
        worker_init_fn=obey_only_the_parent,
    )
    for batch in loader_workers.read_batches(loader, limit_s, ranks.rank):
        if vocab_size is not None:
            _check_ids(batch["tokens"], vocab_size)
        yield {
            key: value.to(device.torch_device, non_blocking=True)
            for key, value in batch.items()
            if key != "dataset_id"  # which of the blended corpora each sample is from
        }


def _check_ids(tokens: torch.Tensor, vocab_size: int) -> None:
    """Rejects ids beyond the vocabulary, for which the embedding fails without naming the data or reads other memory.

    The tokens are on the CPU here, so the check does not wait for the device.
    """
    low, high = (int(end) for end in torch.aminmax(tokens))
    if low < 0 or high >= vocab_size:
        raise DataError(
            f"the data holds token id {high if high >= vocab_size else low}, the vocabulary has {vocab_size}: a .bin file is damaged, "
            "or was made with another tokenizer; prepare the data again"
        )
