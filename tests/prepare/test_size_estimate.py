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
from megatron_lion.prepare.find_files import survey
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
    elif form == "parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=len(texts))
    else:
        with (
            pyarrow.OSFile(str(path), "wb") as file,
            pyarrow.ipc.new_stream(file, table.select(["text"]).schema) as out,
        ):
            out.write_table(table.select(["text"]), max_chunksize=100)
    return path


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "parquet", "arrow"])
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
    assert estimate.disk_bytes > 2 * tokens * 2
    assert estimate.core_seconds > 0
