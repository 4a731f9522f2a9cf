"""Several corpora without weights: in proportion to their sizes, for as many passes as needed."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_bert
from distributed import run_distributed
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from megatron_lion.config import DataConfig, ModelConfig, ProbeConfig
from megatron_lion.data.corpora import open_corpora
from megatron_lion.data.datasets import _DatasetTokenizer, build_datasets
from megatron_lion.data.indexed_writer import IndexedWriter
from megatron_lion.data.probe_samples import open_probe_samples, samples_in_one_pass
from megatron_lion.device import Device
from megatron_lion.errors import ConfigError, DataError
from megatron_lion.parallel import process_groups

MODEL = ModelConfig(seq_length=16, vocab_size=tiny.VOCAB, make_vocab_size_divisible_by=8)
DOCUMENTS = (30, 12, 5)


def write_numbered(prefix: Path, first: int, count: int) -> str:
    """Writes documents of 33 tokens; document i repeats the id first + i."""
    with IndexedWriter(prefix, tiny.VOCAB) as writer:
        for token in range(first, first + count):
            writer.add_document(np.full(33, token))
        writer.finalize()
    return str(prefix)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three corpora whose ids tell the corpus and the document."""
    folder = tmp_path_factory.mktemp("numbered")
    firsts = np.cumsum([0, *DOCUMENTS])
    return [
        write_numbered(folder / f"c{first}", int(first), count) for first, count in zip(firsts, DOCUMENTS, strict=False)
    ]


def megatrons_own(paths: list[str], weights: list[float] | None, count: int, folder: Path) -> list[np.ndarray]:
    """Returns the tokens of the samples that Megatron's own builder gives; without weights it ends after one pass."""
    found = open_corpora(DataConfig(path=paths, split="100,0,0", weights=weights), MODEL)
    config = GPTDatasetConfig(
        random_seed=7, sequence_length=16, blend=(paths, weights), split="100,0,0", path_to_cache=str(folder),
        tokenizer=_DatasetTokenizer(tiny.VOCAB, tiny.VOCAB - 1, found.digest), reset_position_ids=False,
        reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False,
    )  # fmt: skip
    dataset = BlendedMegatronDatasetBuilder(GPTDataset, [count, 1, 1], lambda: True, config).build()[0]
    return [dataset[number]["tokens"].numpy() for number in range(min(count, len(dataset)))]


def ours(paths: list[str], weights: list[float] | None, count: int, cache: Path) -> list[np.ndarray]:
    found = open_corpora(DataConfig(path=paths, split="100,0,0", weights=weights), MODEL)
    dataset = build_datasets(found, MODEL, (count, 0, 0), seed=7, cache=cache)[0]
    assert len(dataset) >= count
    return [dataset[number]["tokens"].numpy() for number in range(count)]


@pytest.mark.parametrize(
    ("number", "weights", "count"),
    [(1, None, 40), (1, None, 200), (3, None, 60), (3, [5.0, 1.0, 1.0], 60), (3, [1.0, 1.0, 4.0], 300)],
)
def test_samples_of_runs_that_worked_before_are_unchanged(
    paths: list[str], tmp_path: Path, number: int, weights: list[float] | None, count: int
) -> None:
    """One corpus, weights, or one pass: Megatron's own builder, which was used directly before, is the oracle."""
    expected = megatrons_own(paths[:number], weights, count, tmp_path / "megatron")
    assert len(expected) == count
    assert np.array_equal(ours(paths[:number], weights, count, tmp_path / "ours"), expected)


def test_later_passes_keep_the_first_and_the_proportions(paths: list[str], tmp_path: Path) -> None:
    sizes = [33 * count for count in DOCUMENTS]
    one_pass = sum((size - 1) // 16 for size in sizes)
    count = 4 * one_pass + 17
    expected = megatrons_own(paths, None, count, tmp_path / "megatron")
    assert len(expected) == one_pass, "Megatron ends the blend"
    samples = ours(paths, None, count, tmp_path / "ours")
    assert np.array_equal(samples[:one_pass], expected)
    ends = np.cumsum(DOCUMENTS)
    for until in (one_pass, 2 * one_pass, count):
        tokens = Counter(int(token) for sample in samples[:until] for token in sample)
        for begin, end, size in zip([0, *ends], ends, sizes, strict=False):
            share = sum(tokens[token] for token in range(begin, end)) / tokens.total()
            assert share == pytest.approx(size / sum(sizes), abs=2 / until)
    tokens = Counter(int(token) for sample in samples for token in sample)
    # 4.17 passes of 33 tokens: a document is read 4 or 5 times, but for what the ends of passes and samples cut off.
    assert min(tokens.values()) >= 33 * 3
    assert max(tokens.values()) <= 33 * 6
    later = np.stack(samples[one_pass : 2 * one_pass])
    assert not np.array_equal(later, np.stack(samples[:one_pass])), "another order"


@pytest.mark.parametrize("seed", range(6))
def test_any_sizes_and_numbers_of_passes(tmp_path: Path, seed: int) -> None:
    dice = np.random.default_rng(seed)
    number = int(dice.integers(2, 7))
    corpora = [
        tiny.write_corpus(tmp_path / f"c{index}", seed=seed, documents=int(dice.integers(1, 40)))
        for index in range(number)
    ]
    sizes = [(Path(f"{path}.bin").stat().st_size // 2 - 1) // 16 for path in corpora]
    if min(sizes) == 0:
        sizes, corpora = zip(*[pair for pair in zip(sizes, corpora, strict=True) if pair[0]], strict=True)
    count = int(sum(sizes) * dice.uniform(0.5, 9)) + 1
    found = open_corpora(DataConfig(path=list(corpora), split="100,0,0"), MODEL)
    dataset = build_datasets(found, MODEL, (count, 0, 0), seed=7, cache=tmp_path / "cache")[0]
    assert len(dataset) == count
    if len(corpora) > 1:
        drawn = Counter(int(dataset[index]["dataset_id"]) for index in range(count))
        for index, size in enumerate(sizes):
            assert drawn[index] == pytest.approx(count * size / sum(sizes), abs=3)


def test_a_part_too_small_for_a_sample_is_named_with_its_tokens(paths: list[str], tmp_path: Path) -> None:
    short = write_numbered(tmp_path / "short", 0, 1)
    model = dataclasses.replace(MODEL, seq_length=33)
    found = open_corpora(DataConfig(path=[paths[0], short], split="100,0,0"), model)
    with pytest.raises(
        DataError, match=r"short: too little data: the part from 0.00% to 100.00% has 33 tokens, 34 are needed"
    ):
        build_datasets(found, model, (8, 0, 0), seed=7, cache=tmp_path / "cache")
    weighted = open_corpora(DataConfig(path=[paths[0], short], split="100,0,0", weights=[1.0, 1.0]), model)
    assert len(build_datasets(weighted, model, (8, 0, 0), seed=7, cache=tmp_path / "cache")[0]) >= 8


def test_weights_that_no_few_samples_can_follow(tmp_path: Path) -> None:
    corpora = [tiny.write_corpus(tmp_path / f"c{index}", seed=index, documents=4) for index in range(60)]
    weights = [100.0] + [0.5] * 59
    found = open_corpora(DataConfig(path=corpora, split="100,0,0", weights=weights), MODEL)
    with pytest.raises(DataError, match=r"data\.weights: .* over 60 corpora draw more samples from one of them"):
        build_datasets(found, MODEL, (8, 0, 0), seed=7, cache=tmp_path / "cache")


def test_a_probe_reads_no_sample_twice(paths: list[str], tmp_path: Path) -> None:
    found = open_corpora(DataConfig(path=paths, split="100,0,0"), MODEL)
    one_pass = sum((33 * count - 1) // 16 for count in DOCUMENTS)
    dataset = build_datasets(found, MODEL, (3 * one_pass, 0, 0), seed=7, cache=tmp_path)[0]
    assert samples_in_one_pass(dataset) == one_pass
    probe = ProbeConfig(num_batches=one_pass // 4 + 1)
    with pytest.raises(ConfigError, match=rf"holds {one_pass} of 16 tokens; give at most {one_pass // 4} batches"):
        open_probe_samples(found, MODEL, probe, 4, seed=7, cache=tmp_path)


def test_several_corpora_of_sentences(tmp_path: Path) -> None:
    model = ModelConfig(kind="bert", seq_length=32, make_vocab_size_divisible_by=64)
    corpora = [
        tiny_bert.write_bert_corpus(tmp_path / name, tiny_bert.documents(count, 12, seed=count))
        for name, count in (("a", 60), ("b", 20))
    ]
    found = open_corpora(DataConfig(path=corpora), model)
    with process_groups(Device("cpu", 0, "gloo")):
        first, *_ = build_datasets(found, model, (10, 0, 0), seed=7, cache=tmp_path / "cache")
        one_pass = samples_in_one_pass(first)
        count = 3 * one_pass
        dataset = build_datasets(found, model, (count, 10, 10), seed=7, cache=tmp_path / "cache")[0]
        assert len(dataset) == count
        drawn = Counter(int(dataset[index]["dataset_id"]) for index in range(count))
        again = build_datasets(found, model, (count, 10, 10), seed=7, cache=tmp_path / "cache")[0]
        assert np.array_equal(dataset[count - 1]["tokens"], again[count - 1]["tokens"])
    tokens = [Path(path, "train_text_sentence.bin").stat().st_size for path in corpora]
    # A size is a number of samples, which follows the tokens only about: documents end samples early.
    assert drawn[0] / count == pytest.approx(tokens[0] / sum(tokens), abs=0.05)


def train_all(rank: int, configs: dict[str, Any]) -> dict[str, Any]:
    return {name: (tiny.error_of(tiny.train, config), tiny.outcome(config.run_dir)) for name, config in configs.items()}


def long_run(folder: Path) -> Any:
    """Returns the config of a run of three passes, with held-out measurements of several passes."""
    corpora = [tiny.write_corpus(folder / name, seed=seed, documents=16) for name, seed in (("a", 1), ("b", 2))]
    config = tiny.tiny_config(
        folder / "whole", corpora[0], train__micro_batch_size=4, train__steps=22, train__test_every=10, train__test_batches=5
    )  # fmt: skip
    return dataclasses.replace(config, data=dataclasses.replace(config.data, path=corpora))


def test_a_run_of_several_passes_ends_and_resumes(tmp_path: Path) -> None:
    """Stopped in the second pass, where it once ended with an IndexError that came again with every start."""
    config = long_run(tmp_path)
    cut = dataclasses.replace(config, run_dir=str(tmp_path / "cut"))
    half = dataclasses.replace(cut, train=dataclasses.replace(cut.train, stop_after=13))
    results = run_distributed(train_all, 1, {"whole": config, "half": half, "cut": cut})[0]
    assert [error for error, _ in results.values()] == [("", "")] * 3
    whole = results["whole"][1]
    assert len(whole["losses"]) == 22
    assert results["cut"][1]["losses"] == whole["losses"]
    assert results["cut"][1]["manifest"]["state_fingerprint"] == whole["manifest"]["state_fingerprint"]


@pytest.mark.slow
def test_a_run_of_several_passes_on_two_processes(tmp_path: Path) -> None:
    config = long_run(tmp_path)
    two = dataclasses.replace(config, run_dir=str(tmp_path / "two"))
    half = dataclasses.replace(two, train=dataclasses.replace(two.train, stop_after=13))
    whole = run_distributed(train_all, 1, {"": config})[0][""][1]
    results = run_distributed(train_all, 2, {"half": half, "two": two})[0]
    assert [error for error, _ in results.values()] == [("", "")] * 2
    assert results["two"][1]["losses"] == pytest.approx(whole["losses"], abs=1e-5)
