"""Input files in practice: links, hidden files, endings, tables of other writers, JSON that is not JSON lines."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lion.cli import main
from megatron_lion.errors import DataError
from megatron_lion.prepare.find_files import survey
from megatron_lion.prepare.pieces import ReadCount, ReadOptions, cut_pieces, read_documents, read_piece

TEXTS = ["one", "two", "three\n\u2028 four", "naïve café 東京"]


def write_lines(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    path.write_bytes(gzip.compress(data) if path.suffix.lower() == ".gz" else data)


def names(folder: Path) -> tuple[list[str], dict[str, int]]:
    found = survey([folder])
    return [str(file.path.relative_to(folder)) for file in found.files], found.unread_counts()


def test_links_are_followed_once(tmp_path: Path) -> None:
    write_lines(tmp_path / "disk2/b.jsonl", ["b"])
    write_lines(tmp_path / "disk2/deep/c.jsonl", ["c"])
    write_lines(tmp_path / "in/real/a.jsonl", ["a"])
    (tmp_path / "in/linked").symlink_to("../disk2")
    assert names(tmp_path / "in") == (["linked/b.jsonl", "linked/deep/c.jsonl", "real/a.jsonl"], {})
    # A loop, a second link to the same folder, and a link to a folder inside, which keeps its own path.
    (tmp_path / "disk2/deep/up").symlink_to("../../in")
    (tmp_path / "in/again").symlink_to("../disk2")
    (tmp_path / "in/aaa").symlink_to("real")
    (tmp_path / "in/file.jsonl").symlink_to("real/a.jsonl")
    (tmp_path / "in/gone.jsonl").symlink_to("nowhere")
    found, unread = names(tmp_path / "in")
    assert [os.path.basename(path) for path in found] == ["b.jsonl", "c.jsonl", "a.jsonl"]
    assert "real/a.jsonl" in found
    assert unread == {"linked again": 4, "broken link": 1}
    assert list(read_documents([tmp_path / "in"])) == ["b", "c", "a"]


def test_the_folders_that_a_pattern_matches_are_searched(tmp_path: Path) -> None:
    for name in ("in/a.jsonl", "in/b/b.jsonl", "in/b/deep/c.jsonl", "in/.h/d.jsonl", "else/e.jsonl", "else/.x/f.jsonl"):
        write_lines(tmp_path / name, [name])
    (tmp_path / "in/b/x.zip").write_bytes(b"")
    (tmp_path / "in/linked").symlink_to("../else")

    def matched(pattern: str, root: Path = tmp_path / "in") -> tuple[list[str], dict[str, int]]:
        found = survey([f"{root}/{pattern}"])
        assert list(found.unread) == [f"{root}/{pattern}"]
        return [str(file.path.relative_to(root)) for file in found.files], found.unread_counts()

    everything = ["a.jsonl", "b/b.jsonl", "b/deep/c.jsonl", "linked/e.jsonl"]
    assert matched("*") == (everything, {".zip": 1, "hidden": 1})
    assert matched("**") == (everything, {".zip": 1, "hidden": 2})
    assert matched("*/") == (everything[1:], {".zip": 1, "hidden": 1})
    assert matched("b*") == (everything[1:3], {".zip": 1})
    assert matched("*.jsonl") == (["a.jsonl"], {})
    assert matched("**/*.jsonl") == (everything, {})
    assert matched(".h*") == ([".h/d.jsonl"], {})
    assert matched("*", tmp_path)[0] == ["else/e.jsonl", *(f"in/{name}" for name in everything[:3])]
    (note,) = survey([f"{tmp_path}/in/b*"]).notes()
    assert note == f"1 file of {tmp_path}/in/b* is not read (.zip 1)"
    (tmp_path / "in/again").symlink_to("b")
    (tmp_path / "in/same.jsonl").symlink_to("a.jsonl")
    (tmp_path / "in/gone.jsonl").symlink_to("nowhere")
    assert matched("*") == (everything, {".zip": 1, "hidden": 1, "linked again": 2, "broken link": 1})
    assert matched("*.jsonl") == (["a.jsonl"], {"linked again": 1, "broken link": 1})
    (tmp_path / "none/deep").mkdir(parents=True)
    (tmp_path / "none/deep/y.zip").write_bytes(b"")
    with pytest.raises(
        DataError, match=r"no file in the folders that match ends in .*; 1 file of .*\* is not read \(.zip 1"
    ):
        matched("*", tmp_path / "none")
    with pytest.raises(DataError, match="named twice"):
        survey([f"{tmp_path}/in/*", f"{tmp_path}/in/b"])


def test_every_file_of_a_folder_is_accounted_for(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.JSONL.GZ", "deep/c.NdJson"):
        write_lines(tmp_path / name, [name])
    others = {
        "x.zip": ".zip", "y.jsonl.zip": ".zip", "z.csv": ".csv", "README.md": ".md", "LICENSE": "without ending",
        "table.csv.gz": ".csv.gz", ".a.jsonl": "hidden", "._a.jsonl": "hidden", ".ipynb_checkpoints/a-checkpoint.jsonl": "hidden",
        ".git/objects/aa/bb": "hidden", "dataset_infos.json": "dataset_infos.json",
    }  # fmt: skip
    for name in others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"{}")
    os.mkfifo(tmp_path / "pipe.jsonl")
    expected: dict[str, int] = {"not a regular file": 1}
    for kind in others.values():
        expected[kind] = expected.get(kind, 0) + 1
    found, unread = names(tmp_path)
    assert found == ["a.jsonl", "b.JSONL.GZ", "deep/c.NdJson"]
    assert unread == expected
    assert list(read_documents([tmp_path])) == found
    (note,) = survey([tmp_path]).notes()
    assert note.startswith(f"12 files of {tmp_path} are not read (.csv 1, .csv.gz 1, ")
    with pytest.raises(DataError, match="is a stream; files are needed"):
        survey([tmp_path / "pipe.jsonl"])
    with pytest.raises(DataError, match="is a stream; files are needed"):
        survey(["-"])


def test_list_shows_what_would_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lines(tmp_path / "in/a.jsonl", ["a"])
    (tmp_path / "in/b.zip").write_bytes(b"")
    assert main(["prepare", "--input", str(tmp_path / "in"), "--list"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].split() == ["14", "jsonl", str(tmp_path / "in/a.jsonl")]
    assert shown[1].split() == ["14", "bytes", "in", "1", "files"]
    assert shown[2] == f"1 file of {tmp_path / 'in'} is not read (.zip 1)"
    assert main(["prepare", "--input", str(tmp_path / "in")]) == 2
    assert "--tokenizer: not given" in capsys.readouterr().err


def tables(text: Any) -> dict[str, Any]:
    """Returns the same texts in the string types that common writers use."""
    import pyarrow

    held = pyarrow.array(text, pyarrow.string())
    return {
        "string": held,
        "large_string": held.cast(pyarrow.large_string()),
        "string_view": held.cast(pyarrow.string_view()),
        "dictionary": held.dictionary_encode(),
        "dictionary of large": held.cast(pyarrow.large_string()).dictionary_encode(),
    }


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary", "dictionary of large"])
@pytest.mark.parametrize("ending", ["parquet", "arrow", "file.arrow"])
def test_string_types_of_tables(tmp_path: Path, kind: str, ending: str) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    texts: list[str | None] = [*TEXTS, None, *map(str, range(20))]
    table = pyarrow.table({"n": list(range(len(texts))), "text": tables(texts)[kind]})
    path = tmp_path / f"a.{ending}"
    if ending == "parquet":
        parquet.write_table(table, path, row_group_size=7)
    else:
        opened = pyarrow.ipc.new_file if ending == "file.arrow" else pyarrow.ipc.new_stream
        with opened(path, table.schema) as writer:
            for batch in table.combine_chunks().to_batches(max_chunksize=7):
                writer.write_batch(batch)
    count = ReadCount()
    assert list(read_documents([path], ReadOptions(on_error="skip"), count)) == [text for text in texts if text]
    assert (count.lines, count.rejected) == (25, {"not_a_string": 1})
    with pytest.raises(DataError, match=r"row 5: 'text' is null"):
        list(read_documents([path]))
    (file,) = survey([path]).files
    pieces = list(cut_pieces(file, 1))
    assert len(pieces) == 4, "batches and row groups are pieces of their own"
    assert [text for piece in pieces for text in read_piece(piece, ReadOptions(on_error="skip"), ReadCount())] == [
        text for text in texts if text
    ]


def test_nested_and_doubled_columns(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    rows = [{"meta": {"text": text, "n": 1}, "a.b": text.upper()} for text in TEXTS]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "nested.parquet")
    assert list(read_documents([tmp_path], ReadOptions(json_key="meta.text"))) == TEXTS
    assert list(read_documents([tmp_path], ReadOptions(json_key="a.b"))) == [text.upper() for text in TEXTS]
    for key, said in (
        ("meta.body", "no column 'meta.body' .'meta' has: text, n"), ("meta.n", "holds int64"), ("meta", "holds struct"),
        ("a.b.c", "no column 'a.b.c'"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=said):
            list(read_documents([tmp_path], ReadOptions(json_key=key)))
    twice = pyarrow.table([pyarrow.array(TEXTS), pyarrow.array(TEXTS)], names=["text", "text"])
    parquet.write_table(twice, tmp_path / "nested.parquet")
    with pytest.raises(DataError, match="two columns are named 'text'"):
        list(read_documents([tmp_path]))


def saved_dataset(folder: Path, **state: Any) -> None:
    """Writes a folder as `datasets.Dataset.save_to_disk` does, with two data files."""
    import pyarrow

    folder.mkdir(parents=True)
    files = []
    for number in range(2):
        name = f"data-0000{number}-of-00002.arrow"
        table = pyarrow.table({"text": TEXTS[2 * number : 2 * number + 2]})
        with pyarrow.ipc.new_stream(folder / name, table.schema) as writer:
            writer.write_table(table)
        files.append({"filename": name})
    (folder / "dataset_info.json").write_text('{\n  "features": {}\n}')
    (folder / "state.json").write_text(json.dumps({"_data_files": files, "_indices_files": None, **state}, indent=2))


def test_a_folder_of_datasets(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    saved_dataset(tmp_path / "a/train")
    (tmp_path / "a/dataset_dict.json").write_text('{"splits": ["train"]}')
    (tmp_path / "a/train/cache-0123.arrow").write_bytes((tmp_path / "a/train/data-00000-of-00002.arrow").read_bytes())
    found, unread = names(tmp_path / "a")
    assert [Path(name).name for name in found] == ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    assert unread == {"dataset_dict.json": 1, "dataset_info.json": 1, "state.json": 1, "not in state.json": 1}
    assert list(read_documents([tmp_path / "a"])) == TEXTS
    saved_dataset(tmp_path / "b", _indices_files=[{"filename": "indices.arrow"}])
    with pytest.raises(DataError, match="flatten_indices"):
        survey([tmp_path / "b"])
    saved_dataset(tmp_path / "c", _data_files=[{"filename": "data-lost.arrow"}])
    with pytest.raises(DataError, match=r"data-lost\.arrow: is named in state\.json but missing"):
        survey([tmp_path / "c"])


def test_a_folder_of_load_dataset(tmp_path: Path) -> None:
    """The files of `map` and `filter` repeat the data, or hold row numbers."""
    pyarrow = pytest.importorskip("pyarrow")
    folder = tmp_path / "json/default-0123"
    folder.mkdir(parents=True)
    for name, columns in (
        ("json-train.arrow", {"text": TEXTS}), ("cache-0123.arrow", {"text": TEXTS}), ("cache-45_00000_of_00002.ARROW", {"indices": [1]}),
    ):  # fmt: skip
        with pyarrow.ipc.new_stream(folder / name, pyarrow.table(columns).schema) as writer:
            writer.write_table(pyarrow.table(columns))
    (folder / "dataset_info.json").write_text("{}")
    for where in (tmp_path, folder):
        found, unread = names(where)
        assert [Path(name).name for name in found] == ["json-train.arrow"]
        assert unread == {"cache of datasets": 2, "dataset_info.json": 1}
    (folder / "dataset_info.json").unlink()
    assert names(folder)[1] == {}, "without dataset_info.json, the name alone says nothing"
    saved_dataset(tmp_path / "saved")
    (tmp_path / "saved/other.ARROW").write_bytes((folder / "cache-0123.arrow").read_bytes())
    assert names(tmp_path / "saved")[1]["not in state.json"] == 1
    assert list(read_documents([tmp_path / "saved"])) == TEXTS


def test_two_arrow_streams_in_one_file_are_refused(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"text": TEXTS})
    with pyarrow.ipc.new_stream(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    data = (tmp_path / "a.arrow").read_bytes()
    (tmp_path / "a.arrow").write_bytes(data[:-8])  # the end mark may be missing
    assert list(read_documents([tmp_path])) == TEXTS
    for more in (data, b"x"):
        (tmp_path / "a.arrow").write_bytes(data + more)
        with pytest.raises(
            DataError, match=rf"a\.arrow: its Arrow stream ends at byte {len(data):,} of {len(data + more):,}"
        ):
            list(read_documents([tmp_path]))


def test_data_that_datasets_saved(tmp_path: Path) -> None:
    """The `datasets` library itself writes the folder."""
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_dict({"text": TEXTS})
    made.save_to_disk(str(tmp_path / "a"))
    datasets.DatasetDict({"train": made.select([2, 0])}).save_to_disk(str(tmp_path / "b"))
    assert list(read_documents([tmp_path / "a"])) == TEXTS
    assert list(read_documents([tmp_path / "b"])) == [TEXTS[2], TEXTS[0]]


def test_the_cache_of_load_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The `datasets` library itself writes the folder, with its caches of `map` and `filter`."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    write_lines(tmp_path / "a.jsonl", TEXTS)
    loaded = datasets.load_dataset("json", data_files=str(tmp_path / "a.jsonl"), cache_dir=str(tmp_path / "cache"))
    loaded.map(lambda row: {"text": row["text"].upper()}).filter(lambda row: len(row["text"]) > 3)
    assert len(list((tmp_path / "cache").rglob("*.arrow"))) == 3
    assert list(read_documents([tmp_path / "cache"])) == TEXTS
    assert names(tmp_path / "cache")[1]["cache of datasets"] == 2


JSON_FORMS = {
    "array": lambda rows: json.dumps(rows),
    "pretty array": lambda rows: json.dumps(rows, indent=2, ensure_ascii=False),
    "array, one a line": lambda rows: "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n",
    "pretty objects": lambda rows: "\n".join(json.dumps(row, indent=1) for row in rows),
    "array with a mark": lambda rows: "\ufeff" + json.dumps(rows, indent=2),
    "lines": lambda rows: "\n".join(map(json.dumps, rows)),
}


@pytest.mark.parametrize("form", JSON_FORMS)
@pytest.mark.parametrize("ending", ["json", "jsonl.gz"])
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), min_size=1, max_size=8),
    piece_bytes=st.integers(1, 100),
    number=st.floats(allow_nan=False),
)
def test_json_in_other_forms(
    tmp_path_factory: pytest.TempPathFactory, form: str, ending: str, texts: list[str], piece_bytes: int, number: float
) -> None:
    path = tmp_path_factory.mktemp("json") / f"a.{ending}"
    rows = [{"id": number, "text": text, "inner": {"text": [text, number]}} for text in texts]
    data = JSON_FORMS[form](rows).encode()
    path.write_bytes(gzip.compress(data) if ending.endswith("gz") else data)
    (file,) = survey([path]).files
    documents, values = [], 0
    for piece in cut_pieces(file, piece_bytes):
        count = ReadCount()
        documents += list(read_piece(piece, ReadOptions(), count))
        values += count.lines
    assert documents == [text for text in texts if text.strip() and not text.isspace()]
    assert values == len(texts)


def test_long_values_are_put_together_from_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_lion.prepare.json_values._BLOCK_BYTES", 7)
    rows = [{"text": "x" * 100 + '"\\\u00e9 ] } ,'}, {"n": 12345678901234567890, "text": "b"}, {"text": "\\u12"}]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=3, ensure_ascii=False), "utf-8")
    assert list(read_documents([tmp_path])) == [row["text"] for row in rows]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('[{"text": "a"}, {"text": 1}]', "a.json: value 2: 'text' is a number; a string is needed; fix it, or skip such values"),
        ('[{"text": "a"}, 7]', "a.json: value 2: is a number"),
        ('[{"text": "a"} {"text": "b"}]', "a.json: value 1 of the array is followed by '{'"),
        ('[{"text": "a"}', "a.json: value 1 of the array is followed by the end of the file"),
        ('[{"text": "a"},', "a.json: ends within its array"),
        ('[{"text": "a"}, {"text" "b"}]', "a.json: value 2 is not JSON"),
        ('[{"text": "a"}]\n[{"text": "b"}]', "a.json: continues after its array"),
        ('{\n"text": "a"\n}\n{\n"text" 1}', "a.json: value 2 is not JSON"),
        ('{"text": "a"\n', "a.json:1: not JSON"),
        ("[1, 2]\n[3]\n", "a.json:1: is a list"),
        ("[]", "no documents"),
    ],
)  # fmt: skip
def test_damaged_json_is_named(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "a.json").write_text(content, "utf-8")
    if said == "no documents":
        assert list(read_documents([tmp_path])) == []
        return
    with pytest.raises(DataError) as caught:
        list(read_documents([tmp_path]))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_inner_keys(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"meta": {"text": "a"}, "x.y": "dotted", "x": {"y": "inner"}}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for key, expected in (("meta.text", "a"), ("x.y", "dotted")):
        assert list(read_documents([tmp_path], ReadOptions(json_key=key))) == [expected]
    for key in ("meta.body", "meta.text.more", "none.text"):
        with pytest.raises(DataError, match=f"no key '{key}'"):
            list(read_documents([tmp_path], ReadOptions(json_key=key)))


def test_zstd_with_a_long_window(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    data = b"".join(json.dumps({"text": f"document {number}"}).encode() + b"\n" for number in range(100))
    settings = zstandard.ZstdCompressionParameters(window_log=30, enable_ldm=True)
    for name in ("a.jsonl.zst", "b.jsonl.zstd"):
        (tmp_path / name).write_bytes(zstandard.ZstdCompressor(compression_params=settings).compress(data))
        assert len(list(read_documents([tmp_path / name]))) == 100
