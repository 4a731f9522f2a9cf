"""Archives that are unsafe, damaged or cut short: each case is named or counted, and never read in part without an error."""

from __future__ import annotations

import gzip
import lzma
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import examples
from tar_files import COMPRESS, CUTTINGS, SKIP, entry, lines_of, read, tar, with_field

from megatron_lion.errors import DataError
from megatron_lion.prepare import archives
from megatron_lion.prepare.pieces import ReadOptions, read_documents

TEXTS = [f"Document {i} of a corpus\nwith a second line, été {i * i}." for i in range(60)]


@pytest.fixture(params=CUTTINGS)
def cutting(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """How an archive reaches the workers; returns the size of the pieces."""
    if request.param == CUTTINGS[0]:
        return 1 << 18
    monkeypatch.setattr(archives, "WHOLE_BYTES", 700 if request.param == CUTTINGS[1] else 1)
    return 1


UNSAFE = [
    (entry("../up.txt", b"x"), "unsafe_name", "has a name that leads out of the archive"),
    (entry("/etc/abs.txt", b"x"), "unsafe_name", "has a name that leads out of the archive"),
    (entry("a/../../b.txt", b"x"), "unsafe_name", "has a name that leads out of the archive"),
    (entry("l.txt", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "link", "is a link, which is not followed"),
    (entry("h.txt", type=tarfile.LNKTYPE, linkname="one.txt"), "link", "is a link, which is not followed"),
    (entry("p.txt", type=tarfile.FIFOTYPE), "special_file", "is no file, but a device, a pipe or something unknown"),
    (entry("null.txt", type=tarfile.CHRTYPE), "special_file", "is no file, but a device"),
    (entry("disk.txt", type=tarfile.BLKTYPE), "special_file", "is no file, but a device"),
    (entry("odd.txt", b"x" * 700, type=b"Q"), "special_file", "is no file, but"),
    (entry("s.txt", b"10\n0\n5\n" + b"x" * 700, pax_headers={"GNU.sparse.major": "1", "GNU.sparse.name": "s.txt"}), "sparse_file",
     "is stored with its holes left out"),
    (entry("latin.txt", "é".encode("latin-1")), "not_utf8", "not UTF-8 at byte 1"),
    (entry("bad.jsonl", b'{"text": "fine"}\noops\n'), "not_json", "not JSON"),
]  # fmt: skip


@pytest.mark.parametrize(("bad", "kind", "said"), UNSAFE, ids=lambda value: value if isinstance(value, str) else "")
@pytest.mark.parametrize("nested", [False, True])
def test_bad_members_are_named_or_counted(
    tmp_path: Path, bad: tuple[tarfile.TarInfo, bytes], kind: str, said: str, nested: bool, cutting: int
) -> None:
    data = tar([("one.txt", b"one"), bad, ("two.txt", b"two")])
    where, line = f"member {bad[0].name}", ":2" if kind == "not_json" else ""
    if nested:
        data, where = tar([("inner.tar.gz", gzip.compress(data))]), f"member inner.tar.gz: {where}"
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(DataError) as caught:
        list(read_documents([tmp_path / "a.tar"]))
    assert str(caught.value).startswith(f"{tmp_path}/a.tar: {where}{line}: {said}")
    assert str(caught.value).endswith("; fix it, or skip such members with --on-error skip")
    documents, count = read(tmp_path / "a.tar", SKIP, cutting)
    assert documents == ["one", *(["fine"] if line else []), "two"]
    assert count.rejected == {kind: 1}


END = bytes(1024)
ONE = tar([("one.txt", b"one"), ("two.txt", b"x" * 700)])[: 512 * 5]
DAMAGED = {
    "empty": (b"", "ends without the mark at its end at its beginning"),
    "no end mark": (ONE, "the archive ends without the mark at its end after member two.txt"),
    "within the data": (ONE[:1700], "the archive ends 536 bytes before the end of member two.txt"),
    "within the padding": (ONE[: 512 * 5 - 1], "ends within the last block of a member"),
    "within a header": (ONE[:1100], "ends within a header after member one.txt"),
    "between": (ONE[:1024], "ends without the mark at its end after member one.txt"),
    "a header's bit": (ONE[:1030] + b"?" + ONE[1031:] + END, "the header after member one.txt is damaged"),
    "joined": (ONE + END + ONE + END, "it continues after the mark at its end, as archives do that were joined without tar -A"),
    "after the end": (ONE + END + b"\n", "it continues after the mark at its end"),
    "negative size": (with_field(ONE, 124, b"\xff" * 12) + END, "the header at its beginning has the size -1"),
    "8 EiB": (with_field(ONE, 124, b"\x80" + (1 << 63).to_bytes(11, "big")) + END, "one.txt: has 9,223,372,036,854,775,808 bytes"),
    "8 EiB of lines": (with_field(with_field(ONE, 124, b"\x80" + (1 << 63).to_bytes(11, "big")), 0, b"a.jsonl") + END,
                       "bytes before the end of member a.jsonl"),
    "8 EiB of a link": (with_field(with_field(ONE, 124, b"\x80" + (1 << 63).to_bytes(11, "big")), 156, b"Q") + END,
                        "bytes before the end of member one.txt"),
    "size of letters": (with_field(ONE, 124, b"elephants\0\0\0") + END, "the header at its beginning is damaged"),
    "pax size": (tar([entry("a.txt", b"x", pax_headers={"size": "-7"})]), "the pax header of a.txt has the size '-7'"),
    "long pax": (with_field(ONE, 156, b"x")[:512] + ONE[512:] + END, "the pax header at its beginning is damaged"),
    "a lone pax header": (tar([entry("a.txt", b"", pax_headers={"path": "p.txt"})])[:1024] + END, "belongs to a further entry"),
    "huge name": (with_field(with_field(ONE, 156, b"L"), 124, b"77777777777\0") + END, "a header at its beginning has 8,589,934,591 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
@pytest.mark.parametrize("level", ["plain", "inner"])
def test_damage_is_never_silent(tmp_path: Path, case: str, level: str, cutting: int) -> None:
    data, said = DAMAGED[case]
    name, where = "a.tar", "a.tar: "
    if level == "inner":
        data = tar([("ok.txt", b"ok"), ("in.tar.xz", lzma.compress(data)), ("more.txt", b"more")])
        where = "a.tar: member in.tar.xz: "
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError) as caught:
        read(tmp_path / name, SKIP, cutting)
    assert where in str(caught.value)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damage_inside_compressed_members_names_them(tmp_path: Path, cutting: int) -> None:
    whole = lzma.compress(tar([(f"{i}.txt", text.encode()) for i, text in enumerate(TEXTS)]))
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 4
    for inner in (whole[:-20], bytes(flipped), whole + b"x", b"no xz"):
        outer = tar([("ok.txt", b"ok"), ("sub/urlsf_data.xz", inner)])
        (tmp_path / "owt.tar.xz").write_bytes(lzma.compress(outer))
        with pytest.raises(
            DataError, match=r"owt\.tar\.xz: member sub/urlsf_data\.xz: .*damaged or cut short: .*; download"
        ):
            read(tmp_path / "owt.tar.xz", SKIP, cutting)
        (tmp_path / "owt.tar.xz").write_bytes(lzma.compress(outer)[:-30])
        with pytest.raises(DataError, match=r"owt\.tar\.xz: .*damaged or cut short"):
            read(tmp_path / "owt.tar.xz", SKIP, cutting)


def a_text() -> st.SearchStrategy[str]:
    return st.text(st.characters(exclude_categories=["Cs"]), max_size=60).filter(
        lambda text: not text.startswith("\ufeff")
    )


@st.composite
def an_archive(draw: st.DrawFn, depth: int = 0) -> tuple[bytes, list[str]]:
    """The bytes of an archive with random members, and its documents."""
    members: list[tuple[str, bytes]] = []
    documents: list[str] = []
    kinds = ["txt", "jsonl", "other"] + (["tar"] if depth < 2 else [])
    for number, kind in enumerate(draw(st.lists(st.sampled_from(kinds), max_size=5))):
        compression = draw(st.sampled_from(list(COMPRESS)))
        ending, found = kind, draw(st.lists(a_text(), max_size=4))
        if kind == "tar":
            data, found = draw(an_archive(depth=depth + 1))
            ending = draw(st.sampled_from(["tar", "data"] if compression else ["tar"]))
        elif kind == "jsonl":
            data = lines_of(found)
        else:
            data = "".join(found).encode()
            found = ["".join(found)] if kind == "txt" else []
        documents += [text for text in found if text and not text.isspace()]
        members.append(
            (
                f"{number}{draw(st.sampled_from(['', 'é' * 60, 'x' * 200]))}.{ending}{compression}",
                COMPRESS[compression](data),
            )
        )
    return tar(members, draw(st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))), documents


@examples(60)
@given(
    made=an_archive(), compression=st.sampled_from(list(COMPRESS)), whole=st.sampled_from([1, 300, 1 << 22]), piece=st.integers(1, 3000),
    keep=st.floats(0, 1), flip=st.booleans(),
)  # fmt: skip
def test_cut_archives_give_all_documents_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, made: tuple[bytes, list[str]], compression: str, whole: int, piece: int, keep: float,
    flip: bool,
) -> None:  # fmt: skip
    path = tmp_path_factory.mktemp("cut") / f"a.tar{compression}"
    data, documents = COMPRESS[compression](made[0]), made[1]
    damaged = data[: int(keep * len(data))]
    if flip and compression:  # its checksums notice
        place = int(keep * (len(data) - 1))
        damaged = data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(archives, "WHOLE_BYTES", whole)
        path.write_bytes(data)
        assert read(path, ReadOptions(), piece)[0] == documents
        path.write_bytes(damaged)
        said = f"a.tar{compression}: "
        try:
            found = read(path, ReadOptions(), piece)[0]
        except DataError as error:
            found, said = documents, str(error)
    assert found == documents
    assert f"a.tar{compression}: " in said
