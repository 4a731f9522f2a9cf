"""Encoders: the fast one gives the reference's ids, and a difference ends the preparation."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from byte_bpe import write_byte_bpe

from megatron_lion.data.tokenizers import Tokenizer, load_tokenizer
from megatron_lion.errors import ConfigError, DataError, EnvironmentFault
from megatron_lion.prepare.encoders import HARD_TEXTS, GigatokenEncoder, ReferenceEncoder, build_encoder
from megatron_lion.prepare.pipeline import PrepareOptions, prepare


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    write_byte_bpe(tmp_path, "t h", "th e")
    return load_tokenizer(tmp_path)


def in_utf8(texts: Sequence[str]) -> list[bytes]:
    return [text.encode() for text in texts]


def test_reference_gives_the_tokenizers_ids(tokenizer: Tokenizer) -> None:
    found = ReferenceEncoder(tokenizer).encode(in_utf8(HARD_TEXTS))
    assert [ids.tolist() for ids in found] == tokenizer.encode_batch(HARD_TEXTS)
    assert {ids.dtype for ids in found} == {np.dtype(np.uint16)}


def test_gigatoken_is_token_identical_on_real_and_hard_text(shared_data: Path) -> None:
    pytest.importorskip("gigatoken", reason="gigatoken is optional and not installed")
    gpt2 = load_tokenizer(shared_data / "gpt2")
    lines = (shared_data / "corpus/sample.jsonl").read_bytes().split(b"\n")
    texts = [json.loads(line)["text"] for line in (*lines[:100], *lines[1000:1020])]
    # Every character of the basic multilingual plane in four contexts.
    characters = [chr(code) for code in range(0x10000) if not 0xD800 <= code <= 0xDFFF]
    texts += ["".join(f"{c}a {c}1{c}!{c}" for c in characters[i : i + 500]) for i in range(0, len(characters), 500)]
    found, expected = GigatokenEncoder(gpt2).encode(in_utf8(texts)), ReferenceEncoder(gpt2).encode(in_utf8(texts))
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def test_gigatoken_is_not_used_beside_added_tokens(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Version 0.10 finds others where they overlap or stand inside a word."""
    pytest.importorskip("gigatoken", reason="gigatoken is optional and not installed")
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "special", "normalized"), False)
    size = tokenizer.vocab_size
    definition = tokenizer.definition
    definition["added_tokens"] = [
        {"id": size, "content": "    ", **flags, "normalized": True},
        {"id": size + 1, "content": " <y>", **flags},
        {"id": size + 2, "content": "url", **flags, "single_word": True},
    ]
    (tmp_path / "b").mkdir()
    (tmp_path / "b/tokenizer.json").write_text(json.dumps(definition), "utf-8")
    loaded = load_tokenizer(tmp_path / "b")
    texts = ["E    <y>url 12", "curly curls url", "the"]
    encoder = build_encoder("auto", loaded)
    assert [document.ids.tolist() for document in encoder.encode_documents(in_utf8(texts))] == loaded.encode_batch(
        texts
    )
    assert encoder.name.startswith("tokenizers")
    with pytest.raises(EnvironmentFault, match="has added tokens, so gigatoken is not used; use --encoder tokenizers"):
        build_encoder("gigatoken", loaded)
    assert build_encoder("auto", tokenizer).name.startswith("gigatoken")


class Backend:
    """Stub of gigatoken's backend: gives wrong ids after `wrong_after` texts."""

    def __init__(self, tokenizer: Tokenizer, wrong_after: int) -> None:
        self.tokenizer, self.left = tokenizer, wrong_after

    def encode(self, text: bytes) -> np.ndarray:
        self.left -= 1
        ids = np.array(self.tokenizer.encode(text.decode()), dtype=np.uint32)
        return ids if self.left >= 0 else ids[::-1]


def install(monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer, wrong_after: int) -> list[str]:
    """Installs a stub of the module gigatoken; returns the list of definitions that it receives."""
    given: list[str] = []

    def load(definition: str) -> Backend:
        given.append(definition)
        return Backend(tokenizer, wrong_after)

    module = types.ModuleType("gigatoken.gigatoken_rs")
    module.load_hf_json = load
    monkeypatch.setitem(sys.modules, "gigatoken", types.ModuleType("gigatoken"))
    monkeypatch.setitem(sys.modules, "gigatoken.gigatoken_rs", module)
    monkeypatch.setattr("megatron_lion.prepare.encoders._gigatoken_version", lambda: "0")
    return given


def test_a_wrong_library_is_found_at_once_or_by_the_sample(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, tokenizer, wrong_after=0)
    with pytest.raises(DataError, match=r"different ids .* --encoder tokenizers"):
        build_encoder("gigatoken", tokenizer)
    assert build_encoder("auto", tokenizer).name.startswith("tokenizers")
    install(monkeypatch, tokenizer, wrong_after=len(HARD_TEXTS) + 20)
    encoder = GigatokenEncoder(tokenizer, sample_every=10)
    texts = [f"the text {i}" for i in range(15)]
    assert [ids.tolist() for ids in encoder.encode(in_utf8(texts))] == tokenizer.encode_batch(texts)
    with pytest.raises(DataError, match="begins 'the text 5'"):
        encoder.encode(in_utf8(texts[:10]))  # the 16th to 25th: the 21st is compared
    install(monkeypatch, tokenizer, wrong_after=len(HARD_TEXTS))
    options = PrepareOptions(tokenizer=tokenizer, output=tmp_path / "out", encoder="gigatoken")
    with pytest.raises(DataError, match="different ids"):
        prepare(options, documents=texts)
    assert not (tmp_path / "out").exists()


def test_an_encoder_that_another_process_compared_is_compared_too(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, tokenizer, wrong_after=3)
    encoder = GigatokenEncoder(Tokenizer.from_json(tokenizer.to_json()), sample_every=10, compared=True)
    with pytest.raises(DataError, match="begins 'the text 5'"):
        encoder.encode(in_utf8([f"the text {i}" for i in range(8)]))


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
@pytest.mark.parametrize("more", [1 << 16, 259])
def test_an_id_beyond_the_vocabulary_is_refused(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, more: int
) -> None:
    """65,536 more would be the same id in uint16, and 259 more another one."""
    encoder = ReferenceEncoder(tokenizer)
    plain = encoder.encode
    monkeypatch.setattr(encoder, "encode", lambda texts: [ids.astype(np.uint32) + more for ids in plain(texts)])
    monkeypatch.setattr("megatron_lion.prepare.pipeline.build_encoder", lambda *_: encoder)
    (tmp_path / name).write_text(json.dumps({"text": "the text"}) + "\n")
    options = PrepareOptions(inputs=[tmp_path / name], tokenizer=tokenizer, output=tmp_path / "out", workers=1)
    with pytest.raises(DataError, match=r"gave id \d+, beyond the vocabulary of 259"):
        prepare(options)


def test_special_tokens_are_kept_from_the_fast_encoder(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    definition = tokenizer.definition
    definition["added_tokens"] = [
        {"id": 258, "content": "<|endoftext|>", "special": True, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False},
    ]  # fmt: skip
    (tmp_path / "b").mkdir()
    (tmp_path / "b/tokenizer.json").write_text(json.dumps(definition), "utf-8")
    loaded = load_tokenizer(tmp_path / "b")
    given = install(monkeypatch, loaded, wrong_after=1000)
    GigatokenEncoder(loaded)
    assert json.loads(given[0])["added_tokens"] == []


def test_memory_is_bounded_by_starting_afresh(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    given = install(monkeypatch, tokenizer, wrong_after=1000)
    monkeypatch.setattr("megatron_lion.prepare.encoders._RENEW_BYTES", 50)
    encoder = GigatokenEncoder(tokenizer)
    for _ in range(6):
        encoder.encode([b"x" * 30])
    assert len(given) == 1 + 3


def test_asking_for_what_is_not_there(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> str:
        raise EnvironmentFault("not installed")

    monkeypatch.setattr("megatron_lion.prepare.encoders._gigatoken_version", absent)
    with pytest.raises(EnvironmentFault):
        build_encoder("gigatoken", tokenizer)
    assert build_encoder("auto", tokenizer).name.startswith("tokenizers")
    with pytest.raises(ConfigError, match="encoder 'fast'"):
        PrepareOptions(tokenizer=tokenizer, output="x", encoder="fast")
