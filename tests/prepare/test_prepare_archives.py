"""`prepare` and the other commands on archives: the same bytes as from JSON lines, at any number of workers and after a kill."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import lzma
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from byte_bpe import write_byte_bpe
from tar_files import COMPRESS, SKIP, lines_of, openwebtext, read, tar

from megatron_lion.cli import main
from megatron_lion.errors import DataError
from megatron_lion.prepare import archives, decompression, pool
from megatron_lion.prepare.pieces import ReadOptions, read_documents
from megatron_lion.prepare.pipeline import DIVIDED, PrepareOptions, prepare, read_manifest
from megatron_lion.prepare.vocabularies import train_bpe, train_wordpiece
from megatron_lion.prepare.workfolder import work_folder


def noise(number: int, size: int) -> str:
    """A text that does not compress well."""
    draw = random.Random(number)
    return f"{number} " + " ".join(f"{draw.getrandbits(40):x}" for _ in range(size))


TEXTS = [noise(number, 150 + 7 * (number % 40)) for number in range(330)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer, and the same documents as an archive and as JSON lines."""
    folder = tmp_path_factory.mktemp("made")
    write_byte_bpe(folder, "1 2")
    (folder / "owt.tar.xz").write_bytes(lzma.compress(openwebtext(TEXTS, 11), preset=0))
    (folder / "owt.jsonl").write_bytes(lines_of(TEXTS))
    assert (folder / "owt.tar.xz").stat().st_size > 1 << 19, "large enough for worker processes"
    return folder


def options(made: Path, name: str, output: Path, **changes: object) -> PrepareOptions:
    given = PrepareOptions(
        inputs=[made / name], tokenizer=made, output=output, split="8,1,1", workers=1, encoder="tokenizers"
    )
    return dataclasses.replace(given, **changes)


def hashes(output: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in output.glob("*_text_document.*")}


@pytest.fixture(scope="module")
def twin(made: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Hashes of the token files of the JSON lines."""
    output = tmp_path_factory.mktemp("twin") / "out"
    prepare(options(made, "owt.jsonl", output))
    return hashes(output)


@pytest.fixture
def in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "WHOLE_BYTES", 1 << 14)


def test_token_files_are_those_of_json_lines_at_any_number_of_workers(
    made: Path, tmp_path: Path, twin: dict[str, str], in_pieces: None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    manifests = [
        prepare(options(made, "owt.tar.xz", tmp_path / str(workers), workers=workers)) for workers in (1, 2, 3)
    ]
    assert [hashes(tmp_path / str(workers)) for workers in (1, 2, 3)] == [twin] * 3
    assert manifests[0] == manifests[1] == manifests[2]
    assert (manifests[0].documents, manifests[0].sources[0].documents) == (len(TEXTS), len(TEXTS))
    expected = float(re.findall(r"about ([\d,]+) tokens", caplog.text)[0].replace(",", ""))
    assert 0.5 < expected / manifests[0].tokens < 2, "the estimate knows how much text the stored bytes give"


def test_an_interrupted_run_continues(
    made: Path,
    tmp_path: Path,
    twin: dict[str, str],
    in_pieces: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    whole = pool.encode_piece
    done = []

    def interrupted(piece: archives.Member, *rest: object) -> object:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(piece)
        return whole(piece, *rest)

    monkeypatch.setattr(pool, "encode_piece", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(options(made, "owt.tar.xz", tmp_path / "out"))
    monkeypatch.setattr(pool, "encode_piece", whole)
    assert len(list(work_folder(tmp_path / "out").glob("shards-*/*-tar.xz-1-*.json"))) == 3
    prepare(options(made, "owt.tar.xz", tmp_path / "out"))
    assert re.search(r", 3 of \d+ pieces from an earlier run", caplog.text)
    assert hashes(tmp_path / "out") == twin


@pytest.mark.slow
def test_a_killed_run_continues(made: Path, tmp_path: Path, twin: dict[str, str]) -> None:
    """A plain archive of several times the size of a piece, and two workers, so the members are handed on."""
    texts = [f"{text} {i}" for i in range(10) for text in TEXTS]
    (tmp_path / "a.tar").write_bytes(openwebtext(texts, 11))
    (tmp_path / "a.jsonl").write_bytes(lines_of(texts))
    words = [sys.executable, "-m", "megatron_lion", "prepare", "--tokenizer", str(made), "--split", "8,1,1", "--workers", "2",
             "--encoder", "tokenizers", "--output", str(tmp_path / "out"), "--input"]  # fmt: skip
    process = subprocess.Popen([*words, str(tmp_path / "a.tar")], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(work_folder(tmp_path / "out").glob("shards-*/*.json"))) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    again = subprocess.run([*words, str(tmp_path / "a.tar")], capture_output=True, text=True, check=False)
    assert "from an earlier run" in again.stderr, again.stderr
    prepare(options(tmp_path, "a.jsonl", tmp_path / "twin", tokenizer=made))
    assert hashes(tmp_path / "out") == hashes(tmp_path / "twin")


def test_the_pieces_that_are_encoded_do_not_keep_their_bytes(made: Path, tmp_path: Path, in_pieces: None) -> None:
    """The process that collects the shards would hold the text of the whole corpus."""
    held: list[pool.Collector] = []

    class Collector(pool.Collector):
        def __init__(self, *given: object) -> None:
            super().__init__(*given)
            held.append(self)

    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines_of(TEXTS[:90])))
    (tmp_path / "b.tar").write_bytes(openwebtext(TEXTS[:90], 11))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "Collector", Collector)
        prepare(options(tmp_path, "*.*", tmp_path / "out", tokenizer=made))
    pieces = [piece for piece, _ in held[0].shards.values()]
    assert {piece.unit for piece in pieces} == {"line", "member"}
    assert all(piece.data is None and piece.members is None for piece in pieces)


def test_the_first_bad_member_in_order_is_named_by_the_pool(made: Path, tmp_path: Path, in_pieces: None) -> None:
    texts = list(TEXTS)
    inner = [(f"{i}.txt", text.encode()) for i, text in enumerate(texts)]
    inner[300] = ("later.txt", b"\xff")
    parts = [(f"{n}_data.xz", lzma.compress(tar(inner[n : n + 30]), preset=0)) for n in range(0, len(inner), 30)]
    parts[4] = ("120_data.xz", lzma.compress(tar([*inner[120:149], ("sooner.txt", b"\xff")])))
    (tmp_path / "a.tar").write_bytes(tar([*parts, ("x.zip", b"")]))
    given = options(tmp_path, "a.tar", tmp_path / "out", tokenizer=made, workers=2)
    with pytest.raises(
        DataError, match=r"a\.tar: member 120_data\.xz: member sooner\.txt: not UTF-8 at byte 1; fix it, or skip such m"
    ):
        prepare(given)
    manifest = prepare(dataclasses.replace(given, on_error="skip"))
    assert (manifest.rejected, manifest.skipped) == ({"not_utf8": 2}, {"member not read (.zip)": 1})
    assert manifest.documents == len(TEXTS) - 2


def test_the_command_line(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    small = [text[:300] for text in TEXTS[:40]]
    (tmp_path / "in/my_data.xz").write_bytes(
        lzma.compress(tar([(f"{i}.txt", t.encode()) for i, t in enumerate(small)] + [("a.md", b"")]))
    )
    assert main(["prepare", "--input", str(tmp_path / "in"), "--list"]) == 0
    assert capsys.readouterr().out.splitlines()[0].split()[1:] == ["tar.xz", str(tmp_path / "in/my_data.xz")]
    words = [
        "prepare",
        "--input",
        str(tmp_path / "in"),
        "--tokenizer",
        str(made),
        "--output",
        str(tmp_path / "out"),
        "--format",
        "tar",
    ]
    assert main(words) == 0
    assert "  skipped: 1 member not read (.md)\n" in capsys.readouterr().out
    assert read_manifest(tmp_path / "out").documents == 40


def test_few_documents_of_an_archive_are_divided_by_position(made: Path, tmp_path: Path) -> None:
    books = [" ".join(TEXTS[:20]), " ".join(TEXTS[20:40])]
    (tmp_path / "a.tar.gz").write_bytes(
        gzip.compress(tar([(f"{i}.txt", text.encode()) for i, text in enumerate(books)]))
    )
    (tmp_path / "a.jsonl").write_bytes(lines_of(books))
    found = [
        prepare(options(tmp_path, name, tmp_path / f"of {name}", tokenizer=made)) for name in ("a.tar.gz", "a.jsonl")
    ]
    assert [manifest.options.get(DIVIDED) for manifest in found] == ["by position"] * 2
    assert hashes(tmp_path / "of a.tar.gz") == hashes(tmp_path / "of a.jsonl")


def test_bert_and_trained_vocabularies(tmp_path: Path) -> None:
    texts = [
        f"The lion number {i} sleeps in the shade. It wakes at {i % 12} o'clock. Then it hunts." for i in range(50)
    ]
    (tmp_path / "a.tar.bz2").write_bytes(COMPRESS[".bz2"](openwebtext(texts, 8, ".bz2")))
    (tmp_path / "a.jsonl").write_bytes(lines_of(texts))
    for name in ("a.tar.bz2", "a.jsonl"):
        train_bpe([tmp_path / name], 300, tmp_path / f"bpe {name}")
        vocabulary = train_wordpiece([tmp_path / name], 200, tmp_path / f"wordpiece {name}")
        prepare(options(tmp_path, name, tmp_path / f"of {name}", tokenizer=vocabulary, task="bert"))
    for what in ("bpe {}/vocab.json", "bpe {}/merges.txt", "wordpiece {}/vocab.txt"):
        assert (tmp_path / what.format("a.tar.bz2")).read_bytes() == (tmp_path / what.format("a.jsonl")).read_bytes()
    assert hashes(tmp_path / "of a.tar.bz2") == hashes(tmp_path / "of a.jsonl")


def zst(data: bytes) -> bytes:
    found: bytes = pytest.importorskip("zstandard").ZstdCompressor().compress(data)
    return found


@pytest.mark.parametrize("ending", [*list(COMPRESS)[1:], ".zst"])
def test_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    """Of what is compressed, at most 200 bytes may come out for each stored byte, after a first part of any ratio."""
    compress = COMPRESS.get(ending, zst)
    monkeypatch.setattr(decompression, "FREE_BYTES", 1 << 20)
    said = r"is compressed [\d,]+ to 1 so far, which no text is; the limit is 200 to 1 after 1 MiB; if it is right, decompress it first"
    bomb = b'{"text": "%s"}\n' % (b"x" * 1000) * 3000  # 3 MB
    stored = compress(bomb)
    assert len(bomb) - (1 << 20) > 200 * len(stored)
    (tmp_path / f"a.jsonl{ending}").write_bytes(stored)
    with pytest.raises(DataError, match=rf"a\.jsonl{ending}: {said}"):
        list(read_documents([tmp_path / f"a.jsonl{ending}"]))
    (tmp_path / "a.tar").write_bytes(tar([("ok.txt", b"ok"), (f"sub/b.jsonl{ending}", stored)]))
    with pytest.raises(DataError, match=rf"a\.tar: member sub/b\.jsonl{ending}: {said}"):
        read(tmp_path / "a.tar", SKIP)
    (tmp_path / f"a.tar{ending}").write_bytes(compress(tar([("b.jsonl", bomb)])))
    with pytest.raises(DataError, match=rf"a\.tar{ending}: .*{said}"):
        read(tmp_path / f"a.tar{ending}", SKIP)
    monkeypatch.setattr(decompression, "FREE_BYTES", 4 << 20)
    assert len(list(read_documents([tmp_path / f"a.jsonl{ending}"]))) == 3000


def test_each_level_has_a_ratio_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decompression, "FREE_BYTES", 1 << 16)
    text = TEXTS[0][:2000] + "lion " * 40_000
    inner = gzip.compress(tar([("a.txt", text.encode())]))
    outer = lzma.compress(tar([(f"{i}_data.gz", inner) for i in range(60)]))
    assert 60 * len(text) > 2000 * len(outer)
    (tmp_path / "a.tar.xz").write_bytes(outer)
    assert read(tmp_path / "a.tar.xz", ReadOptions())[0] == [text] * 60
