"""A long document is encoded in parts, with the ids and the hash of the whole, in little memory."""

from __future__ import annotations

import functools
import io
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from megatron_lion.data.indexed_writer import check_indexed
from megatron_lion.data.tokenizer_files import byte_letters
from megatron_lion.data.tokenizers import Tokenizer, load_tokenizer
from megatron_lion.errors import DataError
from megatron_lion.prepare import long_texts
from megatron_lion.prepare.encoders import ReferenceEncoder
from megatron_lion.prepare.lines import BadLine
from megatron_lion.prepare.long_texts import cut_text, divides_at_blanks, text_parts
from megatron_lion.prepare.pieces import read_documents
from megatron_lion.prepare.pipeline import PrepareOptions, prepare

# Merges across blanks and line feeds: a cut in the wrong place changes the ids.
MERGES = [
    "t h",
    "th e",
    "Ġ the",
    "Ċ Ċ",
    "ĊĊ ĊĊ",
    "Ġ Ġ",
    "ĠĠ ĠĠ",
    "Ċ Ġ",
    "' s",
    "Ġ '",
    "Ġ 1",
    "1 1",
    "Ġ !",
    "! !",
    "Ġ Ċ",
]
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "##e", "cafe", "'", "s", "!", "1", "##1", "é", "中"]


HARD = ["the", "cafe\u0301", "'s", "1", "!", " ", "  ", "\n", "\n\n", "\r\n", "\t", "\xa0", "\u2028", "中", "👩\u200d👧", "\u0301", "\x1c",
        "\x00", "\u200b", "é", "a b", "the the", "x\ny", "、", "。", "」", "）", "》", "\u3000", "か", "カ", "ー", "・", "\u3099", "한",
        "々", ",", ".", ")", "re", "中，中", "e,e", "e. ", "1.", "\u037e"]  # fmt: skip


@functools.cache
def tokenizer(kind: str) -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        if kind == "bert":
            Path(folder, "vocab.txt").write_text("\n".join(PIECES) + "\n", encoding="utf-8")
        else:
            tokens = [*byte_letters(), *(merge.replace(" ", "") for merge in MERGES), "<|endoftext|>"]
            Path(folder, "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), "utf-8")
            Path(folder, "merges.txt").write_text("\n".join(MERGES) + "\n", "utf-8")
        return load_tokenizer(folder)


TEXTS = st.lists(
    st.sampled_from(HARD) | st.text(st.characters(exclude_categories=["Cs"]), max_size=3), max_size=60
).map(lambda words: "".join(words).lstrip("\ufeff"))


def parts_of(text: str, part: int, block: int) -> list[list[str]]:
    with mock.patch.multiple(long_texts, _PART_CHARACTERS=part, _BLOCK_BYTES=block):
        return [list(text_parts(io.BytesIO(text.encode()))), list(cut_text(text))]


@functools.cache
def library(kind: str) -> Any:
    return tokenizers.Tokenizer.from_str(json.dumps(tokenizer(kind).definition))


def words_of(kind: str, text: str) -> list[str]:
    """Returns the words between which the `tokenizers` library looks for no token, whatever the vocabulary."""
    own = library(kind)
    text = own.normalizer.normalize_str(text) if own.normalizer else text
    return [word for word, _ in own.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
@given(text=TEXTS, part=st.integers(4, 40), block=st.integers(1, 9))
def test_parts_have_the_ids_of_the_whole(kind: str, text: str, part: int, block: int) -> None:
    loaded = tokenizer(kind)
    for parts in parts_of(text, part, block):
        assert "".join(parts) == text
        assert [word for one in parts for word in words_of(kind, one)] == words_of(kind, text)
        assert [index for one in parts for index in loaded.encode(one)] == loaded.encode(text)


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_no_cut_between_any_two_neighbours_divides_a_word(kind: str) -> None:
    for one, other in itertools.product(HARD, repeat=2):
        for text in ((one + other) * 12, (one + other + "e") * 8, (one + other + "中") * 8):
            for part in (6, 7):
                parts = list(parts_of(text, part, 1 << 16)[1])
                assert [word for each in parts for word in words_of(kind, each)] == words_of(kind, text), (one, other)


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
@given(
    contents=st.lists(
        st.text(st.sampled_from("e中,，!\u037e\u0301\u3000 x"), min_size=1, max_size=3).filter(lambda text: text.strip("\u0301")),
        min_size=1, max_size=3,
    ),
    single=st.booleans(),
    normalized=st.booleans(),
    words=st.lists(st.sampled_from(["e", "中", ",", "，", "!", " ", "x", "e\u0301", "\n", "é", "cafe", "中，"]), max_size=30),
    part=st.integers(4, 9),
)  # fmt: skip
def test_added_tokens_are_found_in_the_parts_too(
    kind: str, contents: list[str], single: bool, normalized: bool, words: list[str], part: int
) -> None:
    """For a token of accents alone, which BERT's normaliser removes, the `tokenizers` library panics."""
    size = tokenizer(kind).vocab_size
    added = [
        {"id": size + number, "content": content, "single_word": single, "lstrip": False, "rstrip": False,
         "normalized": normalized, "special": False}
        for number, content in enumerate(dict.fromkeys(contents))
    ]  # fmt: skip
    definition = {**tokenizer(kind).definition, "added_tokens": added}
    if not divides_at_blanks(definition):
        return
    own, text = tokenizers.Tokenizer.from_str(json.dumps(definition)), "".join([*words, *contents, *words])
    for parts in parts_of(text, part, 4):
        assert [index for one in parts for index in own.encode(one).ids] == own.encode(text).ids


@pytest.mark.parametrize("mark", ["。", "，", ""])
def test_a_chinese_text_without_blanks_is_cut(mark: str) -> None:
    """A paragraph begins with a line feed and two ideographic spaces."""
    text = ("\n\u3000\u3000" + "这是一个很长的句子没有空格" * 5 + mark) * 200
    for parts in parts_of(text, 1000, 100):
        assert "".join(parts) == text
        assert len(parts) > 10
        assert max(map(len, parts)) < 2100
        for kind in ("gpt2", "bert"):
            assert [word for one in parts for word in words_of(kind, one)] == words_of(kind, text)


def test_ordinary_text_is_cut() -> None:
    text = "The cat and the dog.\nAnother line with words, and so on.\n\n" * 2000
    with mock.patch.multiple(long_texts, _PART_CHARACTERS=1000, _BLOCK_BYTES=100):
        found = [list(text_parts(io.BytesIO(text.replace("\n", line_end).encode()))) for line_end in ("\n", "\r\n")]
        found.append(list(cut_text(text)))
        (whole,) = text_parts(io.BytesIO(b"x" * 5000))
        late = list(cut_text("x" * 5000 + text))
    for parts in found:
        assert len(parts) > 50
        assert max(map(len, parts)) < 2000
    assert len(whole) == 5000
    assert len(late) > 50


def test_time_is_linear_without_a_place_to_cut() -> None:
    """Counts the examined positions: a search in the whole text after each block would take hours for some 100 MB."""
    with (
        mock.patch.multiple(long_texts, _PART_CHARACTERS=64, _BLOCK_BYTES=32),
        mock.patch.object(long_texts, "_can_cut", side_effect=lambda text, cut: False) as looked,
    ):
        assert list(text_parts(io.BytesIO(b"x" * 8192))) == ["x" * 8192]
        assert list(cut_text("x" * 8192)) == ["x" * 8192]
    assert looked.call_count < 4 * 8192


def test_a_long_document_of_a_batch_is_encoded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """JSON lines and tables may contain long documents too."""
    loaded = tokenizer("gpt2")
    texts = ["the end", "The cat's 11 lives!\nthe the\n\n\n  the 1 !! " * 40, "", "the"]
    expected = [loaded.encode(text) for text in texts]
    monkeypatch.setattr(long_texts, "_PART_CHARACTERS", 100)
    longest = []
    encode_batch = Tokenizer.encode_batch
    monkeypatch.setattr(
        Tokenizer, "encode_batch", lambda self, batch: longest.append(max(map(len, batch))) or encode_batch(self, batch)
    )
    assert [ids.tolist() for ids in ReferenceEncoder(loaded).encode([text.encode() for text in texts])] == expected
    assert max(longest) <= 200
    with pytest.raises(BadLine, match="not UTF-8 between bytes 65537 and 65540"):
        list(text_parts(io.BytesIO(b"a" * 65536 + b"b\xffcd")))
    with pytest.raises(BadLine, match="ends within a character"):
        list(text_parts(io.BytesIO("né".encode()[:-1])))


def test_which_tokenizers_are_cut() -> None:
    plain = tokenizer("gpt2").definition
    assert divides_at_blanks(plain)
    assert divides_at_blanks(tokenizer("bert").definition)
    token = {"id": 0, "content": "<x>", "lstrip": False, "rstrip": False, "special": False}
    changes: list[tuple[dict[str, Any], bool]] = [
        ({"pre_tokenizer": {**plain["pre_tokenizer"], "add_prefix_space": True}}, False),
        ({"pre_tokenizer": {**plain["pre_tokenizer"], "use_regex": False}}, False),
        ({"pre_tokenizer": {"type": "Metaspace"}}, False),
        ({"pre_tokenizer": None}, False),
        ({"normalizer": {"type": "NFC"}}, False),
        ({"added_tokens": [token]}, True),
        ({"added_tokens": [{**token, "content": "a b"}]}, False),
        ({"added_tokens": [{**token, "lstrip": True}]}, False),
        ({"added_tokens": [{**token, "rstrip": True, "special": True}]}, True),
        ({"added_tokens": [{**token, "content": "i.e."}]}, False),
        ({"added_tokens": [{**token, "content": "中，"}]}, False),
        ({"added_tokens": [{**token, "content": "x\u037e"}]}, False),
        ({"added_tokens": [{**token, "content": ",x"}]}, True),
        ({"added_tokens": [{**token, "content": ",x", "single_word": True}]}, False),
    ]
    for change, expected in changes:
        assert divides_at_blanks({**plain, **change}) is expected, change


def prepared(folder: Path, name: str, **options: Any) -> tuple[dict[str, bytes], Any]:
    manifest = prepare(
        PrepareOptions(inputs=[folder / "in"], tokenizer=tokenizer("gpt2"), output=folder / name, workers=1, split="100,0,0", **options)
    )  # fmt: skip
    return {path.name: path.read_bytes() for path in (folder / name).glob("train*")}, manifest


def test_the_dataset_is_that_of_whole_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").write_text("\ufeff" + "The cat's 11 lives!\nthe the\n\n\n  the 1 !! " * 300, "utf-8")
    (tmp_path / "in/b.txt").write_text("the end", "utf-8")
    (tmp_path / "in/blank.txt").write_text(" \n" * 500, "utf-8")
    (tmp_path / "in/bad.txt").write_bytes(b"the \n" * 300 + b"\xff the")
    monkeypatch.setattr(long_texts, "_PART_CHARACTERS", 200)
    monkeypatch.setattr(long_texts, "_BLOCK_BYTES", 64)
    with pytest.raises(DataError, match=r"bad\.txt:1: not UTF-8"):
        prepared(tmp_path, "stopped")
    in_parts, found = prepared(tmp_path, "parts", on_error="skip")
    monkeypatch.setattr("megatron_lion.prepare.pipeline.divides_at_blanks", lambda definition: False)
    whole, expected = prepared(tmp_path, "whole", on_error="skip")
    assert in_parts == whole
    assert found == expected
    assert (found.documents, found.skipped, found.rejected) == (2, {"empty_document": 1}, {"not_utf8": 1})
    assert check_indexed(tmp_path / "parts" / "train_text_document").num_documents == 2


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_real_text_with_a_real_vocabulary(shared_data: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """GPT-2's and BERT's vocabularies on WikiText, novels and web pages, cut every few hundred characters."""
    own = load_tokenizer(shared_data / name)
    assert divides_at_blanks(own.definition)
    monkeypatch.setattr(long_texts, "_BLOCK_BYTES", 64)
    texts = [(shared_data / "wikitext" / name).read_text("utf-8") for name in ("wiki.valid.tokens", "wiki.test.raw")]
    texts.append("\n".join(itertools.islice(read_documents([shared_data / "corpus" / "sample.jsonl"]), 100)))
    for number, text in enumerate(texts):
        monkeypatch.setattr(long_texts, "_PART_CHARACTERS", 150 + 37 * number)
        text = text[:60_000]
        parts = list(text_parts(io.BytesIO(text.encode())))
        assert len(parts) > 100
        assert [index for part in parts for index in own.encode(part)] == own.encode(text)


def test_a_text_that_is_encoded_at_once_is_named_with_its_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").write_text("the end of the text\n" * 500, "utf-8")
    (tmp_path / "in/b.txt").write_text("the end", "utf-8")
    monkeypatch.setattr("megatron_lion.prepare.size_estimate._LONG_TEXT_BYTES", 5000)
    prepared(tmp_path, "parts")
    assert "at once" not in caplog.text
    monkeypatch.setattr("megatron_lion.prepare.pipeline.divides_at_blanks", lambda definition: False)
    prepared(tmp_path, "whole")
    [line] = [record.getMessage() for record in caplog.records if "at once" in record.getMessage()]
    assert "a.txt: is one document of 0 MB, which this tokenizer encodes at once" in line
    assert "--txt-documents blank-line" in line


MEASURE = """
import resource, sys
from megatron_lion.prepare.pieces import read_documents
from megatron_lion.prepare.pipeline import PrepareOptions, prepare
if __name__ == "__main__":
    prepare(PrepareOptions(inputs=[sys.argv[1]], tokenizer=sys.argv[2], output=sys.argv[3], workers=1))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_a_document(tmp_path: Path) -> None:
    """Encoded at once, a document of 12 MB took 1.5 GB."""
    tokenizer("gpt2").save(tmp_path / "tokenizer")
    line = "".join(
        f"{word} the {word % 7}'s number!\n" for word in np.random.default_rng(0).integers(0, 999, 20_000).tolist()
    )
    peak = []
    for times in (1, 40):
        path = tmp_path / f"{times}.txt"
        path.write_text(line * times)
        words = [sys.executable, "-c", MEASURE, str(path), str(tmp_path / "tokenizer"), str(tmp_path / f"out{times}")]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        peak.append(int(done.stdout))
    size = (tmp_path / "40.txt").stat().st_size >> 20
    assert size >= 12
    assert peak[1] - peak[0] < 4 * size + 50, "at most the tokens, mapped, and some buffers"
