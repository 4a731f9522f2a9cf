"""From dataset folders or .bin/.idx prefixes to Megatron datasets and resumable micro-batches.

The sample order depends on the seed and the sample number alone: step k reads samples [k·G, (k+1)·G) of one shuffled
sequence, whatever the number of processes, and a resumed run goes on at the very next sample. Index caches are keyed
by the content of the data, so that re-made data never meets an old cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from megatron_lion.config import ModelConfig
from megatron_lion.data.corpora import Corpora, shares
from megatron_lion.data.indexed_check import IndexedInfo
from megatron_lion.data.manifest import SPLITS
from megatron_lion.device import Device
from megatron_lion.errors import DataError
from megatron_lion.parallel import Ranks, derive_seed
from megatron_lion.signals import GROUP_SIGNALS, blocked, obey_only_the_parent


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
    ends = [0.0, *np.cumsum(shares(corpora.split))] if corpora.split else None
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
    vocab_size: int | None = None,
) -> Iterator[dict[str, torch.Tensor]]:
    """Yields this rank's micro-batches of samples [start, end) on the device, read ahead by worker processes.

    Args:
        dataset: from `build_datasets`.
        start, end: sample numbers; both multiples of `global_batch_size`.
        num_workers: default 2 with CUDA, 0 on CPU. The default random state is not touched.
        vocab_size: ids of the vocabulary, to tell a damaged token file by.

    Raises:
        DataError: an id beyond the vocabulary.
    """
    workers = num_workers if num_workers is not None else (2 if device.kind == "cuda" else 0)
    loader: torch.utils.data.DataLoader[Any] = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=_Sampler(start, end, global_batch_size, micro_batch_size, ranks),
        num_workers=workers,
        pin_memory=device.kind == "cuda",
        generator=torch.Generator().manual_seed(derive_seed(start, "loader")),
        worker_init_fn=obey_only_the_parent,
    )
    # A worker calls obey_only_the_parent only after it has set itself up. Every test of the held-out loss and every
    # probe starts new workers, and a signal to the process group in these milliseconds would kill one.
    with blocked(GROUP_SIGNALS):
        batches = iter(loader)
    for batch in batches:
        if vocab_size is not None:
            _check_ids(batch["tokens"], vocab_size)
        yield {
            key: value.to(device.torch_device, non_blocking=True)
            for key, value in batch.items()
            if key != "dataset_id"  # which of the blended corpora each sample is from
        }


def _check_ids(tokens: torch.Tensor, vocab_size: int) -> None:
    """Before the embedding meets them: beyond its end it fails without a word of the data, or reads what is not there."""
    low, high = (int(end) for end in torch.aminmax(tokens))
    if low < 0 or high >= vocab_size:
        raise DataError(
            f"the data holds token id {high if high >= vocab_size else low}, the vocabulary has {vocab_size}: a .bin file is damaged, "
            "or of another tokenizer; prepare it again"
        )
