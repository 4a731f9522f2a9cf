"""Samples read through the index cache, and by Megatron's own builder, for the tests of the cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from megatron_lion.config import DataConfig, ModelConfig, ProbeConfig
from megatron_lion.data.corpora import Corpora, open_corpora
from megatron_lion.data.datasets import _DatasetTokenizer, build_datasets
from megatron_lion.data.index_cache import LISTING
from megatron_lion.data.probe_samples import open_probe_samples
from megatron_lion.device import Device
from megatron_lion.parallel import process_groups

MODEL = ModelConfig(seq_length=16, vocab_size=tiny.VOCAB, make_vocab_size_divisible_by=8)
BERT = ModelConfig(kind="bert", seq_length=64, make_vocab_size_divisible_by=64)
COUNT = 24
DAMAGE: dict[str, Callable[[bytes], bytes | None]] = {
    "zeros": lambda content: content[:128] + bytes(len(content) - 128),
    "cut": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "flipped": lambda content: content[:-9] + bytes([content[-9] ^ 4]) + content[-8:],
    "missing": lambda content: None,
}


def opened(paths: list[str], weights: list[float] | None = None) -> Corpora:
    return open_corpora(DataConfig(path=paths, split="80,10,10", weights=weights), MODEL)


def tokens_of(dataset: Any) -> np.ndarray:
    return np.stack([np.asarray(dataset[number]["tokens"]) for number in range(COUNT)])


def read_gpt(paths: list[str], weights: list[float] | None, cache: Path, seed: int = 7) -> np.ndarray:
    return tokens_of(build_datasets(opened(paths, weights), MODEL, (COUNT, 0, 0), seed=seed, cache=cache)[0])


def read_bert(path: str, cache: Path) -> np.ndarray:
    corpus = open_corpora(DataConfig(path=[path]), BERT)
    with process_groups(Device("cpu", 0, "gloo")):
        return tokens_of(build_datasets(corpus, BERT, (COUNT, 0, 0), seed=7, cache=cache)[0])


def read_probe(paths: list[str], cache: Path) -> np.ndarray:
    probe = ProbeConfig(num_batches=COUNT // 8, data="fresh")
    return tokens_of(open_probe_samples(opened(paths), MODEL, probe, 8, seed=7, cache=cache).at(3))


def megatrons_own(paths: list[str], weights: list[float] | None, folder: Path, seed: int = 7) -> np.ndarray:
    """Returns the samples that Megatron's own builder gives, with its cache in `folder`."""
    found = opened(paths, weights)
    tokenizer = _DatasetTokenizer(tiny.VOCAB, tiny.VOCAB - 1, found.digest)
    config = GPTDatasetConfig(
        random_seed=seed, sequence_length=16, blend=(paths, weights), split="80,10,10", path_to_cache=str(folder), tokenizer=tokenizer,
        reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False,
    )  # fmt: skip
    return tokens_of(BlendedMegatronDatasetBuilder(GPTDataset, [COUNT, 1, 1], lambda: True, config).build()[0])


def index_files(cache: Path, ending: str = "") -> list[Path]:
    found = sorted(path for path in cache.glob(f"*/*{ending}") if path.name != LISTING or ending == LISTING)
    assert found
    return found


def reported(caplog: pytest.LogCaptureFixture) -> list[str]:
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("megatron_lion")]
    caplog.clear()
    return lines


def left_in(cache: Path) -> list[str]:
    """Names in the cache that are neither a folder of index files nor its lock."""
    return [
        path.name
        for path in cache.iterdir()
        if path.name.startswith(".") or not (path.is_dir() or path.suffix == ".lock")
    ]
