"""`megatron-lion tokenizer train`: the same vocabulary from any form of the text, and nothing replaced by accident."""

from __future__ import annotations

import bz2
import gzip
import json
import shlex
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, trainers

from megatron_lion import streams
from megatron_lion.cli import main
from megatron_lion.data.tokenizers import load_tokenizer
from megatron_lion.prepare import long_texts

TEXTS = [
    f"Paragraph {i}: the fox goes home, and the hen's {i % 13} eggs — café — stay there.\n" * 3 for i in range(300)
]
TEXT = "\n".join(TEXTS)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "my.txt"
    path.write_bytes(TEXT.encode())
    return path


def train(*words: object) -> int:
    return main(["tokenizer", "train", *map(str, words)])


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_vocabulary_is_that_of_the_library_on_the_whole_text(text: Path, tmp_path: Path) -> None:
    """Byte-level BPE by `tokenizers` alone, with GPT-2's end marker as the last id."""
    assert train("--input", text, "--vocab-size", 330, "--output", tmp_path / "out") == 0
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=329, initial_alphabet=alphabet, show_progress=False)
    )
    vocab = json.loads((tmp_path / "out/vocab.json").read_text("utf-8"))
    assert vocab == {**backend.get_vocab(), "<|endoftext|>": 329}
    merges = (tmp_path / "out/merges.txt").read_text("utf-8").splitlines()
    assert (merges[0], len(merges)) == ("#version: 0.2", 330 - 257 + 1)
    loaded = load_tokenizer(tmp_path / "out")
    assert loaded.encode(TEXT) == backend.encode(TEXT).ids


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_any_form_of_the_text_gives_the_same_files(
    text: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow
    import pyarrow.parquet

    def made(name: str, *inputs: object, more: tuple[str, ...] = ()) -> dict[str, bytes]:
        words = ["--input", *inputs, "--vocab-size", 330, "--kind", kind, "--output", tmp_path / name, *more]
        assert train(*words) == 0
        return files(tmp_path / name)

    expected = made("txt", text)
    assert set(expected) == ({"vocab.json", "merges.txt"} if kind == "bpe" else {"vocab.txt"})
    assert made("again", text) == expected
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(TEXT.encode()))
    (tmp_path / "a.jsonl.bz2").write_bytes(bz2.compress((json.dumps({"body": TEXT}) + "\n").encode()))
    pyarrow.parquet.write_table(pyarrow.table({"body": [TEXT]}), tmp_path / "a.parquet")
    assert made("gz", tmp_path / "a.txt.gz") == expected
    assert made("jsonl", tmp_path / "a.jsonl.bz2", more=("--json-key", "body")) == expected
    assert made("parquet", tmp_path / "a.parquet", more=("--json-key", "body")) == expected
    parts = tmp_path / "parts"
    parts.mkdir()
    for number in range(3):
        (parts / f"{number}.txt").write_text("\n".join([*TEXTS[100 * number : 100 * number + 100], ""]))
    assert made("folder", parts) == expected
    assert made("glob", tmp_path / "parts" / "*.txt") == expected
    for name, size in (("_PART_CHARACTERS", 90), ("_BLOCK_BYTES", 40)):
        monkeypatch.setattr(long_texts, name, size)
    assert made("in-parts", text) == expected
    assert made("in-parts-jsonl", tmp_path / "a.jsonl.bz2", more=("--json-key", "body")) == expected


def test_it_ends_with_a_command_that_works(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(streams, "stderr_is_terminal", lambda: True)  # in a pipe, stdout and stderr have no hints
    spaced = tmp_path / "my text.jsonl"
    spaced.write_text(json.dumps({"body": TEXT}) + "\n")
    for kind in ("bpe", "wordpiece"):
        output = tmp_path / f"the {kind}"
        assert (
            train("--input", spaced, "--json-key", "body", "--vocab-size", 330, "--output", output, "--kind", kind) == 0
        )
        out, err = capsys.readouterr()
        assert out.startswith(f"{output}: 330 ids ({kind}: ")
        assert out.count("\n") == 1
        words = shlex.split(err.splitlines()[-1].removeprefix("next: "))
        assert words[:2] == ["megatron-lion", "prepare"]
        words[words.index("data/my")] = str(tmp_path / f"data-{kind}")
        assert main([*words[1:], "--workers", "1"]) == 0
        assert capsys.readouterr().out.count("documents") >= 3


def test_another_tokenizer_is_kept(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    words = ["--input", text, "--output", output, "--vocab-size"]
    assert train(*words, 330) == 0
    before = files(output)
    assert train(*words, 330) == 0, "the same files: nothing to refuse"
    assert train(*words, 300) == 2
    assert (
        "contains another tokenizer; choose another --output, or replace it with --overwrite" in capsys.readouterr().err
    )
    text.write_text(TEXT.replace("fox", "wolf"))
    assert train(*words, 330) == 2
    assert train(*words, 330, "--kind", "wordpiece") == 2
    assert "contains merges.txt, which is no file of a wordpiece tokenizer" in capsys.readouterr().err
    assert files(output) == before
    assert train(*words, 330, "--overwrite") == 0
    assert files(output) != before
    (output / "thesis.tex").write_text("dear reader")
    assert train(*words, 330, "--overwrite") == 2
    assert "contains thesis.tex" in capsys.readouterr().err
    assert train("--input", text, "--output", text, "--vocab-size", 330) == 2
    # What a killed run left is completed: one of the two files, and a temporary one.
    other = tmp_path / "killed"
    other.mkdir()
    (other / "vocab.json").write_bytes(files(output)["vocab.json"])
    (other / ".merges.txt.tmp").write_text("half")
    assert train("--input", text, "--output", other, "--vocab-size", 330) == 0
    assert files(other)["merges.txt"] == files(output)["merges.txt"]


@pytest.mark.parametrize(
    ("kind", "size", "content", "code", "message"),
    [
        ("bpe", 257, TEXT, 2, "vocab_size 257: at least 258 are needed"),
        ("wordpiece", 199, TEXT, 2, "vocab_size 199: at least 200 are needed"),
        ("bpe", 300, "", 3, "my.txt: holds no word of two letters"),
        ("wordpiece", 300, " \n\n", 3, "my.txt: holds no word of two letters"),
    ],
)  # fmt: skip
def test_refusals(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    kind: str, size: int, content: str, code: int, message: str,
) -> None:  # fmt: skip
    text.write_text(content)
    assert train("--input", text, "--vocab-size", size, "--kind", kind, "--output", tmp_path / "out") == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_a_size_that_the_text_cannot_give_names_the_one_it_can(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    words = ["--input", text, "--kind", kind, "--output", tmp_path / "out", "--vocab-size"]
    assert train(*words, 9000) == 3
    error = capsys.readouterr().err
    most = int(error.partition("; give at most ")[2].partition(",")[0])
    assert f"vocab_size 9000: the text gives at most {most:,} ids" in error
    assert not (tmp_path / "out").exists()
    assert train(*words, most) == 0
    assert load_tokenizer(tmp_path / "out").vocab_size == most


def test_bad_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(streams, "stderr_is_terminal", lambda: True)
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": text}) for text in TEXTS]
    path.write_text("\n".join([*lines[:3], "oops", *lines[3:]]))
    words = ["--input", path, "--vocab-size", 330, "--output", tmp_path / "out"]
    assert train(*words) == 3
    assert f"{path}:4: not JSON" in capsys.readouterr().err
    assert train(*words, "--on-error", "skip") == 0
    assert "--on-error skip" in capsys.readouterr().err, "the next command needs it too"
    (tmp_path / "a.txt").write_bytes(TEXT.encode() + b"\xff")
    assert train("--input", tmp_path / "a.txt", "--vocab-size", 330, "--output", tmp_path / "two") == 3
    assert "a.txt:1: not UTF-8" in capsys.readouterr().err
