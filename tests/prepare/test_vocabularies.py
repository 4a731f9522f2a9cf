"""Vocabularies trained on a corpus: reproducible at any number of threads, even with ties; usable by `prepare`."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from megatron_lion.data.bert_vocab import SPECIAL_TOKENS
from megatron_lion.data.tokenizers import load_tokenizer
from megatron_lion.errors import ConfigError
from megatron_lion.prepare.demo_corpus import build_demo_corpus
from megatron_lion.prepare.pipeline import PrepareOptions, prepare
from megatron_lion.prepare.vocabularies import ALPHABET, train_bpe, train_wordpiece


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_demo_corpus(tmp_path_factory.mktemp("vocabularies"), max_train_bytes=300_000).train


def documents(file: Path) -> list[str]:
    return [json.loads(line)["text"] for line in file.read_text("utf-8").splitlines()]


def write(folder: Path, texts: list[str]) -> Path:
    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    return path


def test_bpe_is_the_same_again_and_prepares(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = train_bpe([text], 1024, tmp_path / "a")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    assert train_bpe([text], 1024, tmp_path / "b").sha256 == first.sha256
    assert (first.vocab_size, first.eod_id) == (1024, 1023)
    sentence = "Return the name of the file, or None if it has none: caf\u00e9."
    assert first.decode(first.encode(sentence)) == sentence
    assert len(first.encode(sentence)) < 0.5 * len(sentence)
    manifest = prepare(PrepareOptions(inputs=[text], tokenizer=first, output=tmp_path / "out", split="96,2,2"))
    assert set(manifest.splits) == {"train", "valid", "test"}
    assert manifest.documents == len(documents(text))
    assert load_tokenizer(tmp_path / "out/tokenizer").sha256 == first.sha256


def test_wordpiece_prepares(text: Path, tmp_path: Path) -> None:
    tokenizer = train_wordpiece([text], 1024, tmp_path / "a")
    assert tokenizer.vocab_size == 1024
    assert tokenizer.decode(tokenizer.encode("The parameter of the function")) == "the parameter of the function"
    options = PrepareOptions(
        inputs=[text], tokenizer=tokenizer, output=tmp_path / "out", split="90,5,5", task="bert", workers=1
    )
    assert prepare(options).documents == len(documents(text))


def test_ties_do_not_change_a_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most words occur once, so nearly every choice of a pair, and the last characters, are ties."""
    draw = random.Random(0)
    letters = (
        "abcdefghijklmnopqrstuvwxyz" + "".join(map(chr, range(0x3B1, 0x3C9))) + "".join(map(chr, range(0x430, 0x450)))
    )
    words = ["".join(draw.choices(letters, k=draw.randint(1, 8))) for _ in range(3000)]
    file = write(tmp_path, [" ".join(words[start : start + 50]) for start in range(0, len(words), 50)])
    for train, size in ((train_wordpiece, 400), (train_bpe, 500)):
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
        found = {train([file], size, tmp_path / f"{size}-{turn}").sha256 for turn in range(4)}
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
        found |= {train([file], size, tmp_path / f"{size}-{turn}").sha256 for turn in range(4, 8)}
        assert len(found) == 1


def test_wordpiece_are_the_pieces_that_the_trainer_of_tokenizers_chooses(text: Path, tmp_path: Path) -> None:
    """Compares with WordPieceTrainer on the same text; ties, which it breaks by a hash table, may differ."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    train_wordpiece([text], 1024, tmp_path / "ours")
    reference = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    reference.normalizer = normalizers.BertNormalizer(lowercase=True)
    reference.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=1024, special_tokens=list(SPECIAL_TOKENS), limit_alphabet=ALPHABET, show_progress=False
    )
    reference.train_from_iterator(documents(text), trainer=trainer)
    ours = (tmp_path / "ours/vocab.txt").read_text("utf-8").splitlines()
    assert tuple(ours[: len(SPECIAL_TOKENS)]) == tuple(SPECIAL_TOKENS)
    assert len(set(ours)) == len(ours) == reference.get_vocab_size()
    assert len(set(ours) ^ set(reference.get_vocab())) <= 0.02 * len(ours)


def test_sizes_with_no_room_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least 258"):
        train_bpe([], 257, tmp_path)
    with pytest.raises(ConfigError, match="at least 200"):
        train_wordpiece([], 100, tmp_path)
