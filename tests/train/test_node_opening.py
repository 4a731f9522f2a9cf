"""One process of each node reads the data when a job opens it; the others take its result or its error."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import tiny
from distributed import run_distributed
from index_pairs import write_pair
from tiny_bert import documents, write_bert_corpus

from megatron_lion.config import DataConfig, ModelConfig
from megatron_lion.data import indexed_check
from megatron_lion.data.corpora import open_corpora
from megatron_lion.data.node_opening import open_once_a_node
from megatron_lion.errors import DataError

GPT = ModelConfig(seq_length=8, vocab_size=tiny.VOCAB, make_vocab_size_divisible_by=4)
BERT = ModelConfig(kind="bert", seq_length=64, make_vocab_size_divisible_by=64)


def opening(rank: int, node_folders: list[str], data: DataConfig, model: ModelConfig) -> dict[str, Any]:
    """Opens the data on one of four ranks, two on each node, in the folder of its node; returns what it read and found."""
    os.environ.update(LOCAL_RANK=str(rank % 2), LOCAL_WORLD_SIZE="2")
    os.chdir(node_folders[rank // 2])
    counts = {"indexes": 0, "tokens": 0, "hashes": 0}

    def counted(name: str, function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            counts[name] += 1
            return function(*arguments)

        return call

    indexed_check.find_fault = counted("indexes", indexed_check.find_fault)
    indexed_check._read_content = counted("tokens", indexed_check._read_content)
    indexed_check.sha256_file = counted("hashes", indexed_check.sha256_file)
    try:
        found = open_once_a_node(data, model, Path("cache"))
    except DataError as error:
        return {"error": str(error), "told_by": error.told_by, **counts}
    pairs = {str(path): (info.num_tokens, info.num_documents, info.bin_bytes) for path, info in found.infos.items()}
    return {"digest": found.digest, "vocab": found.vocab_size, "pairs": pairs, **counts}


def test_plain_prefixes_are_read_by_one_rank_of_each_node(tmp_path: Path) -> None:
    tiny.write_corpus(tmp_path / "text")
    data = DataConfig(path=[str(tmp_path / "text")], split="80,10,10")
    ranks = run_distributed(opening, 4, [str(tmp_path)] * 2, data, GPT)
    alone = open_corpora(data, GPT)
    assert {found["digest"] for found in ranks} == {alone.digest}
    assert [found["vocab"] for found in ranks] == [alone.vocab_size] * 4
    assert all(found["pairs"] == ranks[0]["pairs"] for found in ranks)
    assert [(found["indexes"], found["tokens"], found["hashes"]) for found in ranks] == [(1, 1, 1), (0, 0, 0)] * 2


def test_the_indexes_of_folders_are_checked_by_one_rank_of_each_node(tmp_path: Path) -> None:
    folder = write_bert_corpus(tmp_path / "made", documents(40, 30, seed=3))
    data = DataConfig(path=[folder])
    ranks = run_distributed(opening, 4, [str(tmp_path)] * 2, data, BERT)
    assert {found["digest"] for found in ranks} == {open_corpora(data, BERT).digest}
    assert all(found["pairs"] == ranks[0]["pairs"] for found in ranks)
    splits = len(ranks[0]["pairs"])
    assert [(found["indexes"], found["hashes"]) for found in ranks] == [(splits, splits), (0, 0)] * 2


@pytest.mark.parametrize("damaged", [0, 1])
def test_an_error_of_one_node_is_raised_on_all_ranks(tmp_path: Path, damaged: int) -> None:
    for node in ("one", "two"):
        (tmp_path / node).mkdir()
        write_pair(tmp_path / node / "a", [30] * 20, list(range(21)))
    nodes = [str(tmp_path / "one"), str(tmp_path / "two")]
    write_pair(Path(nodes[damaged], "a"), [30] * 20, [*range(19), 20, 19, 20])
    ranks = run_distributed(opening, 4, nodes, DataConfig(path=["a"], split="100,0,0"), GPT)
    assert [found["told_by"] for found in ranks] == [2 * damaged] * 4
    assert all("document boundaries do not run from 0 to 20" in found["error"] for found in ranks)


def test_each_node_takes_the_content_of_its_own_files(tmp_path: Path) -> None:
    """The comparison of the index files then finds that the nodes have different data."""
    for node, token in (("one", 1), ("two", 2)):
        (tmp_path / node).mkdir()
        write_pair(tmp_path / node / "a", [30] * 20, list(range(21)), [token] * 600)
    nodes = [str(tmp_path / "one"), str(tmp_path / "two")]
    ranks = run_distributed(opening, 4, nodes, DataConfig(path=["a"], split="100,0,0"), GPT)
    digests = [found["digest"] for found in ranks]
    assert digests[0] == digests[1] != digests[2] == digests[3]
