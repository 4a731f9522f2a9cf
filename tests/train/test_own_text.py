"""`pretrain --text`: from a text file to samples with one command, which also resumes; and data without held-out splits."""

from __future__ import annotations

import hashlib
import json
import random
import re
import shlex
from pathlib import Path

import pytest
import yaml

from megatron_lion.cli import main
from megatron_lion.commands import own_text
from megatron_lion.data.manifest import read_manifest
from megatron_lion.data.tokenizers import load_tokenizer
from megatron_lion.errors import ConfigError
from megatron_lion.files import file_lock
from megatron_lion.prepare.pipeline import PrepareOptions, prepare
from megatron_lion.prepare.vocabularies import train_bpe
from megatron_lion.runs.paths import lock_file

REPO = Path(__file__).resolve().parents[2]
SMALL = (
    "--model.num_layers", "1", "--model.hidden_size", "16", "--model.num_attention_heads", "2", "--model.seq_length", "16",
    "--train.global_batch_size", "4", "--train.micro_batch_size", "4", "--train.steps", "3", "--train.test_every", "2",
    "--train.test_batches", "1", "--checkpoint.every", "0", "--log.progress", "false", "--device", "cpu", "--schedule.warmup_steps", "0",
)  # fmt: skip


def novel(sentences: int = 1200) -> str:
    dice = random.Random(0)
    words = ["".join(dice.choices("abdefgiklmnoprstu", k=dice.randint(2, 7))) for _ in range(400)]
    lines = (" ".join(dice.choices(words, k=9)).capitalize() + "." for _ in range(sentences))
    return "Chapter one of a long book.\n\n" + "\n\n".join(lines)


@pytest.fixture(autouse=True)
def book(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("my book.txt").write_text(novel())
    return Path("my book.txt")


def pretrain(*words: object) -> int:
    return main(["pretrain", *map(str, words)])


def contents(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def steps(run: str) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in Path(run, "checkpoints").glob("step_*"))


def test_one_command_trains_resumes_and_names_the_command_for_samples(
    book: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert pretrain("--text", book, *SMALL, "--max-steps", 1) == 0
    out, err = capfd.readouterr()
    (line,) = [line for line in err.splitlines() if line.startswith("settings: gpt2-tiny with ")]
    assert line.endswith("with --checkpoint.at_steps '[]' --probe.every 0; flags and --config replace them"), (
        "no replaced one"
    )
    made = contents(Path("runs/my-book.text"))
    assert {"tokenizer/vocab.json", "tokenizer/merges.txt", "data/manifest.json"} <= set(made)
    manifest = read_manifest("runs/my-book.text/data")
    assert manifest.options["divided"] == "by position"
    assert set(manifest.splits) == {"train", "valid", "test"}
    assert manifest.sources[0].sha256 == hashlib.sha256(book.read_bytes()).hexdigest()
    stored = yaml.safe_load(Path("runs/my-book/config.yaml").read_text())
    assert stored["data"]["path"] == ["runs/my-book.text/data"]
    assert (stored["model"]["num_layers"], stored["probe"]["every"]) == (1, 0)
    assert steps("runs/my-book") == [1]
    assert pretrain("--text", book, *SMALL) == 0
    again, err = capfd.readouterr()
    assert "resuming after step 1" in err
    lines = [json.loads(line) for line in Path("runs/my-book/metrics.jsonl").read_text().splitlines()]
    losses = [
        next(line[key] for line in lines if line["step"] == 3 and key in line)
        for key in ("train/loss", "valid/loss", "test/loss")
    ]
    end = "done: 3 of 3 steps in runs/my-book; loss: training {:.4f}, validation {:.4f}, test {:.4f}".format(*losses)
    assert end in again.splitlines()
    assert steps("runs/my-book")[-1] == 3
    assert contents(Path("runs/my-book.text")) == made, "nothing is made twice"
    for text in (out, again):
        (line,) = [line for line in text.splitlines() if line.startswith("samples: ")]
        words = shlex.split(line.removeprefix("samples: "))
        assert words[:5] == ["megatron-lion", "generate", "runs/my-book", "--prompt", "Chapter one of a"]
    assert main([*words[1:-1], "5", "--count", "1", "--device", "cpu"]) == 0
    assert capfd.readouterr().out.startswith("Chapter one of a")
    assert not undocumented(Path("runs/my-book"))


def undocumented(run: Path) -> list[str]:
    """Returns the files of a run that docs/reference/run-folder.md does not list."""
    page = (REPO / "docs" / "reference" / "run-folder.md").read_text()
    cells = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    patterns = [
        re.sub(r"[0-9]+", "[0-9]+", re.escape(name)).replace("\\*", ".*").replace("…", "[^/]+")
        + (".*" if name.endswith("/") else "")
        for cell in cells
        for name in re.findall("`([^`]+)`", cell)
    ]
    assert len(patterns) > 15
    files = [path.relative_to(run).as_posix() for path in sorted(run.rglob("*")) if path.is_file()]
    specific = [pattern for pattern in patterns if not pattern.startswith("checkpoints/step_")]  # the folder itself
    return [name for name in files if not any(re.fullmatch(pattern, name) for pattern in specific)]


def test_another_text_is_refused_until_a_fresh_start(book: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pretrain("--text", book, *SMALL, "--max-steps", 1) == 0
    made = contents(Path("runs"))
    book.write_text(novel() + "\n\nOne more line.")
    Path("other.txt").write_text(novel(1100))
    capsys.readouterr()
    for words, expected in (
        ([book], "my book.txt changed since runs/my-book.text/data was made"),
        ([book, "other.txt"], "my book.txt changed since"),
        (["other.txt", "--run_dir", "runs/my-book"], "other.txt is new since"),
        ([book, "--config", "bert-tiny", "--run_dir", "runs/my-book"], "was made for gpt, but model.kind is bert"),
    ):
        assert pretrain("--text", *words, *SMALL) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert expected in error
        assert "--fresh" in error
        assert {name: digest for name, digest in contents(Path("runs")).items() if "log/" not in name} == {
            name: digest for name, digest in made.items() if "log/" not in name
        }
    assert pretrain("--text", book, *SMALL, "--max-steps", 1, "--fresh") == 0
    assert Path("runs/my-book.old-1/config.yaml").is_file()
    digest = hashlib.sha256(book.read_bytes()).hexdigest()
    assert read_manifest("runs/my-book.text/data").sources[0].sha256 == digest


def test_a_busy_run_keeps_its_text(book: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pretrain("--text", book, *SMALL, "--max-steps", 1) == 0
    made = contents(Path("runs/my-book.text"))
    book.write_text(novel(1100))
    with file_lock(lock_file(Path("runs/my-book")), "runs/my-book", "wait"):
        assert pretrain("--text", book, *SMALL, "--fresh") == 7
    assert contents(Path("runs/my-book.text")) == made


def test_a_preview_writes_nothing(book: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pretrain("--text", book, *SMALL, "--dry-run") == 0
    out = capsys.readouterr().out
    size = len(book.read_bytes())
    assert (
        f"my book.txt: {size:,} bytes; will be prepared, with a vocabulary of 512 or less, in runs/my-book.text" in out
    )
    assert "512 ids" in out
    # 3 steps of 4 samples of 16 tokens; 0.8 of the text at 2.1 bytes a token.
    tokens = 0.8 * size / 2.1
    assert (
        f"data         about {tokens:,.0f} training tokens of the text, read {192 / tokens:,.1f} times (estimated)"
        in out
    )
    assert "one data-parallel process has all of it" in out
    assert pretrain("--text", book, *SMALL, "--print_config") == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["data"]["path"] == ["runs/my-book.text/data"]
    assert shown["model"]["vocab_size"] is None
    assert sorted(path.name for path in Path().iterdir()) == ["my book.txt"]


def test_a_folder_of_texts_and_a_config(book: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("notes").mkdir()
    for number in range(3):
        Path(f"notes/{number}.txt").write_text(f"Note {number}. {novel(500)}")
    Path("mine.yaml").write_text("run_dir: here/run\nmodel:\n  seq_length: 16\n")
    assert pretrain("--config", "mine.yaml", "--text", "notes", *SMALL, "--train.precision", "fp32") == 0
    assert "settings:" not in capsys.readouterr().err, "a config's settings are not replaced"
    manifest = read_manifest("here/run.text/data")
    assert [manifest.splits[name].documents for name in ("train", "valid", "test")] == [3, 3, 3]
    assert steps("here/run") == [3]


def test_bert(book: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model.seq_length", "32", "--checkpoint.at_steps", "[]", "--probe.every", "0"]
    assert pretrain("--config", "bert-tiny", "--text", book, "--run_dir", "runs/b", *SMALL, *words) == 0
    assert read_manifest("runs/b.text/data").kind == "bert"
    assert "samples: megatron-lion evaluate runs/b --fill-mask 'It was a [MASK] day.'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--data.path", "data/x"], 2, "--text and data.path data/x: give one of them"),
        (["short.txt"], 3, "10,000"),
        (["missing.txt"], 3, "missing.txt: no such file"),
        (["latin1.txt"], 3, "latin1.txt: not UTF-8 at byte 4; iconv -f LATIN1 -t UTF-8 FILE > NEW.txt"),
        (["late.txt"], 3, "is not UTF-8 or was cut short; fix it; iconv -f LATIN1 -t UTF-8 FILE > NEW.txt converts"),
        (["book.docx"], 3, "; rename it if it is one of these"),
        (["rows.jsonl"], 3, "text is read from the field or column 'text' of each row"),
        (["--run_dir", "short.txt"], 2, "run_dir: short.txt is a file; choose a folder"),
    ],
)  # fmt: skip
def test_refusals(book: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, message: str) -> None:
    Path("short.txt").write_text(novel(20))
    Path("latin1.txt").write_bytes("Café. ".encode("latin-1") * 4000)
    Path("late.txt").write_bytes(b"a word or two. " * 100_000 + b"\xe9")
    Path("book.docx").write_text(novel())
    Path("rows.jsonl").write_text('{"txt": "a"}\n' * 9)
    text = [book] if words[0].startswith("--") else []
    assert pretrain("--text", *text, *words, *SMALL) == code
    error = capsys.readouterr().err
    assert message in error
    assert "--on-error" not in error
    assert "--format" not in error
    assert not Path("runs").exists() or words == ["late.txt"]


def test_several_processes_are_refused_with_commands_that_work(book: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="this job has 2") as caught:
        own_text.open_text([str(book)], 2)
    train, prepare_words = (shlex.split(part) for part in str(caught.value).split("`")[1::2])
    for words in (train, prepare_words):
        assert main(words[1:]) == 0
    assert "--data.path data/my instead of --text" in str(caught.value)
    assert set(read_manifest("data/my").splits) == {"train", "valid", "test"}


def test_the_settings_follow_the_size_of_the_text() -> None:
    def found(size: int) -> tuple[int, int]:
        text = own_text.OwnText(["a.txt"], (), size)
        words = own_text.default_words(text, [])
        return text.vocab_size, int(words[words.index("--train.steps") + 1])

    tiny = yaml.safe_load((REPO / "configs/gpt2_tiny.yaml").read_text())
    words = own_text.default_words(own_text.OwnText(["a.txt"], (), 10**6), [])
    tokens_per_step = int(words[words.index("--train.global_batch_size") + 1]) * tiny["model"]["seq_length"]
    sizes = [found(size) for size in (10_000, 400_000, 1_000_000, 10_000_000, 10**10)]
    assert [vocab for vocab, _ in sizes] == [512, 1024, 2048, 8192, 8192]
    assert [steps for _, steps in sizes] == sorted(steps for _, steps in sizes)
    for size, (_, count) in zip((400_000, 1_000_000), sizes[1:], strict=False):
        # Between 5 and 20 passes, at 3 to 4 bytes a token.
        for bytes_per_token in (2.4, 4):
            assert 5 < count * tokens_per_step / (0.9 * size / bytes_per_token) < 20
    words = own_text.default_words(own_text.OwnText(["my notes/"], (), 10**6), ["--run_dir", "x"])
    assert words[words.index("--run_dir") + 1] == "runs/my-notes"
    assert words[-2:] == ["--run_dir", "x"], "the user's words come last"
    given = ["--config=a.yaml", "--text", "b"]
    assert own_text.default_words(own_text.OwnText(["b"], (), 10**6), given) == given


def test_a_short_run_has_a_short_warm_up() -> None:
    text = own_text.OwnText(["a.txt"], (), 10**6)

    def warm_up(*words: str) -> str | None:
        found = own_text.default_words(text, words)
        places = [place for place, word in enumerate(found) if word == "--schedule.warmup_steps"]
        return found[places[0] + 1] if places else None

    assert warm_up("--train.steps", "3") == warm_up("--train.steps=9") == "1"
    assert warm_up("--train.steps", "60") == "6"
    assert warm_up() is warm_up("--train.steps", "200") is warm_up("--train.steps", "many") is None
    assert warm_up("--train.steps", "60", "--schedule.warmup_steps", "9") == "9"


def test_the_estimate_of_the_tokens_is_that_of_english(book: Path) -> None:
    """For a vocabulary of each size, from the documentation of this project; its Markdown has more symbols than prose."""
    pages = "".join(path.read_text() for path in sorted((REPO / "docs").glob("*.md")))
    for size in (60_000, 200_000):
        Path("pages.txt").write_text(pages[:size])
        text = own_text.open_text(["pages.txt"], 1)
        train_bpe(["pages.txt"], text.vocab_size, f"tokenizer-{size}")
        tokens = len(load_tokenizer(f"tokenizer-{size}").encode(pages[:size]))
        assert 0.7 < text.train_tokens / (0.8 * tokens) < 1.3


def test_a_small_config_keeps_its_word_about_the_model(book: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("rate.yaml").write_text("optimizer:\n  lr: 1e-4\n")
    assert pretrain("rate.yaml", "--text", book, "--dry-run") == 0
    assert (
        "note: the config has no model settings, so the model is gpt2-12x768 with 640 samples"
        in capsys.readouterr().err
    )
    Path("rate.yaml").write_text("model:\n  num_layers: 1\n")
    assert pretrain("rate.yaml", "--text", book, "--dry-run") == 0
    assert "note: the config has no model" not in capsys.readouterr().err


@pytest.fixture
def train_only(book: Path) -> str:
    train_bpe([book], 300, "tokenizer")
    prepare(PrepareOptions(inputs=[book], tokenizer="tokenizer", output="data", split="1", workers=1))
    return "data"


def test_data_without_held_out_splits_trains_if_they_are_not_read(
    train_only: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--data.path", train_only, "--run_dir", "run", "--train.precision", "fp32", *SMALL]
    for more in ([], ["--dry-run"]):
        assert pretrain(*words, *more) == 3
        error = capsys.readouterr().err.splitlines()[-1]
        assert "data: has no valid split, because it was prepared with --split 100,0,0" in error
        assert "--split 90,5,5; or do without it: --train.test_every 0" in error
    assert pretrain(*words, "--train.test_every", 0, "--dry-run") == 0
    assert pretrain(*words, "--train.test_every", 0) == 0
    assert steps("run") == [3]
    probe = ["--probe.every", 2, "--probe.num_batches", 1, "--probe.data", "test", "--run_dir", "run2"]
    for more in ([], ["--dry-run"]):
        assert pretrain(*words, "--train.test_every", 0, *probe, *more) == 3
        assert "has no test split" in (error := capsys.readouterr().err.splitlines()[-1])
        assert "or do without it: probe.data fixed" in error


def test_several_corpora_of_which_one_lacks_a_split(
    train_only: str, book: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(PrepareOptions(inputs=[book], tokenizer="tokenizer", output="all", split="8,1,1", workers=1))
    paths = json.dumps(["all", train_only])
    words = ["--data.path", paths, "--run_dir", "run", "--train.precision", "fp32", *SMALL]
    assert pretrain(*words) == 3
    assert "data: has no valid split" in capsys.readouterr().err
    assert pretrain(*words, "--train.test_every", 0) == 0
