"""The recipes of data_prep/ on small corpora make datasets and texts that training and evaluation read."""

from __future__ import annotations

import io
import itertools
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import tiny_bert
from tiny_gpt2 import prose

from megatron_lion.cli import build_parser, parse, verb_module
from megatron_lion.config import DataConfig, ModelConfig
from megatron_lion.data.corpora import open_corpora
from megatron_lion.prepare.vocabularies import train_bpe

REPO = Path(__file__).resolve().parent.parent
SAMPLES = REPO.parent / "shared" / "data"
needs_samples = pytest.mark.skipif(
    not SAMPLES.is_dir(), reason="no ../shared/data beside the checkout: real text, vocabularies, evaluation files"
)


def recipe(name: str, folder: Path, **variables: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs a recipe in a folder, with these environment variables added."""
    environment = {**os.environ, "PYTHON": sys.executable, **{key: str(value) for key, value in variables.items()}}
    return subprocess.run(
        [str(REPO / "data_prep" / name)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


def next_data(stderr: str) -> list[str]:
    """The data.path of the command that a recipe prints last, split by a shell and parsed as its verb does."""
    line = stderr.splitlines()[-1].removeprefix("next: ")
    split = subprocess.run(["sh", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True)
    program, *words = split.stdout.split("\0")[:-1]
    if program == "launch/torchrun.sh":
        words = ["pretrain", "--config", *words]
    words[2] = str(REPO / words[2])  # as typed in the repository
    found: list[str] = parse(build_parser("pretrain", verb_module("pretrain")), words[1:]).data.path
    return found


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def add_member(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize("name", ["openwebtext.sh", "own_text.sh"])
def test_gpt_recipe_makes_a_dataset_that_training_opens(tmp_path: Path, name: str) -> None:
    texts = prose(120)
    files = [write_jsonl(tmp_path / "text" / "part.jsonl", texts[::2]), tmp_path / "openwebtext.tar.xz"]
    with tarfile.open(files[1], "w:xz") as outer:  # as it is published: an archive of compressed archives of text files
        (tmp_path / "documents").mkdir()
        for number, text in enumerate(texts[1::2]):
            (tmp_path / f"documents/{number:07d}.txt").write_text(text, encoding="utf-8")
        with tarfile.open(tmp_path / "urlsf_subset00-1_data.xz", "w:xz") as inner:
            inner.add(tmp_path / "documents", "documents")
        outer.add(tmp_path / "urlsf_subset00-1_data.xz", "openwebtext/urlsf_subset00-1_data.xz")
    train_bpe(files, 300, tmp_path / "gpt2")
    inputs = " ".join(map(str, files))
    done = recipe(name, tmp_path, INPUT=inputs, TOKENIZER="gpt2", OUTPUT="made", SPLIT="80,10,10", WORKERS="1")
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "made" / "manifest.json").read_text())
    assert sum(split["documents"] for split in manifest["splits"].values()) == 120
    corpora = open_corpora(DataConfig(path=[str(tmp_path / "made")]), ModelConfig(seq_length=64))
    assert (corpora.train_tokens or 0) > 1000
    assert next_data(done.stderr) == ["made"]


def test_bert_recipe_makes_sentences(tmp_path: Path) -> None:
    texts = tiny_bert.documents(80, 6)
    write_jsonl(tmp_path / "openwebtext" / "a.jsonl", texts)
    vocab = tiny_bert.write_vocab(tmp_path)
    done = recipe("openwebtext_bert.sh", tmp_path, VOCAB=vocab, SPLIT="80,10,10", WORKERS="1")
    assert done.returncode == 0, done.stderr
    assert next_data(done.stderr) == ["data/openwebtext-bert"]
    manifest = json.loads((tmp_path / "data" / "openwebtext-bert" / "manifest.json").read_text())
    assert manifest["sentences"]["sentences"] > 2 * manifest["documents"]


@needs_samples
def test_gpt_recipes_on_real_text_count_transformers_tokens(tmp_path: Path) -> None:
    """150 documents of OpenWebText with GPT-2's own vocabulary; one end marker a document."""
    from transformers import GPT2TokenizerFast

    with open(SAMPLES / "corpus" / "sample.jsonl", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in itertools.islice(lines, 150)]
    write_jsonl(tmp_path / "openwebtext" / "a.jsonl", texts)
    reference = GPT2TokenizerFast(str(SAMPLES / "gpt2" / "vocab.json"), str(SAMPLES / "gpt2" / "merges.txt"))
    expected = sum(len(ids) for ids in reference(texts)["input_ids"]) + len(texts)
    for name in ("openwebtext.sh", "own_text.sh"):
        done = recipe(
            name, tmp_path, INPUT="openwebtext", TOKENIZER=SAMPLES / "gpt2", OUTPUT=f"made by {name}", SPLIT="8,1,1"
        )
        assert done.returncode == 0, done.stderr
        manifest = json.loads((tmp_path / f"made by {name}" / "manifest.json").read_text())
        assert (manifest["documents"], manifest["tokens"]) == (150, expected)


@needs_samples
def test_every_form_of_openwebtext_gives_the_same_files(tmp_path: Path) -> None:
    """As published (archives in an archive), as Parquet, and as `datasets` saves it to disk, with the flags of MORE."""
    import pyarrow
    import pyarrow.parquet

    with open(SAMPLES / "corpus" / "sample.jsonl", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in itertools.islice(lines, 150)]
    texts += texts[:10]
    (tmp_path / "passage.txt").write_text(texts[3][:2000], encoding="utf-8")
    with tarfile.open(tmp_path / "openwebtext.tar.xz", "w:xz", preset=0) as outer:
        for number in range(2):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w:xz", preset=0) as members:
                for place, text in enumerate(texts[80 * number : 80 * (number + 1)]):
                    add_member(members, f"{80 * number + place:07d}-a.txt", text.encode())
            add_member(outer, f"openwebtext/urlsf_subset{number:02d}-1_data.xz", inner.getvalue())
    table = pyarrow.table({"text": texts})
    pyarrow.parquet.write_table(table, tmp_path / "train-00000-of-00001.parquet")
    (tmp_path / "saved/train").mkdir(parents=True)
    with (
        pyarrow.OSFile(str(tmp_path / "saved/train/data-00000-of-00001.arrow"), "wb") as stream,
        pyarrow.ipc.new_stream(stream, table.schema) as writer,
    ):
        writer.write_table(table, max_chunksize=40)
    (tmp_path / "saved/dataset_dict.json").write_text('{"splits": ["train"]}')
    more = "--deduplicate --decontaminate passage.txt --drop-contaminated"
    found = []
    for number, given in enumerate(["openwebtext.tar.xz", "train-00000-of-00001.parquet", "saved"]):
        output = f"made{number}"
        words = {"INPUT": given, "TOKENIZER": SAMPLES / "gpt2", "OUTPUT": output, "SPLIT": "8,1,1", "MORE": more}
        done = recipe("openwebtext.sh", tmp_path, **words)
        assert done.returncode == 0, done.stderr
        manifest = json.loads((tmp_path / output / "manifest.json").read_text())
        assert manifest["dropped"] == {"contaminated": 1, "duplicate": 10}
        found.append((manifest["documents"], {name: split["bin_sha256"] for name, split in manifest["splits"].items()}))
    assert found[0][0] == 149
    assert found[0] == found[1] == found[2]


@needs_samples
def test_bert_recipe_on_real_text_counts_transformers_tokens(tmp_path: Path) -> None:
    """Sentences are encoded one by one; WordPiece ids of a text do not depend on where it is divided at blanks."""
    from transformers import BertTokenizerFast

    with open(SAMPLES / "corpus" / "sample.jsonl", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in itertools.islice(lines, 150)]
    write_jsonl(tmp_path / "openwebtext" / "a.jsonl", texts)
    done = recipe("openwebtext_bert.sh", tmp_path, VOCAB=SAMPLES / "bert" / "vocab.txt", OUTPUT="made", SPLIT="8,1,1")
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "made" / "manifest.json").read_text())
    reference = BertTokenizerFast(str(SAMPLES / "bert" / "vocab.txt"), do_lower_case=True)
    expected = sum(len(ids) for ids in reference(texts, add_special_tokens=False)["input_ids"])
    assert (manifest["documents"], manifest["tokens"]) == (150, expected)
    assert manifest["sentences"]["sentences"] > 5 * 150


def test_recipe_ends_with_the_exit_code_of_prepare(tmp_path: Path) -> None:
    done = recipe("openwebtext.sh", tmp_path, INPUT="nowhere")
    assert done.returncode == 3, done.stderr
    assert "gpt2: no such file or folder" in done.stderr
    assert "next:" not in done.stderr
    assert not (tmp_path / "data").exists()


def test_evaluation_recipe_refuses_a_changed_file(tmp_path: Path) -> None:
    (tmp_path / "wiki.test.tokens").write_text(" = Robert <unk> = \n")
    done = recipe("evaluation_texts.sh", tmp_path, LAMBADA="")
    assert done.returncode == 3
    assert "wiki.test.tokens: is not a published text" in done.stderr
    assert not list((tmp_path / "data" / "evaluation").iterdir())
    nothing = recipe("evaluation_texts.sh", tmp_path, LAMBADA="", WIKITEXT="")
    assert nothing.returncode == 2
    assert "give WIKITEXT or LAMBADA" in nothing.stderr


@pytest.mark.skipif(
    not SAMPLES.is_dir(), reason="no ../shared/data beside the checkout: the published evaluation files"
)
def test_evaluation_recipe_takes_the_published_files(tmp_path: Path) -> None:
    wikitext, lambada = SAMPLES / "wikitext" / "wiki.test.tokens", SAMPLES / "lambada" / "lambada_test.jsonl"
    done = recipe("evaluation_texts.sh", tmp_path, WIKITEXT=wikitext, LAMBADA=lambada, OUTPUT="texts")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "texts").iterdir()} == {wikitext.name, lambada.name}
    assert (tmp_path / "texts" / wikitext.name).read_bytes() == wikitext.read_bytes()
    assert "--wikitext103 texts/wiki.test.tokens --lambada texts/lambada_test.jsonl" in done.stderr


@needs_samples
@pytest.mark.parametrize("given", ["wikitext/test.txt", "wikitext/wiki.valid.tokens", "lambada/lambada_test.jsonl"])
def test_another_published_text_is_not_the_test_text(tmp_path: Path, given: str) -> None:
    """WikiText-2's file has the same name as WikiText-103's, and its perplexity is another number."""
    done = recipe("evaluation_texts.sh", tmp_path, WIKITEXT=SAMPLES / given, LAMBADA="")
    assert done.returncode == 3
    assert "needed is WikiText-103 tokens test or WikiText raw test" in done.stderr


def test_patterns_reach_every_folder(tmp_path: Path) -> None:
    """bash reads ** as *, so the recipe must leave patterns to prepare."""
    texts = prose(90)
    for number, folder in enumerate(("a", "a/b", "a/b/c")):
        write_jsonl(tmp_path / folder / "text.jsonl", texts[number::3])
    train_bpe([tmp_path / "a" / "text.jsonl"], 300, tmp_path / "gpt2")
    words = {"INPUT": "a/**/*.jsonl", "TOKENIZER": "gpt2", "OUTPUT": "made", "SPLIT": "80,10,10", "WORKERS": "1"}
    done = recipe("own_text.sh", tmp_path, **words)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "made" / "manifest.json").read_text())["documents"] == 90


def test_the_next_command_holds_a_folder_with_blanks(tmp_path: Path) -> None:
    """Without TOKENIZER one is trained on the text; the same command finds both again."""
    text = write_jsonl(tmp_path / "text.jsonl", prose(120))
    text.write_text(text.read_text() + "a bad line\n")
    words = {"INPUT": text, "VOCAB_SIZE": "300", "OUTPUT": "my data", "WORKERS": "1", "ON_ERROR": "skip"}
    for _ in range(2):
        done = recipe("own_text.sh", tmp_path, **words)
        assert done.returncode == 0, done.stderr
        assert next_data(done.stderr) == ["my data"]
    manifest = json.loads((tmp_path / "my data" / "manifest.json").read_text())
    assert manifest["tokenizer"]["vocab_size"] == 300
    assert sorted(path.name for path in (tmp_path / "my data-tokenizer").iterdir()) == ["merges.txt", "vocab.json"]
