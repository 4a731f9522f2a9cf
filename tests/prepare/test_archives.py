"""Tar archives as input: the documents of OpenWebText's forms, members of every kind, and damage at every level."""

from __future__ import annotations

import dataclasses
import gzip
import json
import lzma
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from tar_files import COMPRESS, CUTTINGS, SKIP, entry, lines_of, openwebtext, read, tar, with_field

from megatron_lion.commands.own_text import open_text
from megatron_lion.errors import DataError
from megatron_lion.evaluate.text_rows import read_all_documents, read_rows
from megatron_lion.prepare import archives
from megatron_lion.prepare.find_files import input_file, survey
from megatron_lion.prepare.given_texts import read_given_texts
from megatron_lion.prepare.pieces import ReadOptions, cut_pieces, read_documents
from megatron_lion.prepare.tar_entries import tar_entries

TEXTS = [f"Document {i} of a corpus\nwith a second line, été {i * i}." for i in range(60)]


@pytest.fixture(params=CUTTINGS)
def cutting(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """How an archive reaches the workers; returns the size of the pieces."""
    if request.param == CUTTINGS[0]:
        return 1 << 18
    monkeypatch.setattr(archives, "WHOLE_BYTES", 700 if request.param == CUTTINGS[1] else 1)
    return 1


FORMS = {
    "owt.tar.xz": lambda: lzma.compress(openwebtext(TEXTS, 7)),
    "owt.tar": lambda: openwebtext(TEXTS, 7),
    "OWT.TXZ": lambda: lzma.compress(openwebtext(TEXTS, 7)),
    "owt.tgz": lambda: gzip.compress(openwebtext(TEXTS, 7, ".gz")),
    "owt.tar.bz2": lambda: COMPRESS[".bz2"](openwebtext(TEXTS, 60, ".bz2")),
    "owt.tar.zst": lambda: pytest.importorskip("zstandard").ZstdCompressor().compress(openwebtext(TEXTS, 7)),
    "urlsf_subset00-1_data.xz": lambda: lzma.compress(tar([(f"{i}.txt", t.encode()) for i, t in enumerate(TEXTS)])),
    "plain.tar": lambda: tar([(f"a/{i}.text", t.encode()) for i, t in enumerate(TEXTS)]),
    "lines.tar": lambda: tar([("a/a.jsonl", lines_of(TEXTS[:9])), ("b.ndjson.gz", gzip.compress(lines_of(TEXTS[9:])))]),
    "values.tar": lambda: tar([("a.json", json.dumps([{"text": t} for t in TEXTS], indent=1).encode())]),
    "mixed.tar": lambda: tar([("a.txt.xz", lzma.compress(TEXTS[0].encode())), ("b.json", b"\xef\xbb\xbf" + lines_of(TEXTS[1:3])),
                              ("c/d.tgz", gzip.compress(openwebtext(TEXTS[3:], 9)))]),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_the_documents_of_every_form_in_order(tmp_path: Path, name: str, cutting: int) -> None:
    path = tmp_path / name
    path.write_bytes(FORMS[name]())
    documents, count = read(path, ReadOptions(), cutting)
    assert documents == TEXTS
    assert (count.lines, count.skipped, count.rejected) == (len(TEXTS), {}, {})
    assert [file.format for file in survey([tmp_path]).files] == ["tar"]
    pieces = list(cut_pieces(input_file(path), cutting))
    assert (pieces[0].members is None) == (cutting > 1)
    assert list(read_documents([tmp_path])) == TEXTS


def test_a_folder_of_inner_archives_and_the_order_of_the_list(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(3):
        files = [(f"{i}.txt", text.encode()) for i, text in enumerate(TEXTS[20 * number : 20 * number + 20])]
        (tmp_path / f"in/urlsf_subset00-{number}_data.xz").write_bytes(lzma.compress(tar(files)))
    (tmp_path / "in/table.csv.gz").write_bytes(gzip.compress(b"a,b\n" * 200))
    (tmp_path / "in/broken.xz").write_bytes(b"no xz")
    found = survey([tmp_path / "in"])
    assert [(file.path.name, file.format, file.compression) for file in found.files] == [
        (f"urlsf_subset00-{number}_data.xz", "tar", ".xz") for number in range(3)
    ]
    assert found.unread_counts() == {".csv.gz": 1, ".xz": 1}
    assert list(read_documents([tmp_path / "in"])) == TEXTS
    for name in ("table.csv.gz", "broken.xz"):
        with pytest.raises(DataError, match=rf"{name}: unknown ending .*--format jsonl\|txt\|parquet\|arrow\|tar"):
            survey([tmp_path / "in" / name])
    (tmp_path / "archive").write_bytes(tar([("a.txt", b"one")]))
    assert [file.format for file in survey([tmp_path / "archive"], "tar").files] == ["tar"]
    (tmp_path / "b.tgz").write_bytes(gzip.compress(tar([("a.txt", b"one")])))
    assert survey([tmp_path / "b.tgz"], "tar").files[0].compression == ".gz"


def test_members_that_are_not_read_are_counted_by_kind(tmp_path: Path, cutting: int) -> None:
    others = [
        entry("d", type=tarfile.DIRTYPE), ("README.md", b"#"), ("LICENSE", b""), ("x.zip", b"PK"), (".hidden.txt", b"h"),
        ("._a.txt", b"h"), ("d/.git/a.txt", b"h"), ("a.csv.gz", gzip.compress(b"a,b\n" * 900)), ("t.parquet", b"PAR1"),
        ("dataset_info.json", b"{}"),
    ]  # fmt: skip
    (tmp_path / "a.tar").write_bytes(tar([*others, ("./good.txt", b"good"), ("empty.txt", b" \n")]))
    documents, count = read(tmp_path / "a.tar", ReadOptions(), cutting)
    assert documents == ["good"]
    kinds = {".md": 1, "without ending": 1, ".zip": 1, "hidden": 3, ".csv.gz": 1, ".parquet": 1, "dataset_info.json": 1}
    assert count.skipped == {f"member not read ({kind})": n for kind, n in kinds.items()} | {"empty_document": 1}


def test_odd_names(tmp_path: Path) -> None:
    """Equal names are documents of their own; names of any bytes and lengths are allowed, and shown escaped."""
    long = "d/" * 90 + "x" * 150 + ".txt"
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        members = [
            ("a.txt", b"first"),
            ("a.txt", b"second"),
            (long, b"long"),
            ("caf\udce9.txt", b"bytes"),
            ("東京.txt", b"east"),
        ]
        data = tar([*members, ("bad\x1b[31m\n\udce9.txt", b"\xff")], format)
        (tmp_path / "a.tar").write_bytes(data)
        documents, count = read(tmp_path / "a.tar")
        assert documents == ["first", "second", "long", "bytes", "east"]
        assert count.problems[0][2].startswith("member bad\\x1b[31m\\n\\udce9.txt: not UTF-8")


def test_names_in_two_fields(tmp_path: Path) -> None:
    """A ustar header has the folders of a long name in a second field, where one of GNU's format has times."""
    long = "deep/" * 20 + "x" * 60 + ".txt"
    (tmp_path / "a.tar").write_bytes(tar([(long, b"\xff"), (f".hidden/{long}", b"h")], tarfile.USTAR_FORMAT))
    _, count = read(tmp_path / "a.tar")
    assert count.problems[0][2] == f"member {long}: not UTF-8 at byte 1"
    assert count.skipped == {"member not read (hidden)": 1}
    (tmp_path / "a.tar").write_bytes(with_field(tar([("a.txt", b"\xff")], tarfile.GNU_FORMAT), 345, b"14700000000\0"))
    assert read(tmp_path / "a.tar")[1].problems[0][2] == "member a.txt: not UTF-8 at byte 1"


def test_links_and_folders_have_no_data_whatever_their_size(tmp_path: Path, cutting: int) -> None:
    for kind, rejected in ((tarfile.LNKTYPE, {"link": 1}), (tarfile.DIRTYPE, {})):
        data = tar([entry("first", type=kind, linkname="a"), ("two.txt", b"two"), ("three.txt", b"three")])
        (tmp_path / "a.tar").write_bytes(with_field(data, 124, b"00000001274\0"))
        documents, count = read(tmp_path / "a.tar", SKIP, cutting)
        assert (documents, count.rejected) == (["two", "three"], rejected)


def test_paragraphs_and_the_key_of_members(tmp_path: Path, cutting: int) -> None:
    book = b"one\nline\n\n\ntwo\n\xff\n\nthree"
    (tmp_path / "a.tar").write_bytes(tar([("a.txt", book), ("b.jsonl", b'{"meta": {"body": "four"}}\n')]))
    options = ReadOptions("meta.body", "blank-line", "skip")
    documents, count = read(tmp_path / "a.tar", options, cutting)
    assert documents == ["one\nline", "three", "four"]
    (problem,) = count.problems
    assert problem[1:] == ("not_utf8", "member a.txt:5: not UTF-8 at byte 5")
    (tmp_path / "b.tar").write_bytes(tar([("b.jsonl", b'{"meta": {"body": "four"}}\n')]))
    with pytest.raises(DataError, match=r"b\.tar: member b\.jsonl:1: no key 'text' \(its keys: 'meta'\)"):
        list(read_documents([tmp_path / "b.tar"]))


def test_lines_of_a_large_member_keep_their_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A member of more than one piece is cut into lines, or values, by the process that reads the archive."""
    monkeypatch.setattr(archives, "WHOLE_BYTES", 1)
    rows = [{"text": text} for text in TEXTS]
    rows[40] = {"text": 7}  # type of the value
    forms = {
        "a.jsonl": "\n".join(map(json.dumps, rows)).encode(),
        "b.jsonl.gz": gzip.compress("\n".join(map(json.dumps, rows)).encode()),
        "c.json": json.dumps(rows, indent=2).encode(),
    }
    for name, data in forms.items():
        (tmp_path / "a.tar").write_bytes(tar([(name, data)]))
        (file,) = survey([tmp_path / "a.tar"]).files
        members = [member for piece in cut_pieces(file, 200) for member in piece.members or ()]
        assert len(members) > 10
        assert {member.format for member in members} == {"value lines" if name == "c.json" else "lines"}
        documents, count = read(tmp_path / "a.tar", SKIP, 200)
        assert documents == TEXTS[:40] + TEXTS[41:]
        unit = ": value 41: " if name == "c.json" else ":41: "
        assert count.problems[0][2].startswith(f"member {name}{unit}'text' is a number")
    data = b'\xef\xbb\xbf{"text": "a"}\n' * 2
    (tmp_path / "a.tar").write_bytes(tar([("m.jsonl", data)]))
    documents, count = read(tmp_path / "a.tar", SKIP, 16)
    assert (documents, count.rejected) == (["a"], {"byte_order_mark": 1}), (
        "a mark begins a member, and no later part of it"
    )


def test_archives_inside_archives_have_a_limit(tmp_path: Path, cutting: int) -> None:
    data = tar([("deep.txt", b"deep")])
    for level in range(2, 6):
        data = tar([(f"{level}.txt", b"%d" % level), (f"{level}.tar", data)])
        (tmp_path / "a.tar").write_bytes(data)
        documents, count = read(tmp_path / "a.tar", SKIP, cutting)
        above = [str(n) for n in range(level, max(level - 4, 1), -1)]
        assert documents == above + (["deep"] if level <= 4 else [])
        assert count.rejected == ({"too_deep": 1} if level > 4 else {})
    assert (
        count.problems[0][2] == "member 5.tar: member 4.tar: member 3.tar: member 2.tar: is more than 4 archives deep"
    )


def test_long_documents_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cutting: int) -> None:
    monkeypatch.setattr(archives, "MAX_DOCUMENT_BYTES", 1 << 20)
    big = b"x " * ((1 << 19) + 1)
    for name, data, said in (
        ("big.txt", big, r"has 1,048,578 bytes; a text file inside an archive may have 1 MiB; unpack it"),
        (
            "big.txt.gz",
            gzip.compress(big),
            "is longer than 1 MiB and would be one document; give --txt-documents blank-line",
        ),
        ("big.jsonl", b'{"text": "' + big, "the line that begins at byte 0 is longer than 1 MiB"),
    ):
        (tmp_path / "a.tar").write_bytes(tar([("ok.txt", b"ok"), (name, data)]))
        with pytest.raises(DataError, match=rf"a\.tar: member {name}: {said}"):
            read(tmp_path / "a.tar", SKIP, max(cutting, 4096))


def test_gnu_tars_own_archives(tmp_path: Path) -> None:
    """The program `tar` writes its formats, appends, joins and adds labels; one block of zeros may be the end."""
    program = shutil.which("tar")
    version = (
        subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout if program else ""
    )
    if "GNU tar" not in version:
        pytest.skip("needs GNU tar")
    folder = tmp_path / "d"
    folder.mkdir()
    texts = {"a.txt": "a", "b.txt": "b", "n" * 180 + ".txt": "long"}
    for name, text in texts.items():
        (folder / name).write_text(text)

    def run(*words: str) -> None:
        subprocess.run(["tar", "--sort=name", "-C", str(tmp_path), *words], check=True, capture_output=True)

    for format in ("gnu", "oldgnu", "pax"):
        run(f"--format={format}", "-cf", f"{tmp_path}/a.tar", "d")
        assert read(tmp_path / "a.tar", ReadOptions())[0] == list(texts.values())
    run("-cf", f"{tmp_path}/a.tar", "d/a.txt")
    run("-cf", f"{tmp_path}/b.tar", "d/b.txt")
    joined = (tmp_path / "a.tar").read_bytes() + (tmp_path / "b.tar").read_bytes()
    run("-A", "-f", f"{tmp_path}/a.tar", f"{tmp_path}/b.tar")
    run("-r", "-f", f"{tmp_path}/a.tar", "d/a.txt")
    assert read(tmp_path / "a.tar", ReadOptions())[0] == ["a", "b", "a"]
    (tmp_path / "a.tar").write_bytes(joined)
    with pytest.raises(DataError, match="joined without tar -A"):
        read(tmp_path / "a.tar")
    run("-V", "label", "-b1", "-cf", f"{tmp_path}/a.tar", f"--listed-incremental={tmp_path}/snapshot", "d")
    assert read(tmp_path / "a.tar", ReadOptions())[0] == list(texts.values())
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:-512])
    assert read(tmp_path / "a.tar", ReadOptions())[0] == list(texts.values())
    with open(folder / "a.txt", "wb") as stream:
        for place in range(30):  # the map of the holes takes several headers
            stream.seek(place << 17)
            stream.write(b"x")
    for version in ("gnu", "pax"):
        run("-S", f"--format={version}", "-cf", f"{tmp_path}/a.tar", "d/a.txt", "d/b.txt")
        documents, count = read(tmp_path / "a.tar")
        assert (documents, count.rejected) == (["b"], {"sparse_file": 1})


def test_an_archive_is_read_once_from_its_beginning() -> None:
    """The entries come while the stream is read, and only the part of a member that is asked for is in memory."""
    data = tar([(f"{i}.txt", b"x" * 3000) for i in range(50)])

    class Stream:
        read_bytes = largest = 0

        def read(self, size: int, /) -> bytes:
            self.largest = max(self.largest, size)
            self.read_bytes += size
            return data[self.read_bytes - size : self.read_bytes]

    stream = Stream()
    entries = tar_entries(stream)
    for number, found in zip(range(10), entries, strict=False):
        assert found.name == f"{number}.txt"
        assert stream.read_bytes == 512 + number * 3584
    assert len(list(entries)) == 40
    assert stream.largest == 1 << 20


def test_text_for_a_run_and_for_evaluation(tmp_path: Path) -> None:
    (tmp_path / "owt.tar.xz").write_bytes(lzma.compress(openwebtext([text * 9 for text in TEXTS], 7)))
    text = open_text([str(tmp_path)], 1)
    assert text.text_bytes == sum(len((text * 9).encode()) for text in TEXTS)
    assert text.divide_documents == "auto"
    file = input_file(tmp_path / "owt.tar.xz")
    assert list(read_all_documents(file, "text")) == [text * 9 for text in TEXTS]
    with pytest.raises(DataError, match=r"owt\.tar\.xz: is an archive"):
        list(read_rows(dataclasses.replace(file), "text"))
    (tmp_path / "b.tar").write_bytes(tar([("a.jsonl", b"oops\n")]))
    with pytest.raises(DataError, match=r"b\.tar: member a\.jsonl:1: not JSON"):
        list(read_all_documents(input_file(tmp_path / "b.tar"), "text"))


def test_an_archive_of_texts_to_search(tmp_path: Path) -> None:
    """`--decontaminate` reads a file with an unknown ending as one text, unless it is an archive."""
    texts = [f"{text} {' '.join(f'word{i}of{n}' for n in range(20))}" for i, text in enumerate(TEXTS)]
    (tmp_path / "my_data.xz").write_bytes(
        lzma.compress(tar([(f"{i}.txt", text.encode()) for i, text in enumerate(texts)]))
    )
    assert [found.documents for found in read_given_texts([tmp_path / "my_data.xz"], tmp_path).found] == [len(TEXTS)]
