"""Evaluation texts by rows: each row counts, a result is of what was read, and a message names the row and a remedy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from gpt2_folders import write_gpt2

from megatron_lion.cli import main
from megatron_lion.errors import DataError
from megatron_lion.evaluate.lambada import read_passages
from megatron_lion.evaluate.wikitext import read_text

PASSAGES = ["the cat and the dog", "and the other the"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random GPT-2 of transformers."""
    return write_gpt2(tmp_path_factory.mktemp("gpt2"), PASSAGES, tokens=270, vocab_size=300, n_positions=64, n_layer=1)


def as_lines(texts: list[Any], key: str = "text") -> str:
    return "".join(json.dumps({key: text}) + "\n" for text in texts)


def write_arrow(path: Path, texts: list[Any]) -> None:
    table = pa.table({"text": texts})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


ROWS: dict[str, Callable[[Path, list[Any]], Any]] = {
    "a.jsonl": lambda path, rows: path.write_text(as_lines(rows)),
    "a.json": lambda path, rows: path.write_text(json.dumps([{"text": row} for row in rows], indent=1)),
    "a.parquet": lambda path, rows: pq.write_table(pa.table({"text": rows}), path, row_group_size=2),
    "a.arrow": write_arrow,
}


@pytest.mark.parametrize("name", ROWS)
def test_wikitext_by_rows_is_the_text_of_its_tokens_file(shared_data: Path, tmp_path: Path, name: str) -> None:
    """On the hub a row is a line with its line break, and the row of a blank line is empty. 245,566 is published."""
    lines = (shared_data / "wikitext" / "wiki.test.tokens").read_text().split("\n")[:-1]
    ROWS[name](tmp_path / name, [line + "\n" if line.strip() else "" for line in lines])
    found = read_text(tmp_path / name, "wikitext103")
    assert (found.version, found.n_orig) == ("WikiText-103 tokens test", 245_566)
    assert found.documents is None


@pytest.mark.parametrize("name", ROWS)
def test_rows_that_are_no_lines_are_refused(tmp_path: Path, name: str) -> None:
    """Joined, the last word of a row and the first of the next would be one."""
    ROWS[name](tmp_path / name, [" = Title = \n", "", " one line \n", "no line break", " next \n"])
    with pytest.raises(DataError, match=r"(:4|: row 4|: value 4): 'text' does not end in a line break; --wikitext103"):
        read_text(tmp_path / name, "wikitext103")
    ROWS[name](tmp_path / name, [" = Title = \n", " \n", " the last line"])
    assert read_text(tmp_path / name, "wikitext103").original == " = Title = \n \n the last line"


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize(
    ("rows", "number", "says"),
    [
        (["a b", "", "c d"], 2, "a passage needs at least two words"),
        (["a b", "c d", " \n"], 3, "a passage needs at least two words"),
        (["a b", "c d", "e f", None], 4, "'text' is null; a string is needed; fix it"),
    ],
)
def test_every_row_of_lambada_counts(tmp_path: Path, name: str, rows: list[Any], number: int, says: str) -> None:
    ROWS[name](tmp_path / name, rows)
    with pytest.raises(DataError) as caught:
        read_passages(tmp_path / name)
    where = {"a.jsonl": f":{number}", "a.json": f": value {number}"}.get(name, f": row {number}")
    assert str(caught.value) == f"{tmp_path / name}{where}: {says}"


def test_a_lone_surrogate_names_its_line(tmp_path: Path) -> None:
    (tmp_path / "l.jsonl").write_text('{"text": "a b"}\n\n{"text": "bad \\ud800 word"}\n')
    with pytest.raises(DataError) as caught:
        read_passages(tmp_path / "l.jsonl")
    assert str(caught.value) == f"{tmp_path / 'l.jsonl'}:3: 'text' has half of a surrogate pair at character 5; fix it"


def lambada(folder: Path, path: Path, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[str, float]:
    """Returns whether the result is "new" or "found", and its loss."""
    assert main(["evaluate", str(folder), "--lambada", str(path), *words, "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    [result] = (folder / "eval").glob("lambada-*.json")
    return ("new" if " new " in shown else "found"), json.loads(result.read_text())["loss"]


def test_a_lambada_result_is_of_the_passages_that_were_read(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file's bytes do not determine its passages: its name and the key do, too."""
    content = "".join(json.dumps({"body": text, "text": text[::-1]}) + "\n" for text in PASSAGES)
    for name in ("l.jsonl", "l.txt"):
        (tmp_path / name).write_text(content.replace('"text"', '"other"'))
    as_json = lambada(folder, tmp_path / "l.jsonl", capsys, "--json-key", "body")
    as_text = lambada(folder, tmp_path / "l.txt", capsys)
    assert (as_json[0], as_text[0]) == ("new", "new")
    assert as_json[1] != as_text[1]
    other_key = lambada(folder, tmp_path / "l.jsonl", capsys, "--json-key", "other")
    assert other_key[0] == "new"
    assert len({as_json[1], as_text[1], other_key[1]}) == 3
    (tmp_path / "same.txt").write_text("\n".join(PASSAGES))
    assert lambada(folder, tmp_path / "same.txt", capsys) == ("new", as_json[1])
    pq.write_table(pa.table({"text": PASSAGES}), tmp_path / "same.parquet")
    assert lambada(folder, tmp_path / "same.parquet", capsys) == ("found", as_json[1])


@pytest.mark.parametrize("name", ["l.txt", "l.parquet", "l", "l.json"])
def test_a_published_lambada_file_is_read_by_its_hash(shared_data: Path, tmp_path: Path, name: str) -> None:
    source = shared_data / "lambada" / "lambada_test.jsonl"
    (tmp_path / name).write_bytes(source.read_bytes())
    found = read_passages(tmp_path / name, "body")
    assert found.texts == [json.loads(line)["text"].strip() for line in source.read_text().splitlines()]
    assert found.sha256 == "4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226"
    assert found.version == "LAMBADA test, as processed for GPT-2"


def test_json_lines_named_txt_are_refused(tmp_path: Path) -> None:
    (tmp_path / "l.txt").write_text("a passage of words\n" + as_lines(PASSAGES))
    with pytest.raises(DataError, match=r"l.txt:2: a JSON object with the key 'text'.*name it .jsonl"):
        read_passages(tmp_path / "l.txt")
    (tmp_path / "l.txt").write_text('{"quoted": 1} is a passage\n{text} is one too\n')
    assert len(read_passages(tmp_path / "l.txt").texts) == 2


@pytest.mark.parametrize(
    ("flag", "name", "content", "says"),
    [
        ("--text", "t.jsonl", as_lines(["a b"]) + "{bad\n", "t.jsonl:2: not JSON: "),
        ("--text", "t.jsonl", as_lines(["a b", 5]), "t.jsonl:2: 'text' is a number; a string is needed; fix it"),
        ("--lambada", "t.jsonl", as_lines(["a b"], "body"), "t.jsonl:1: no key 'text' (its keys: 'body'); name the text's key"),
        ("--wikitext103", "t.jsonl", as_lines(["a b \n"], "body"), "t.jsonl:1: no key 'text' (its keys: 'body'); name the text's key"),
    ],
)  # fmt: skip
def test_remedies_are_flags_of_evaluate(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str, name: str, content: str, says: str
) -> None:
    (tmp_path / name).write_text(content)
    assert main(["evaluate", str(folder), flag, str(tmp_path / name), "--device", "cpu"]) == 3
    error = capsys.readouterr().err
    assert says in error
    assert "--on-error" not in error
    assert error.count("\n") == 1
    if "no key" in error:
        assert "with --json-key" in error
        assert not error.rstrip().endswith("fix it")
        words = [flag, str(tmp_path / name), "--json-key", "body"]
        assert main(["evaluate", str(folder), *words, "--device", "cpu"]) == 0


def test_a_column_of_lambada_is_chosen(tmp_path: Path) -> None:
    path = tmp_path / "l.parquet"
    pq.write_table(pa.table({"meta": [{"body": text} for text in PASSAGES]}), path)
    with pytest.raises(DataError, match=r"no column 'text'.*give --json-key"):
        read_passages(path)
    assert read_passages(path, "meta.body").texts == PASSAGES
