"""The demo's corpus is English, large enough and reproducible, and the training text has no held-out text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_lion.errors import EnvironmentFault
from megatron_lion.prepare.demo_corpus import DemoCorpus, build_demo_corpus, is_prose


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> DemoCorpus:
    return build_demo_corpus(tmp_path_factory.mktemp("demo"))


def test_corpus_is_large_distinct_and_disjoint(corpus: DemoCorpus) -> None:
    texts = [json.loads(line)["text"] for line in corpus.train.read_text("ascii").splitlines()]
    held_out = corpus.held_out.read_text("utf-8")
    assert len(texts) == len(set(texts)) == corpus.documents > 1000
    assert 3_000_000 < corpus.train_bytes < 6_100_000
    assert corpus.train_bytes == sum(len(text.encode()) for text in texts)
    assert corpus.held_out_bytes == len(held_out.encode()) > 150_000
    lines = {line.strip() for text in texts for line in text.split("\n")}
    assert not {line.strip() for line in held_out.split("\n") if len(line.strip()) >= 40} & lines
    assert not any(">>> " in text for text in texts)


def test_corpus_is_the_same_again_and_can_be_smaller(corpus: DemoCorpus, tmp_path: Path) -> None:
    small = build_demo_corpus(tmp_path, max_train_bytes=200_000)
    assert 200_000 <= small.train_bytes < 260_000
    assert corpus.train.read_bytes().startswith(small.train.read_bytes())
    assert small.held_out.read_bytes() == corpus.held_out.read_bytes()


def test_prose_and_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_prose("Return the value.")
    assert not is_prose("x = [1, 2, 3]; y = {4: 5}\n" * 20)
    monkeypatch.setattr("megatron_lion.prepare.demo_corpus._roots", lambda: [tmp_path])
    with pytest.raises(EnvironmentFault, match="no source files"):
        build_demo_corpus(tmp_path)
