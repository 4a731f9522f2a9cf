"""WikiText: detokenisation, word counts, pages and published files."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import examples
from tokenizers import ByteLevelBPETokenizer

from megatron_lion.errors import DataError
from megatron_lion.evaluate import wikitext


def test_exact_counts_of_the_published_convention(shared_data: Path) -> None:
    text = wikitext.read_text(shared_data / "wikitext" / "wiki.test.tokens", "wikitext103")
    bpe = ByteLevelBPETokenizer(str(shared_data / "gpt2" / "vocab.json"), str(shared_data / "gpt2" / "merges.txt"))
    n_tok = len(bpe.encode(text.encoded).ids)
    assert text.version == "WikiText-103 tokens test"
    assert (text.n_orig, n_tok) == (245_566, 270_330)
    assert (n_tok - 1) / (text.n_orig - 1) == 1.1008449901248143


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("wiki.valid.tokens", "WikiText-103 tokens valid"),
        ("wiki.test.raw", "WikiText raw test"),
        ("test.txt", "WikiText-2 tokens test"),
        ("valid.txt", "WikiText-2 tokens valid"),
        ("train-2.txt", "unknown"),
    ],
)
def test_files_are_recognised_by_their_bytes(shared_data: Path, name: str, version: str) -> None:
    assert wikitext.read_text(shared_data / "wikitext" / name, "wikitext103").version == version


def test_the_raw_test_file_splits_into_the_harness_pages(shared_data: Path) -> None:
    text = wikitext.read_text(shared_data / "wikitext" / "wiki.test.raw", "wikitext103").original
    pages = wikitext.split_pages(text)
    assert len(pages) == 62
    # Only the newline before each page and the file's blank opening line are lost.
    assert "\n".join(pages) == text[text.index(pages[0]) :]
    assert sum(map(wikitext.count_harness_words, pages)) == 241_335


@pytest.mark.parametrize(
    ("given_text", "expected"),
    [
        ("the players ' union", "the players' union"),
        ("x @-@ y 1 @,@ 000 3 @.@ 5", "x-y 1,000 3.5"),
        ("a : b ; c . d ! e ? f , g", "a: b; c. d! e? f, g"),
        ("( a ) [ b ] { c }", "(a) [b] {c}"),
        ('" quoted "', '"quoted"'),
        ("= = = = Four = = = =", "==== Four ===="),
        ("10 ° C", "10°C"),
        ("line one . \n line two", "line one.\nline two"),
        ("about N people", "about 1 people"),
        ("Anna 's book", "Anna's book"),
    ],
)
def test_each_rule(given_text: str, expected: str) -> None:
    assert wikitext.detokenize(given_text) == expected


@examples(50)
@given(st.text(alphabet="ab .,@-=\n'\"()", max_size=80))
def test_detokenising_takes_or_replaces_blanks_only(text: str) -> None:
    before = text.replace("@-@", "-").replace("@,@", ",").replace("@.@", ".")
    assert "".join(wikitext.detokenize(text).split()).replace("@", "") == "".join(before.split()).replace("@", "")


@examples(50)
@given(st.text(alphabet="a= \n", max_size=60))
def test_pages_lose_nothing_but_blanks(text: str) -> None:
    assert "".join("".join(wikitext.split_pages(text)).split()) == "".join(text.split())


def test_plain_text_is_encoded_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "prose.txt"
    path.write_text("One , two .\nThree", encoding="utf-8")
    text = wikitext.read_text(path, "text")
    assert text.encoded == "One , two .\nThree"
    assert (text.n_orig, text.version) == (5, "unknown")


@pytest.mark.parametrize(
    ("content", "says"), [(b"", "empty"), (b"word\n", "empty or a single word"), (b"a \xff b", "byte 2")]
)
def test_unusable_texts_are_refused(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=says):
        wikitext.read_text(path, "wikitext103")


def test_missing_text_and_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such text file"):
        wikitext.read_text(tmp_path / "none.txt", "text")
    with pytest.raises(DataError, match="a folder was given"):
        wikitext.read_text(tmp_path, "text")
