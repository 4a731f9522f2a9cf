"""Lines of JSON: the fast decoder gives what the rules of `lines` give, which Python's decoder implements alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from megatron_lion.data.tokenizer_files import _json_bytes
from megatron_lion.prepare.lines import BadLine, Skip, text_of_line


def outcome(line: bytes, key: str) -> tuple[str, str]:
    try:
        return "text", text_of_line(line, key)
    except BadLine as bad:
        return bad.kind, bad.what
    except Skip as skip:
        return "skip", skip.kind


def by_rules(line: bytes, key: str) -> tuple[str, str]:
    """The same by Python's decoder alone."""

    def refuse(_: bytes) -> Any:
        raise orjson.JSONDecodeError("", "", 0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(orjson, "loads", refuse)
        return outcome(line, key)


_CHARACTERS = st.one_of(
    st.characters(codec="utf-8"), st.sampled_from(["\ufeff", "\ud83d", "\x00", '"', "\\", "\u2028"])
)
_STRINGS = st.text(_CHARACTERS, max_size=8)
_LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.sampled_from([1e308, 2**63, -(2**64)]),
    _STRINGS,
)
_VALUES = st.recursive(
    _LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(_STRINGS | st.sampled_from(["text", "a"]), inner, max_size=3)
    ),
    max_leaves=8,
)
_ENDS = st.sampled_from([b"", b"\n", b"\r\n", b" \t", b"\x0b", b"x"])
_OBJECTS = st.fixed_dictionaries({"text": _STRINGS | _VALUES}, optional={"a": _VALUES, "text.b": _STRINGS})


@examples(400)
@given(
    st.one_of(_OBJECTS, _VALUES), st.booleans(), st.sampled_from(["text", "a.text", "text.b"]),
    st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=2), _ENDS,
)  # fmt: skip
def test_both_decoders_agree(value: Any, ascii: bool, key: str, changes: list[tuple[int, int]], end: bytes) -> None:
    line = bytearray(json.dumps(value, ensure_ascii=ascii).encode("utf-8", "surrogatepass") + end)
    for place, byte in changes:  # damage
        if place < len(line):
            line[place] = byte
    assert outcome(bytes(line), key) == by_rules(bytes(line), key)


@pytest.mark.parametrize(
    "line",
    [
        b'{"text": "a", "n": 1e999}', b'{"text": "a", "n": NaN}', b'{"text": "a", "n": ' + b"9" * 5000 + b"}",
        b'{"text": "\\ud83d"}', b'{"text": "\\ud83d\\ude00"}', b'{"text": "a", "text": "b"}', b'{"text": "\\u0000"}',
        b'{"text": "\xed\xa0\x80"}', b'{"text": "\xef\xbf\xbe"}', b"[1]", b"3", b'"x"', b"true", b"-", b"\xef\xbb\xbf{}",
        b'{"text": "a", "b": ' + b"[" * 99 + b"]" * 99 + b"}", b'{"text": "a", "b": ' + b"[" * 100 + b"]" * 100 + b"}",
        b'{"text": "a", "b": ' + b"[" * 1100 + b"]" * 1100 + b"}", b"[" * 100_000, b'{"text": "' + b"[{" * 300 + b'"}',
    ],
)  # fmt: skip
def test_both_decoders_agree_at_the_edges(line: bytes) -> None:
    assert outcome(line, "text") == by_rules(line, "text")


@pytest.mark.parametrize(
    ("depth", "kind"), [(100, "text"), (101, "too_deep"), (1100, "too_deep"), (100_000, "too_deep")]
)
def test_depth(depth: int, kind: str) -> None:
    assert outcome(b'{"text": "a", "b": ' + b"[" * depth + b"]" * depth + b"}", "text")[0] == kind


def test_the_nasty_corpus(shared_data: Path) -> None:
    lines = (shared_data / "corpus/nasty.jsonl").read_bytes().split(b"\n")
    found = [outcome(line, "text") for line in lines]
    assert found == [by_rules(line, "text") for line in lines]
    assert len({kind for kind, _ in found}) > 6


@examples(200)
@given(st.dictionaries(st.text(max_size=5), st.recursive(st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=5),
       lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3))), st.booleans())  # fmt: skip
def test_written_json_is_that_of_the_standard_library(value: dict[str, Any], sort_keys: bool) -> None:
    expected = json.dumps(value, indent=2, ensure_ascii=False, sort_keys=sort_keys) + "\n"
    assert _json_bytes(value, sort_keys) == expected.encode("utf-8")
