"""BERT's samples: statistics of the masking, dependence on seed and sample number only, and refusals."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_bert import SEQ_LENGTH, VOCAB, documents, tiny_bert, write_bert_corpus, write_vocab

from megatron_lion.config import DataConfig, ModelConfig
from megatron_lion.config_checks import check_config
from megatron_lion.data.batches import micro_batches
from megatron_lion.data.bert_datasets import most_masked
from megatron_lion.data.corpora import open_corpora
from megatron_lion.data.datasets import build_datasets
from megatron_lion.device import Device
from megatron_lion.errors import ConfigError, DataError
from megatron_lion.parallel import Ranks, process_groups
from megatron_lion.prepare.options import PrepareOptions
from megatron_lion.prepare.pipeline import prepare

SAMPLES = 3000
SPECIAL = [VOCAB.index(token) for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")]
PAD, _, CLS, SEP, MASK = SPECIAL
IS_CONTINUATION = np.array([token.startswith("##") for token in VOCAB])


def build(path: str, cache: Path, count: int, *, seed: int = 7, seq_length: int = 64, **data: Any) -> Any:
    model = ModelConfig(kind="bert", seq_length=seq_length, make_vocab_size_divisible_by=64)
    corpora = open_corpora(DataConfig(path=[path], **data), model)
    with process_groups(Device("cpu", 0, "gloo")):  # the first rank builds Megatron's index for all
        return build_datasets(corpora, model, (count, 0, 0), seed=seed, cache=cache)[0]


@pytest.fixture(scope="module")
def long_documents(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Few, long documents, so that samples at their ends hardly affect the statistics."""
    return write_bert_corpus(tmp_path_factory.mktemp("long"), documents(30, 2400, seed=3))


@pytest.fixture(scope="module")
def samples(long_documents: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    dataset = build(long_documents, tmp_path_factory.mktemp("cache"), SAMPLES)
    return [dataset[number] for number in range(SAMPLES)]


def originals(sample: dict[str, Any]) -> np.ndarray:
    """Returns the tokens before masking."""
    tokens = np.array(sample["tokens"])
    used = np.array(sample["loss_mask"]) > 0
    tokens[sample["positions"][used]] = sample["labels"][used]
    return tokens


def test_form(samples: list[dict[str, Any]]) -> None:
    for sample in samples:
        tokens, length = originals(sample), int(sample["padding_mask"].sum())
        assert tokens[0] == CLS
        assert tokens[length - 1] == SEP
        assert (tokens[length:] == PAD).all()
        first_end, last = np.flatnonzero(tokens == SEP)
        assert last == length - 1
        assert first_end > 1  # neither segment is empty
        assert last > first_end + 1
        assert (sample["types"] == (np.arange(64) > first_end) * (np.arange(64) < length)).all()


def test_a_seventh_of_the_tokens_is_masked_80_10_10(samples: list[dict[str, Any]]) -> None:
    masked = total = 0
    outcomes = {"mask": 0, "kept": 0, "random": 0}
    for sample in samples:
        used = sample["loss_mask"] > 0
        places, labels = sample["positions"][used], sample["labels"][used]
        assert len(set(places.tolist())) == len(places) <= most_masked(64, 0.15)
        assert not np.isin(labels, SPECIAL).any()
        length = int(sample["padding_mask"].sum())
        assert len(places) <= max(1, round(0.15 * length))
        masked, total = masked + len(places), total + length
        shown = sample["tokens"][places]
        outcomes["mask"] += int((shown == MASK).sum())
        outcomes["kept"] += int((shown == labels).sum())
        outcomes["random"] += int(((shown != MASK) & (shown != labels)).sum())
    # Fewer than 15 %: the share is rounded down, and a word that would exceed it is skipped.
    assert 0.125 < masked / total <= 0.15
    for name, share in (("mask", 0.8), ("kept", 0.1), ("random", 0.1)):
        error = (share * (1 - share) / masked) ** 0.5
        # A random token equals the true one with p = 1 / vocabulary size: less than a third of a percent of all.
        assert abs(outcomes[name] / masked - share) < 5 * error + 0.002, outcomes


def test_words_are_masked_whole_in_runs(samples: list[dict[str, Any]]) -> None:
    runs: list[int] = []
    for sample in samples:
        tokens = originals(sample)
        places = set(sample["positions"][sample["loss_mask"] > 0].tolist())
        # A segment can begin within a word if its beginning was cut off to fit; [CLS] and [SEP] are no words.
        after_special = np.isin(np.roll(tokens, 1), SPECIAL)
        starts = np.flatnonzero((~IS_CONTINUATION[tokens] | after_special) & (sample["padding_mask"] > 0))
        words = [
            set(range(begin, end))
            for begin, end in zip(starts, [*starts[1:], int(sample["padding_mask"].sum())], strict=True)
        ]
        chosen = [bool(word & places) for word in words]
        assert all(word <= places for word, is_chosen in zip(words, chosen, strict=True) if is_chosen)
        length = 0
        for is_chosen in [*chosen, False]:
            if not is_chosen and length:
                runs.append(length)
            length = length + 1 if is_chosen else 0
    shares = np.bincount(runs, minlength=8) / len(runs)
    assert shares[1] > shares[2] > shares[3] > 0.02  # n-grams of 1, 2, 3 words; shorter ones are more likely
    assert shares[4:].sum() < shares[3]  # longer runs occur only if two n-grams touch


def test_half_of_the_segments_are_swapped_and_the_sample_says_which(
    samples: list[dict[str, Any]], long_documents: str, tmp_path: Path
) -> None:
    swapped = np.mean([int(sample["is_random"]) for sample in samples])
    assert abs(swapped - 0.5) < 5 * 0.5 / SAMPLES**0.5
    text = np.fromfile(next(Path(long_documents).glob("train*.bin")), np.uint16).tobytes()
    for sample in samples[:300]:
        tokens = originals(sample)
        first, last = np.flatnonzero(tokens == SEP)
        one, two = tokens[1:first].astype(np.uint16), tokens[first + 1 : last].astype(np.uint16)
        if one.size + two.size < 20:
            continue  # so short that the text may contain it in both orders
        # Consecutive in the corpus in one of the two orders (unless an end was cut off to fit).
        if one.tobytes() + two.tobytes() in text:
            assert not sample["is_random"]
        elif two.tobytes() + one.tobytes() in text:
            assert sample["is_random"]


def test_one_sample_in_ten_is_short(long_documents: str, samples: list[dict[str, Any]], tmp_path: Path) -> None:
    def short(found: list[dict[str, Any]]) -> float:
        return float(
            np.mean([sample["padding_mask"].sum() < 45 for sample in found])
        )  # a full sample lacks one sentence at most

    none = build(long_documents, tmp_path, 1000, short_sequence_probability=0.0)
    assert short([none[number] for number in range(1000)]) < 0.02
    assert 0.04 < short(samples) < 0.12


def test_masks_depend_on_seed_and_number_alone(
    long_documents: str, samples: list[dict[str, Any]], tmp_path: Path
) -> None:
    again = build(long_documents, tmp_path / "again", SAMPLES)
    for number in (2999, 7, 1500, 7):  # any order, twice
        assert all(np.array_equal(again[number][key], samples[number][key]) for key in samples[number])
    other = build(long_documents, tmp_path / "other", SAMPLES, seed=8)
    assert any(not np.array_equal(other[number]["positions"], samples[number]["positions"]) for number in range(5))

    cpu = Device("cpu", 0, "gloo")

    def read(size: int, start: int) -> np.ndarray:
        ranks = [Ranks(rank, size, rank, size, 0, 1, 0, 1) for rank in range(size)]
        streams = [
            micro_batches(again, start=start, end=32, global_batch_size=16, micro_batch_size=2, ranks=place, device=cpu)
            for place in ranks
        ]
        return np.concatenate([batch["tokens"].numpy() for step in zip(*streams, strict=True) for batch in step])

    whole = read(1, 0)
    assert np.array_equal(read(2, 0), whole)
    assert np.array_equal(read(4, 0), whole)
    assert np.array_equal(read(4, 16), whole[16:])  # a resumed run


def test_megatron_lm_files_are_read_by_prefix(long_documents: str, tmp_path: Path) -> None:
    prefix = next(Path(long_documents).glob("train*.bin")).with_suffix("")
    assert prefix.name.endswith("_text_sentence")
    vocab = write_vocab(tmp_path)
    dataset = build(str(prefix), tmp_path / "cache", 20, tokenizer=str(vocab), split="90,5,5")
    assert dataset[3]["tokens"][0] == CLS


def test_documents_of_one_sentence_are_counted_and_kept_out(tmp_path: Path) -> None:
    alone = [text.split(".")[0] + " xyz." for text in documents(40, 2)]  # xyz is [UNK], which no other text has
    options = PrepareOptions(
        tokenizer=write_vocab(tmp_path), output=tmp_path / "data", split="80,10,10", task="bert", workers=1, encoder="tokenizers"
    )  # fmt: skip
    manifest = prepare(options, [*documents(60, 8, seed=1), *alone])
    assert manifest.documents == 100
    assert manifest.sentences["documents_of_one_sentence"] == 40
    dataset = build(str(tmp_path / "data"), tmp_path / "cache", 400)
    assert not any(VOCAB.index("[UNK]") in originals(dataset[number]) for number in range(400))
    prepare(dataclasses.replace(options, output=tmp_path / "only"), alone)
    with pytest.raises(DataError, match="have one sentence"):
        build(str(tmp_path / "only"), tmp_path / "cache2", 10)


@pytest.mark.parametrize("missing", ["[MASK]", "[CLS]", "[SEP]", "[PAD]"])
def test_a_vocabulary_without_a_special_token_is_named(tmp_path: Path, missing: str) -> None:
    vocab = write_vocab(tmp_path, [token for token in VOCAB if token != missing])
    options = PrepareOptions(tokenizer=vocab, output=tmp_path / "data", task="bert", workers=1)
    with pytest.raises(DataError, match=rf"vocab.txt.*\{missing[:-1]}"):
        prepare(options, documents(20, 5))


def test_data_of_the_other_kind_says_which_command_makes_the_right_one(long_documents: str, tmp_path: Path) -> None:
    gpt = tmp_path / "gpt"
    prepare(
        PrepareOptions(tokenizer=write_vocab(tmp_path), output=gpt, workers=1, append_eod=False, split="80,10,10"),
        documents(40, 6),
    )
    with pytest.raises(DataError, match="megatron-lion prepare --task bert"):
        open_corpora(DataConfig(path=[str(gpt)]), ModelConfig(kind="bert"))
    with pytest.raises(DataError, match="megatron-lion prepare --task gpt"):
        open_corpora(DataConfig(path=[long_documents]), ModelConfig(kind="gpt2"))
    for folder, kind, right in ((gpt, "bert", "--task bert"), (Path(long_documents), "gpt2", "--task gpt")):
        prefix = str(next(folder.glob("train*.bin")).with_suffix(""))
        config = DataConfig(path=[prefix], tokenizer=str(tmp_path / "vocab.txt"))
        with pytest.raises(DataError, match=right):
            open_corpora(config, ModelConfig(kind=kind))


@pytest.mark.parametrize("length", [1, 2, 3, 9])
def test_a_sequence_too_short_for_two_segments(length: int) -> None:
    with pytest.raises(ConfigError, match=r"model.seq_length: .* at least 10 tokens"):
        check_config(tiny_bert("run", "data", model__seq_length=length), 1)
    check_config(tiny_bert("run", "data", model__seq_length=SEQ_LENGTH), 1)


def test_a_line_of_two_megabytes(tmp_path: Path) -> None:
    long_line = " ".join(documents(1, 12)[0] for _ in range(12)) + " " + "bac " * 500_000
    options = PrepareOptions(
        tokenizer=write_vocab(tmp_path), output=tmp_path / "data", split="80,10,10", task="bert", workers=1, encoder="tokenizers"
    )  # fmt: skip
    prepare(options, [*documents(60, 8), long_line])
    dataset = build(str(tmp_path / "data"), tmp_path / "cache", 50)
    assert {len(dataset[number]["tokens"]) for number in range(50)} == {64}


def test_wordpiece_is_token_identical_to_transformers(shared_data: Path) -> None:
    import json

    from transformers import BertTokenizerFast

    from megatron_lion.data.tokenizers import load_tokenizer

    path = shared_data / "bert/vocab.txt"
    oracle = BertTokenizerFast(vocab=str(path), do_lower_case=True)
    ours = load_tokenizer(path)
    lines = (shared_data / "corpus/sample.jsonl").read_bytes().split(b"\n")
    texts = [json.loads(line)["text"] for line in (*lines[:60], *lines[1000:1004])]
    texts += [
        "",
        " ",
        "naïve café — 東京 👩‍👩‍👧 \u00a0x\u2028y",
        "1,234.56 don't WE'LL",
        "\x00\x01a\ufffdb",
        "x" * 5000,
    ]
    assert ours.encode_batch(texts) == oracle(texts, add_special_tokens=False)["input_ids"]
