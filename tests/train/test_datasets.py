"""Samples depend only on the seed, the content of the data and the sample number."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from megatron_lion.config import DataConfig, ModelConfig
from megatron_lion.configfile import load_config
from megatron_lion.data.batches import micro_batches, sample_ids
from megatron_lion.data.corpora import open_corpora
from megatron_lion.data.datasets import _parts_in_use, build_datasets
from megatron_lion.data.indexed_writer import IndexedWriter
from megatron_lion.device import Device
from megatron_lion.errors import ConfigError, DataError
from megatron_lion.parallel import Ranks

MODEL = ModelConfig(seq_length=16, vocab_size=tiny.VOCAB, make_vocab_size_divisible_by=8)
CPU = Device("cpu", 0, "gloo")
GLOBAL = 8


def place(rank: int, size: int) -> Ranks:
    """Returns the ranks of one data-parallel process."""
    return Ranks(rank, size, rank, size, 0, 1, 0, 1)


def datasets(
    paths: list[str], cache: Path, counts: tuple[int, int, int] = (40, 0, 0), *, seed: int = 7, **data: Any
) -> Any:
    config = DataConfig(path=paths, **{"split": "80,10,10", **data})
    return build_datasets(open_corpora(config, MODEL), MODEL, counts, seed=seed, cache=cache)


def batches_of(dataset: Any, ranks: Ranks, micro: int, *, start: int = 0, steps: int = 3) -> list[np.ndarray]:
    found = micro_batches(
        dataset, start=start, end=start + steps * GLOBAL, global_batch_size=GLOBAL, micro_batch_size=micro,
        ranks=ranks, device=CPU,
    )  # fmt: skip
    return [batch["tokens"].numpy() for batch in found]


def read_together(dataset: Any, size: int, micro: int, **position: int) -> np.ndarray:
    """Returns the tokens that all data ranks read, in sample order: (samples, tokens)."""
    ranks = [batches_of(dataset, place(rank, size), micro, **position) for rank in range(size)]
    return np.concatenate([batch for step in zip(*ranks, strict=True) for batch in step])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.write_corpus(tmp_path_factory.mktemp("corpus") / "text")


def test_the_same_samples_at_any_number_of_processes_and_after_a_resume(corpus: str, tmp_path: Path) -> None:
    dataset = datasets([corpus], tmp_path)[0]
    whole = read_together(dataset, 1, GLOBAL)
    assert whole.shape == (3 * GLOBAL, MODEL.seq_length)
    assert np.array_equal(whole, np.stack([dataset[number]["tokens"].numpy() for number in range(3 * GLOBAL)]))
    for size, micro in itertools.product((1, 2, 4), (1, 2)):
        assert np.array_equal(read_together(dataset, size, micro), whole)
    for size in (1, 2, 4):
        assert np.array_equal(read_together(dataset, size, 1, start=GLOBAL, steps=2), whole[GLOBAL:])


@examples(60)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(0, 5))
def test_sample_ids_cover_each_step_once(size: int, micro: int, count: int, first: int) -> None:
    per_step = size * micro * count
    start = first * per_step
    streams = [sample_ids(start, per_step, micro, place(rank, size)) for rank in range(size)]
    for step in range(3):
        read = [number for stream in streams for _ in range(count) for number in next(stream)]
        assert sorted(read) == list(range(start + step * per_step, start + (step + 1) * per_step))


def test_reading_ahead_in_other_processes_changes_nothing(corpus: str, tmp_path: Path) -> None:
    dataset = datasets([corpus], tmp_path)[0]
    plain = list(
        micro_batches(dataset, start=0, end=16, global_batch_size=8, micro_batch_size=4, ranks=place(0, 1), device=CPU)
    )
    ahead = list(
        micro_batches(
            dataset,
            start=0,
            end=16,
            global_batch_size=8,
            micro_batch_size=4,
            ranks=place(0, 1),
            device=CPU,
            num_workers=2,
        )
    )
    assert len(plain) == len(ahead) == 4
    for one, other in zip(plain, ahead, strict=True):
        assert one.keys() == other.keys()
        assert all(one[key].equal(other[key]) for key in one)


def test_reading_does_not_touch_the_random_state(corpus: str, tmp_path: Path) -> None:
    import torch

    dataset = datasets([corpus], tmp_path)[0]
    before = torch.get_rng_state()
    assert batches_of(dataset, place(0, 1), 4)
    assert torch.get_rng_state().equal(before)


def test_labels_are_the_next_tokens(corpus: str, tmp_path: Path) -> None:
    dataset = datasets([corpus], tmp_path)[0]
    for number in range(10):
        item = dataset[number]
        assert item["tokens"][1:].equal(item["labels"][:-1])
        assert item["loss_mask"].min() == 1
        assert item["position_ids"].tolist() == list(range(MODEL.seq_length))


def test_the_seed_decides_the_order(corpus: str, tmp_path: Path) -> None:
    one, again, other = (datasets([corpus], tmp_path / str(n), seed=seed)[0] for n, seed in enumerate((7, 7, 8)))
    first = read_together(one, 1, 4)
    assert np.array_equal(first, read_together(again, 1, 4))
    assert not np.array_equal(first, read_together(other, 1, 4))


def numbered(prefix: Path, first: int, count: int) -> str:
    """Writes documents of 20-40 tokens; document i repeats the id first + i."""
    random = np.random.default_rng(first)
    with IndexedWriter(prefix, tiny.VOCAB) as writer:
        for token in range(first, first + count):
            writer.add_document(np.full(random.integers(20, 40), token))
        writer.finalize()
    return str(prefix)


def ids_in(dataset: Any) -> Counter[int]:
    return Counter(int(token) for number in range(len(dataset)) for token in dataset[number]["tokens"])


def test_splits_share_no_document(tmp_path: Path) -> None:
    path = numbered(tmp_path / "numbered", 0, 120)
    train, valid, test = (set(ids_in(dataset)) for dataset in datasets([path], tmp_path / "cache", (60, 8, 8)))
    assert len(train) >= 80
    assert valid
    assert test
    assert not train & valid
    assert not train & test
    assert not valid & test


def test_weights_and_sizes_decide_how_often_a_corpus_is_drawn(tmp_path: Path) -> None:
    one, two = numbered(tmp_path / "one", 0, 60), numbered(tmp_path / "two", 60, 60)

    def share(**data: Any) -> float:
        counts = ids_in(datasets([one, two], tmp_path / "cache", (80, 0, 0), **data)[0])
        return sum(count for token, count in counts.items() if token < 60) / counts.total()

    assert share(weights=[3.0, 1.0]) == pytest.approx(0.75, abs=0.03)
    assert share(weights=[1.0, 1.0]) == pytest.approx(0.5, abs=0.03)
    assert share(weights=[1.0, 9.0]) == pytest.approx(0.1, abs=0.03)
    long = tiny.write_corpus(tmp_path / "long", documents=300)
    counts = ids_in(datasets([two, long], tmp_path / "cache", (100, 0, 0))[0])
    sizes = [Path(f"{path}.bin").stat().st_size for path in (two, long)]
    expected = sizes[0] / sum(sizes)
    # Both corpora have ids from 60 on: in `two` each id is equally frequent, in `long` they are rare.
    assert sum(counts[token] for token in range(100, 120)) / counts.total() == pytest.approx(
        expected * 20 / 60, abs=0.05
    )


def test_data_made_again_at_the_same_path_gives_new_samples(tmp_path: Path) -> None:
    """A stale index would read the new text in the old order without an error."""
    prefix, cache = tmp_path / "text", tmp_path / "cache"
    first_config = DataConfig(path=[tiny.write_corpus(prefix, seed=1)], split="80,10,10")
    first = open_corpora(first_config, MODEL)
    old = read_together(build_datasets(first, MODEL, (24, 0, 0), seed=7, cache=cache)[0], 1, 4)
    tiny.write_corpus(prefix, seed=2, documents=90)
    second = open_corpora(first_config, MODEL)
    assert second.digest != first.digest
    new = read_together(build_datasets(second, MODEL, (24, 0, 0), seed=7, cache=cache)[0], 1, 4)
    fresh = read_together(build_datasets(second, MODEL, (24, 0, 0), seed=7, cache=tmp_path / "empty")[0], 1, 4)
    assert np.array_equal(new, fresh)
    assert not np.array_equal(new, old)


def test_the_same_content_elsewhere_is_the_same_data(tmp_path: Path) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    one, other = (
        open_corpora(DataConfig(path=[tiny.write_corpus(tmp_path / name / "text")], split="80,10,10"), MODEL)
        for name in ("here", "there")
    )
    assert one.digest == other.digest
    mixed = DataConfig(path=[str(tmp_path / "here" / "text")], split="70,20,10")
    assert open_corpora(mixed, MODEL).digest != one.digest


def test_several_epochs_repeat_the_data_in_another_order(tmp_path: Path) -> None:
    path = numbered(tmp_path / "few", 0, 30)
    tokens = Path(f"{path}.bin").stat().st_size // 2
    count = 4 * tokens // MODEL.seq_length
    dataset = datasets([path], tmp_path / "cache", (count, 0, 0), split="100,0,0")[0]
    read = read_together(dataset, 1, GLOBAL, steps=count // GLOBAL)
    assert len({row.tobytes() for row in read}) > len(read) // 3
    counts = Counter(read.ravel().tolist())
    assert min(counts.values()) > 40, "every epoch reads every document"


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"path": []}, ConfigError, "data.path: no dataset given"),
        ({"split": "1,2"}, ConfigError, "data.split: '1,2' is not three shares"),
        ({"split": "a,b,c"}, ConfigError, "data.split"),
        ({"split": "0,0,0"}, ConfigError, "data.split"),
        ({"split": "-1,1,1"}, ConfigError, "data.split"),
        ({"split": "nan,1,1"}, ConfigError, "data.split"),
        ({"tokenizer": "/nowhere/tokenizer"}, DataError, "/nowhere/tokenizer"),
    ],
)
def test_settings_that_cannot_be(corpus: str, change: dict[str, Any], kind: type[Exception], message: str) -> None:
    config = dataclasses.replace(DataConfig(path=[corpus]), **change)
    with pytest.raises(kind, match=message):
        open_corpora(config, MODEL)


def test_a_vocabulary_smaller_than_the_ids(corpus: str) -> None:
    with pytest.raises(DataError, match=rf"holds token id {tiny.VOCAB - 1}, the vocabulary has 100 ids"):
        open_corpora(DataConfig(path=[corpus]), dataclasses.replace(MODEL, vocab_size=100))
    with pytest.raises(ConfigError, match=r"model\.vocab_size"):
        open_corpora(DataConfig(path=[corpus]), dataclasses.replace(MODEL, vocab_size=None))


def test_a_split_without_documents(tmp_path: Path) -> None:
    path = numbered(tmp_path / "short", 0, 3)
    with pytest.raises(DataError, match="too little data: none of its 3 documents"):
        datasets([path], tmp_path / "cache", (4, 4, 4))


def test_ids_beyond_the_vocabulary_are_damage(corpus: str, tmp_path: Path) -> None:
    dataset = datasets([corpus], tmp_path / "cache")[0]
    common = {"start": 0, "end": GLOBAL, "global_batch_size": GLOBAL, "micro_batch_size": GLOBAL, "ranks": place(0, 1)}
    assert len(list(micro_batches(dataset, **common, device=CPU, vocab_size=tiny.VOCAB))) == 1
    with pytest.raises(
        DataError, match=rf"token id \d+, the vocabulary has {tiny.VOCAB // 2}: a \.bin file is damaged"
    ):
        list(micro_batches(dataset, **common, device=CPU, vocab_size=tiny.VOCAB // 2))


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("80,10,10", [(0.0, 0.8), (0.8, 0.9), (0.9, 1.0)]),
        ("50,0,50", [(0.0, 0.5), (0.5, 1.0)]),
        ("0,0,3", [(0.0, 1.0)]),
    ],
)
def test_every_part_that_megatron_builds_is_checked(
    tmp_path: Path, split: str, expected: list[tuple[float, float]]
) -> None:
    corpora = open_corpora(DataConfig(path=[tiny.write_corpus(tmp_path / "text")], split=split), MODEL)
    parts = [part for _, *part in _parts_in_use(corpora, (5, None, None))]
    np.testing.assert_allclose(parts, expected, atol=1e-12)


def test_training_tokens_are_the_first_share_of_all(tmp_path: Path) -> None:
    path = tiny.write_corpus(tmp_path / "text")
    total = open_corpora(DataConfig(path=[path], split="1,0,0"), MODEL).train_tokens
    assert total == np.fromfile(f"{path}.bin", dtype=np.uint16).size
    assert open_corpora(DataConfig(path=[path], split="50,25,25"), MODEL).train_tokens == total // 2


def test_a_path_that_a_comma_divided_is_named(tmp_path: Path) -> None:
    (tmp_path / "a,b").mkdir()
    with pytest.raises(ConfigError, match=r"a comma separates two paths; quote the path: --data.path '\[\".*a,b\"\]'"):
        open_corpora(DataConfig(path=[str(tmp_path / "a"), "b"]), MODEL)


@pytest.mark.parametrize("path", ["c/a", "c/a,b/ds", "c/[a", "it's", "c/a # b", "c, d"])
def test_a_path_without_brackets_is_the_only_one(path: str, tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("seed: 1\n")
    assert load_config(tmp_path / "empty.yaml", ["--data.path", path]).data.path == [path]
    assert load_config(tmp_path / "empty.yaml", [f"--data.path={path}"]).data.path == [path]


def test_a_path_that_is_no_dataset_is_described(tmp_path: Path) -> None:
    """No message suggests a command that overwrites an intact folder."""
    (tmp_path / "prepared").mkdir()
    (tmp_path / "prepared" / "manifest.json").write_text("{}")
    (tmp_path / "my text.txt").write_text("some words")
    (tmp_path / "empty").mkdir()
    (tmp_path / "pairs").mkdir()
    tiny.write_corpus(tmp_path / "pairs" / "one")
    wanted = {
        "nothing": r"there is neither a folder .*/nothing nor .*/nothing\.idx; give a folder that `megatron-lion prepare` made",
        "prepared/owt": r"/prepared/owt does not exist; .*/prepared is a dataset folder; give it",
        "my text.txt": r"my text\.txt is a file; .* `megatron-lion prepare --input '.*/my text\.txt' --tokenizer PATH --output DIR`",
        "empty": r"empty has no manifest\.json, so `megatron-lion prepare` did not make it; give a folder that has one$",
        "pairs": r"give the prefix of one of its pairs, such as .*/pairs/one$",
    }
    for name, message in wanted.items():
        with pytest.raises(DataError, match=message) as caught:
            open_corpora(DataConfig(path=[str(tmp_path / name)]), MODEL)
        assert "--overwrite" not in str(caught.value)
