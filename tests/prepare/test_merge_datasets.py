"""`merge` joins datasets split by split, and no held-out document gets into train."""

from __future__ import annotations

import itertools
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from byte_bpe import write_byte_bpe
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset
from properties import examples

from megatron_lion.cli import main
from megatron_lion.config import DataConfig, ModelConfig
from megatron_lion.data.corpora import open_corpora
from megatron_lion.data.indexed_writer import IndexedWriter
from megatron_lion.data.manifest import Manifest, SplitInfo, read_manifest, write_manifest
from megatron_lion.data.tokenizers import Tokenizer, load_tokenizer
from megatron_lion.errors import ConfigError, DataError
from megatron_lion.prepare import equal_hashes
from megatron_lion.prepare import merge_datasets as module
from megatron_lion.prepare.merge_datasets import merge_datasets
from megatron_lion.prepare.pipeline import PrepareOptions, prepare
from megatron_lion.prepare.workfolder import work_folder

TEXTS = [f"Document {number} " + "word " * (number % 13) for number in range(300)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_byte_bpe(tmp_path_factory.mktemp("t") / "tokenizer", "w o"))


def make(folder: Path, tokenizer: Tokenizer, texts: list[str], **options: Any) -> Path:
    prepare(PrepareOptions(tokenizer=tokenizer, output=folder, **{"split": "8,1,1", **options}), documents=iter(texts))
    return folder


def documents(folder: Path) -> dict[str, list[tuple[int, ...]]]:
    """Returns the documents of each split, read by Megatron-Core."""
    found = {}
    for name, split in read_manifest(folder).splits.items():
        reader = IndexedDataset(str(folder / split.prefix))
        edges = reader.document_indices.tolist()
        found[name] = [
            tuple(int(token) for number in range(begin, end) for token in reader[number])
            for begin, end in itertools.pairwise(edges)
        ]
    return found


def test_datasets_of_parts_are_the_dataset_of_the_whole(tmp_path: Path, tokenizer: Tokenizer) -> None:
    parts = [make(tmp_path / f"{number}", tokenizer, TEXTS[100 * number : 100 * (number + 1)]) for number in range(3)]
    whole = make(tmp_path / "whole", tokenizer, TEXTS)
    merged = merge_datasets(parts, tmp_path / "merged")
    expected = read_manifest(whole)
    assert merged.splits == expected.splits, "the same bytes"
    for key in ("documents", "tokens", "text_bytes", "split", "seed", "dropped", "duplicate_documents"):
        assert getattr(merged, key) == getattr(expected, key)
    assert read_manifest(tmp_path / "merged") == merged
    assert len(merged.sources) == 3
    assert not work_folder(tmp_path / "merged").exists()
    again = merge_datasets([str(part) for part in parts], tmp_path / "merged")
    assert again == merged
    assert not work_folder(tmp_path / "merged").exists()
    with pytest.raises(ConfigError, match=r"contains another dataset.*--overwrite"):
        merge_datasets(parts[::-1], tmp_path / "merged")
    with pytest.raises(ConfigError, match="contains another dataset"):
        merge_datasets(parts, tmp_path / "merged", deduplicate=True)
    assert merge_datasets(parts[::-1], tmp_path / "merged", overwrite=True).documents == merged.documents
    opened = open_corpora(DataConfig(path=[str(tmp_path / "merged")]), ModelConfig(seq_length=16))
    assert opened.vocab_size == tokenizer.vocab_size


def test_no_held_out_document_is_in_train(tmp_path: Path, tokenizer: Tokenizer) -> None:
    first = make(tmp_path / "a", tokenizer, TEXTS[:200])
    second = make(tmp_path / "b", tokenizer, TEXTS[100:], seed=5, split="6,2,2")
    before = [documents(folder) for folder in (first, second)]
    merged = merge_datasets([first, second], tmp_path / "merged")
    found = documents(tmp_path / "merged")
    test = before[0]["test"] + before[1]["test"]
    valid = [one for one in before[0]["valid"] + before[1]["valid"] if one not in test]
    train = [
        one
        for one in before[0]["train"] + before[1]["train"]
        if one not in {*test, *before[0]["valid"], *before[1]["valid"]}
    ]
    assert found == {"train": train, "valid": valid, "test": test}
    assert merged.dropped == {"in_a_held_out_split": 300 + 100 - len(test) - len(valid) - len(train)}
    assert merged.documents == len(test) + len(valid) + len(train) < 400
    assert sum(merged.split) == pytest.approx(100)
    assert merged.split[0] == pytest.approx(100 * len(train) / merged.documents)
    assert merged.duplicate_documents == sum(len(each) - len(set(each)) for each in found.values()) > 10
    once = merge_datasets([first, second], tmp_path / "once", deduplicate=True)
    assert documents(tmp_path / "once") == {name: list(dict.fromkeys(each)) for name, each in found.items()}
    assert once.dropped == {**merged.dropped, "duplicate": merged.duplicate_documents}
    assert once.duplicate_documents == 0


def write_dataset(folder: Path, like: Manifest, tokenizer: Tokenizer, splits: dict[str, list[list[list[int]]]]) -> Path:
    """Writes a dataset folder of documents that are lists of sentences."""
    folder.mkdir()
    infos = {}
    for name, texts in splits.items():
        with IndexedWriter(folder / f"{name}_text_document", tokenizer.vocab_size) as writer:
            for sentences in texts:
                writer.add_document(np.array(list(itertools.chain(*sentences))), [len(one) for one in sentences])
            info = writer.finalize()
        infos[name] = SplitInfo(
            prefix=info.prefix.name, documents=info.num_documents, tokens=info.num_tokens, bin_bytes=info.bin_bytes,
            idx_bytes=info.idx_bytes, bin_sha256=info.bin_sha256, idx_sha256=info.idx_sha256,
        )  # fmt: skip
    manifest = {key: getattr(like, key) for key in like.__dataclass_fields__}
    counts = {"documents": sum(map(len, splits.values())), "tokens": sum(info.tokens for info in infos.values())}
    write_manifest(folder, Manifest(**{**manifest, **counts, "splits": infos}))
    tokenizer.save(folder / "tokenizer")
    return folder


_SENTENCES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=3), min_size=1, max_size=3)
_SPLITS = st.fixed_dictionaries(
    {"train": st.lists(_SENTENCES, min_size=1, max_size=6)},
    optional={name: st.lists(_SENTENCES, min_size=1, max_size=3) for name in ("valid", "test")},
)


@examples(60)
@given(st.lists(_SPLITS, min_size=2, max_size=3), st.booleans(), st.integers(1, 4))
def test_any_datasets(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, splits: list[dict[str, Any]], deduplicate: bool, most: int
) -> None:  # fmt: skip
    base = tmp_path_factory.mktemp("any")
    like = read_manifest(make(base / "like", tokenizer, TEXTS[:5], split="1"))
    folders = [write_dataset(base / f"{number}", like, tokenizer, one) for number, one in enumerate(splits)]
    expected: dict[str, list[tuple[int, ...]]] = {}
    later: set[tuple[int, ...]] = set()
    for name in ("test", "valid", "train"):
        every = [
            tuple(token for sentence in text for token in sentence) for one in splits for text in one.get(name, [])
        ]
        kept = [text for text in every if text not in later]
        expected[name] = list(dict.fromkeys(kept)) if deduplicate else kept
        later.update(every)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module._runs, "__defaults__", (most,))
        patch.setattr(equal_hashes, "_RANGE_DOCUMENTS", most)
        if not expected["train"]:
            with pytest.raises(DataError, match="no document would be left in the train split"):
                merge_datasets(folders, base / "merged", deduplicate=deduplicate)
            return
        merge_datasets(folders, base / "merged", deduplicate=deduplicate)
    assert documents(base / "merged") == {name: texts for name, texts in expected.items() if texts}


def test_bert_keeps_its_sentences(tmp_path: Path) -> None:
    words = [*"abcdefghijklmnop"]
    (tmp_path / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "##s", *words]) + "\n"
    )
    draw = random.Random(0)
    texts = [
        " ".join(f"{draw.choice(words).upper()} {draw.choice(words)}." for _ in range(draw.randrange(1, 5)))
        for _ in range(40)
    ]
    tokenizer = load_tokenizer(tmp_path / "vocab.txt")
    common = {"task": "bert", "split": "1", "divide_documents": "never"}
    parts = [
        make(tmp_path / "a", tokenizer, texts[:15], **common),
        make(tmp_path / "b", tokenizer, texts[15:], **common),
    ]
    whole = read_manifest(make(tmp_path / "whole", tokenizer, texts, **common))
    merged = merge_datasets(parts, tmp_path / "merged")
    assert merged.splits == whole.splits
    assert merged.sentences == whole.sentences


def test_the_command(tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    parts = [str(make(tmp_path / name, tokenizer, TEXTS[:100], seed=seed)) for name, seed in (("a", 1), ("b", 2))]
    output = str(tmp_path / "merged")
    assert main(["merge", *parts, "--output", output, "--deduplicate"]) == 0
    assert "in_a_held_out_split" in capsys.readouterr().out
    copy = shutil.copytree(parts[1], tmp_path / "copy")
    with open(copy / "train_text_document.bin", "ab") as stream:
        stream.write(b"x")
    other = load_tokenizer(write_byte_bpe(tmp_path / "other", "w o", "r d"))
    make(tmp_path / "c", other, TEXTS[:50])
    make(tmp_path / "d", tokenizer, TEXTS[:50], append_eod=False)
    (tmp_path / "file").write_text("x")
    for words, code, message in (
        ([parts[0]], 2, "at least two"),
        ([parts[0], parts[0]], 2, "named twice"),
        ([*parts, tmp_path / "c"], 2, "c: tokenizer"),
        ([*parts, tmp_path / "d"], 2, "d: append_eod"),
        ([parts[0], copy], 3, "train_text_document.bin: "),
        ([parts[0], tmp_path / "nothere"], 3, "nothere: no manifest.json"),
    ):
        assert main(["merge", *map(str, words), "--output", str(tmp_path / "bad")]) == code
        assert message in capsys.readouterr().err
        assert not (tmp_path / "bad").exists()
        assert not work_folder(tmp_path / "bad").exists()
    assert main(["merge", *parts, "--output", parts[0]]) == 2
    assert "is the output too" in capsys.readouterr().err
    assert main(["merge", *parts, "--output", str(tmp_path / "file")]) == 2


def test_passages_of_given_texts(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Each dataset's own entry, of the texts for which all were searched; none if documents are left out."""
    words = " ".join(f"w{number}" for number in range(40))
    for name, text in (("one.txt", words), ("two.txt", words.replace("w", "v"))):
        (tmp_path / name).write_text(text)
    given = [tmp_path / "one.txt", tmp_path / "two.txt"]
    texts = [f"{words} in the first", *TEXTS[:50]], [f"{words[:60]} in the second", *TEXTS[50:]]
    for name, mine, searched in (("a", texts[0], given), ("b", texts[1], given[:1]), ("c", texts[0], given)):
        options = PrepareOptions(tokenizer=tokenizer, output=tmp_path / name, split="1", decontaminate=searched)
        prepare(options, documents=mine)
    joined = merge_datasets([tmp_path / "a", tmp_path / "b"], tmp_path / "ab")
    found = [(Path(one.path).name, one.train_ngrams, one.train_documents) for one in joined.overlaps]
    assert found == [("one.txt", 28, 1), ("one.txt", 5, 1)]
    assert read_manifest(tmp_path / "ab") == joined
    assert merge_datasets([tmp_path / "a", tmp_path / "c"], tmp_path / "ac", deduplicate=True).overlaps == ()
