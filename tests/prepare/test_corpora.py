"""Readers: the outcome of each hostile line, every compression, and no line divided or lost by cutting."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from megatron_lion.errors import ConfigError, DataError, EnvironmentFault
from megatron_lion.prepare.find_files import find_inputs
from megatron_lion.prepare.lines import BadLine, Skip, text_of_line
from megatron_lion.prepare.pieces import ReadCount, ReadOptions, cut_pieces, read_documents, read_piece

SKIP = ReadOptions(on_error="skip")

# Outcome of each line of the hostile file: "document", or the kind under which it is counted.
NASTY = {
    **dict.fromkeys(range(1, 63), "document"),
    **dict.fromkeys((5, 6, 7), "blank_line"),
    **dict.fromkeys((21, 22), "empty_document"),
    **dict.fromkeys((8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 40, 42, 43, 44, 62), "not_json"),
    **dict.fromkeys((18, 19, 20), "missing_key"),
    **dict.fromkeys((23, 24, 25, 26, 27), "not_a_string"),
    **dict.fromkeys((28, 29, 30, 31), "not_an_object"),
    **dict.fromkeys((36, 37, 38, 39, 60), "not_utf8"),
    2: "byte_order_mark",
    35: "too_deep",
    46: "lone_surrogate",
}


def outcome(line: bytes) -> str:
    try:
        text_of_line(line)
    except (BadLine, Skip) as reason:
        return reason.kind
    return "document"


def test_each_hostile_line_is_decided(shared_data: Path) -> None:
    lines = (shared_data / "corpus/nasty.jsonl").read_bytes().split(b"\n")
    assert {number: outcome(line) for number, line in enumerate(lines, start=1)} == NASTY
    text = {number: text_of_line(lines[number - 1]) for number, kind in NASTY.items() if kind == "document"}
    assert "\r" not in text[3]
    assert "\r\n" in text[4]
    assert len(text[32]) == 12, "the second of two equal keys"
    assert "\x00" in text[41]
    assert len(text[45]) == 54, "U+2028, U+2029 and U+0085 are no line ends"
    assert "\U0001f600" in text[47]
    assert len(text[48]) == 54, "nothing is normalised"
    assert text[54] == "<|endoftext|>"
    assert (len(text[57]), len(text[59])) == (100_000, 2_097_152)


def test_hostile_file_through_the_reader(shared_data: Path) -> None:
    path, count = shared_data / "corpus/nasty.jsonl", ReadCount()
    documents = list(read_documents([path], SKIP, count))
    assert len(documents) == sum(kind == "document" for kind in NASTY.values())
    assert count.lines == 62
    assert count.skipped == {"blank_line": 3, "empty_document": 2}
    assert sum(count.rejected.values()) == 62 - 5 - len(documents)
    assert count.problems[0][:2] == (2, "byte_order_mark")
    with pytest.raises(DataError, match=r"nasty\.jsonl:2: begins with a byte-order mark; .*--on-error skip"):
        list(read_documents([path]))


def test_too_deep_never_overflows() -> None:
    for depth, kind in ((90, "document"), (3000, "too_deep"), (2_000_000, "too_deep")):
        assert outcome(b'{"text": "a", "x": ' + b"[" * depth + b"]" * depth + b"}") == kind
    assert outcome(b'{"text": "' + b"[" * 5000 + b'"}') == "document"
    assert outcome(b'{"text": "a", "x": ' + b"9" * 5000 + b"}") == "document"


def write_jsonl(path: Path, texts: list[str]) -> list[str]:
    path.write_bytes("".join(json.dumps({"text": text}) + "\n" for text in texts).encode())
    return texts


@examples(40)
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), max_size=20),
    piece_bytes=st.integers(1, 200),
    last_newline=st.booleans(),
)
def test_cuts_lose_and_divide_nothing(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], piece_bytes: int, last_newline: bool
) -> None:
    folder = tmp_path_factory.mktemp("cuts")
    data = "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts).encode()
    data += b"\n" if last_newline and texts else b""
    (folder / "a.jsonl").write_bytes(data)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(data))
    for file in find_inputs([folder]):
        documents, lines = [], 0
        pieces = list(cut_pieces(file, piece_bytes))
        for piece in pieces:
            count = ReadCount()
            documents += list(read_piece(piece, SKIP, count))
            lines += count.lines
        assert documents == [text for text in texts if text.strip()]
        assert lines == len(texts)
        assert sum(piece.stored_bytes for piece in pieces) == (file.bytes if texts else 0)


def zst(data: bytes) -> bytes:
    zstandard = pytest.importorskip("zstandard")
    half = len(data) // 2  # two frames, as parallel compressors write
    return b"".join(zstandard.ZstdCompressor().compress(part) for part in (data[:half], data[half:]))


@pytest.mark.parametrize(
    ("ending", "compress"),
    [(".gz", gzip.compress), (".zst", zst), (".xz", lzma.compress), (".bz2", bz2.compress)],
)
def test_compressed_files(tmp_path: Path, ending: str, compress: Callable[[bytes], bytes]) -> None:
    texts = write_jsonl(tmp_path / "a.jsonl", [f"document {i} " + "x" * (i % 700) for i in range(3000)])
    data = (tmp_path / "a.jsonl").read_bytes()
    path = tmp_path / f"b.jsonl{ending}"
    path.write_bytes(compress(data))
    assert list(read_documents([path])) == texts
    path.write_bytes(compress(data)[:-9])
    with pytest.raises(DataError, match=rf"b\.jsonl{ending}: damaged or cut short"):
        list(read_documents([path], SKIP))
    path.write_bytes(b"not compressed at all")
    with pytest.raises(DataError, match=r"b\.jsonl"):
        list(read_documents([path], SKIP))


def test_text_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf\n one\r\ntwo\n\n \nthree\n")
    assert list(read_documents([tmp_path])) == ["\n one\r\ntwo\n\n \nthree\n"]
    by_blank_line = ReadOptions(txt_documents="blank-line")
    assert list(read_documents([tmp_path], by_blank_line)) == [" one\r\ntwo", "three"]
    (tmp_path / "b.txt").write_bytes(b"fine\n\n\xff\xfe\n\nfine too")
    with pytest.raises(DataError, match=r"b\.txt:3: not UTF-8"):
        list(read_documents([tmp_path / "b.txt"], by_blank_line))


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    texts = ["one", None, "two", "", *map(str, range(10))]
    table = pyarrow.table({"text": texts, "n": list(range(14))})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=4)
    count = ReadCount()
    documents = list(read_documents([tmp_path], SKIP, count))
    assert documents == [text for text in texts if text]
    assert (count.lines, count.rejected, count.skipped) == (14, {"not_a_string": 1}, {"empty_document": 1})
    with pytest.raises(DataError, match=r"a\.parquet: row 2: 'text' is null"):
        list(read_documents([tmp_path]))
    for key, said in (
        ("body", "no column 'body' .its columns: text, n"),
        ("n", "holds int64, strings are needed"),
    ):
        with pytest.raises(DataError, match=said):
            list(read_documents([tmp_path], ReadOptions(json_key=key)))
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=r"a\.parquet: damaged"):
        list(read_documents([tmp_path]))


def xz_pair(one: bytes, other: bytes) -> bytes:
    """Two .xz streams with the padding that the format allows after each."""
    return lzma.compress(one) + bytes(8) + lzma.compress(other) + bytes(4)


@pytest.mark.parametrize(
    ("ending", "compress", "pair"),
    [
        (".gz", gzip.compress, None), (".zst", zst, None), (".xz", lzma.compress, None), (".xz", lzma.compress, xz_pair),
        (".bz2", bz2.compress, None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("rest", [b"junk", b"\x00\x00\x00x", b"more than one header of any format " * 3])
def test_bytes_after_the_compressed_data_are_damage(
    tmp_path: Path, ending: str, compress: Callable[[bytes], bytes], pair: Any, rest: bytes
) -> None:
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in ("one", "two" * 100_000)]
    both = pair(*lines) if pair else b"".join(map(compress, lines))
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(both)
    assert list(read_documents([path])) == ["one", "two" * 100_000]
    for data in (both + rest, compress(lines[0]) + rest + compress(lines[1])):
        path.write_bytes(data)
        with pytest.raises(DataError, match=rf"a\.jsonl{ending}: damaged or cut short: .*; download it again"):
            list(read_documents([path]))


def test_padding_of_xz_is_a_multiple_of_four_bytes(tmp_path: Path) -> None:
    path, data = tmp_path / "a.txt.xz", lzma.compress(b"one")
    for zeros in range(1, 9):
        path.write_bytes(data + bytes(zeros))
        if zeros % 4:
            with pytest.raises(
                DataError,
                match=f"damaged or cut short: the number of zero bytes after .*, {zeros}, is no multiple of 4",
            ):
                list(read_documents([path]))
        else:
            assert list(read_documents([path])) == ["one"]
    path.write_bytes(data + bytes(4 * 100_000) + lzma.compress(b" two"))
    assert list(read_documents([path])) == ["one two"]


def test_files_folders_and_patterns(tmp_path: Path) -> None:
    (tmp_path / "in/deep").mkdir(parents=True)
    for name in ("in/b.jsonl", "in/deep/a.jsonl.gz", "in/notes.md", "in/c.txt"):
        (tmp_path / name).write_bytes(b"")

    def names(*inputs: str | Path, format: str = "auto") -> list[str]:
        return [str(file.path.relative_to(tmp_path)) for file in find_inputs(inputs, format)]

    assert names(tmp_path / "in") == ["in/b.jsonl", "in/c.txt", "in/deep/a.jsonl.gz"]
    assert names(tmp_path / "in/*.jsonl", tmp_path / "in/c.txt") == ["in/b.jsonl", "in/c.txt"]
    assert names(f"{tmp_path}/in/**/*.gz") == ["in/deep/a.jsonl.gz"]
    assert names(tmp_path / "in/notes.md", format="txt") == ["in/notes.md"]
    for inputs, said in (
        (["in/none.jsonl"], "no such file or folder"),
        (["in/*.csv"], "no file matches"),
        (["in/notes.md"], r"unknown ending '\.md'"),
        (["in/b.jsonl", "in/*.jsonl"], "named twice"),
    ):
        with pytest.raises(DataError, match=said):
            names(*(tmp_path / name for name in inputs))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no file in this folder"):
        names(tmp_path / "empty")
    with pytest.raises(ConfigError, match="--input"):
        names()


def test_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(b"x")

    def absent(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr("importlib.import_module", absent)
    with pytest.raises(EnvironmentFault, match=r'zstandard: pip install "megatron-lion\[data\]"'):
        list(read_documents([tmp_path]))


@pytest.mark.parametrize(
    ("division", "data", "said"),
    [
        (
            "file",
            b"x" * 5000,
            r"bomb\.txt\.gz: is longer than 0 MiB and would be one document; give --txt-documents blank-line",
        ),
        ("blank-line", b"a\n\n" + b"x" * 5000, r"bomb\.txt\.gz:3: the paragraph that begins here is longer than"),
        ("blank-line", b"a\n\n\n" + b"word\n" * 900, r"bomb\.txt\.gz:4: the paragraph that begins here is longer than"),
    ],
)
def test_a_text_without_an_end_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, division: Any, data: bytes, said: str
) -> None:
    """A few bytes can decompress to more than the memory holds."""
    monkeypatch.setattr("megatron_lion.prepare.pieces.MAX_LINE_BYTES", 1000)
    (tmp_path / "bomb.txt.gz").write_bytes(gzip.compress(data))
    with pytest.raises(DataError, match=said):
        list(read_documents([tmp_path / "bomb.txt.gz"], ReadOptions(txt_documents=division)))
    (tmp_path / "many.txt.gz").write_bytes(gzip.compress(b"word word\n\n" * 500))
    assert len(list(read_documents([tmp_path / "many.txt.gz"], ReadOptions(txt_documents="blank-line")))) == 500


def test_endless_line_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_lion.prepare.pieces.MAX_LINE_BYTES", 1000)
    data = b'{"text": "a"}\n' + b"x" * 5000
    (tmp_path / "a.jsonl").write_bytes(data)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(data))
    for name in ("a.jsonl", "b.jsonl.gz"):
        with pytest.raises(DataError, match="the line that begins at byte 14 is longer"):
            list(read_documents([tmp_path / name], SKIP))
