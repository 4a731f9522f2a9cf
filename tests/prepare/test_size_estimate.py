"""The estimate of a preparation is near what it then needs, in every form of the input."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from byte_bpe import write_byte_bpe

from megatron_lion.data.tokenizers import load_tokenizer
from megatron_lion.prepare.encode_piece import EncodeSettings
from megatron_lion.prepare.encoders import build_encoder
from megatron_lion.prepare.find_files import input_file, survey
from megatron_lion.prepare.pieces import ReadOptions
from megatron_lion.prepare.size_estimate import estimate_work


def write(folder: Path, form: str, texts: list[str]) -> Path:
    """Writes documents, beside a column of other numbers where there are columns."""
    path = folder / f"corpus.{form}"
    noise = random.Random(0)
    table = pyarrow.table({"text": texts, "other": [noise.randbytes(400) for _ in texts]})
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    if form == "jsonl":
        path.write_bytes(lines)
    elif form == "jsonl.gz":
        path.write_bytes(gzip.compress(lines))
    elif form == "json":  # one array, and values beside the text
        path.write_text(json.dumps([{"text": text, "other": "x" * 900} for text in texts]))
    elif form == "bad.jsonl":
        path.write_bytes(b'{"txt": 1}\n' * 200_000 + lines)
    elif form == "wide.jsonl":
        path.write_text("".join(json.dumps({"html": "x" * 20_000, "text": text}) + "\n" for text in texts))
    elif form == "txt":
        path.write_text("\n\n".join(texts))
    elif form == "parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=len(texts))
    else:
        with (
            pyarrow.OSFile(str(path), "wb") as file,
            pyarrow.ipc.new_stream(file, table.select(["text"]).schema) as out,
        ):
            out.write_table(table.select(["text"]), max_chunksize=100)
    return path


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "bad.jsonl", "wide.jsonl", "json", "parquet", "arrow", "txt"])
def test_tokens_and_disk_are_near_the_truth(tmp_path: Path, form: str) -> None:
    draw = random.Random(3)
    words = [f"word{number}" for number in range(900)]
    texts = [" ".join(draw.choices(words, k=draw.randrange(20, 400))) for _ in range(1500)]
    tokenizer = load_tokenizer(write_byte_bpe(tmp_path / "tokenizer", "w o", "r d"))
    files = survey([write(tmp_path, form, texts)], "auto").files
    settings = EncodeSettings(read=ReadOptions(), eod_id=tokenizer.eod_id, seed=1, vocab_size=tokenizer.vocab_size)
    estimate = estimate_work(files, settings, build_encoder("auto", tokenizer))
    tokens = sum(map(len, tokenizer.encode_batch(texts))) + len(texts)
    assert 0.8 < estimate.tokens / tokens < 1.25
    assert 2 * tokens * 2 < estimate.disk_bytes < 2.5 * tokens * 2 + 5e6
    assert 0 < estimate.core_seconds < 600, "a mistake of the units gives days"


def test_short_documents_take_more_disk_than_tokens(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_byte_bpe(tmp_path / "tokenizer", "w o"))
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' * 100_000)
    settings = EncodeSettings(read=ReadOptions(), eod_id=tokenizer.eod_id, seed=1, vocab_size=tokenizer.vocab_size)
    estimate = estimate_work([input_file(tmp_path / "a.jsonl", "jsonl")], settings, build_encoder("auto", tokenizer))
    assert estimate.tokens == pytest.approx(200_000, rel=0.05)
    assert estimate.disk_bytes == pytest.approx(1.1 * (4 * 200_000 + 60 * 100_000) + (1 << 22), rel=0.05)
