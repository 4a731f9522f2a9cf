"""An exported run has the same numbers in lm-evaluation-harness, page by page and on LAMBADA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from tiny_gpt2 import WORDS, prose, tiny_gpt2, write_text_corpus

from megatron_lion.cli import main
from megatron_lion.evaluate.wikitext import split_pages

pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra lm-eval)")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run, its export, three pages in WikiText's form and four LAMBADA passages, with `evaluate` results."""
    folder = tmp_path_factory.mktemp("lm_eval")
    config = tiny_gpt2(folder / "run", write_text_corpus(folder / "text"), train__steps=20, optimizer__lr=3e-3)
    assert "failed" not in tiny.run_all({"run": (1, config)})["run"]
    pages = [
        f" = {title} = \n \n {text[:-1]} @-@ {text[:40]} , \" {text[3:50]} \" ( {text[5:30]} ) . \n"
        for title, text in zip(("One", "Two", "Three"), prose(3, seed=5), strict=True)
    ]  # fmt: skip
    (folder / "wiki.raw").write_text(" \n".join(pages))
    passages = [" ".join([*WORDS[start : start + 9], WORDS[start % 5]]) for start in range(4)]
    (folder / "lambada.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in passages))
    words = [
        "evaluate",
        str(folder / "run"),
        "--wikitext103",
        str(folder / "wiki.raw"),
        "--stride",
        "full",
        "--device",
        "cpu",
    ]
    assert main([*words, "--lambada", str(folder / "lambada.jsonl")]) == 0
    assert main(["export", str(folder / "run"), "--output", str(folder / "hf"), "--device", "cpu"]) == 0
    return folder


@pytest.fixture(scope="module")
def harness(folder: Path) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folder / "hf"), device="cpu", dtype="float32", batch_size=2)


def request(kind: str, *arguments: str) -> Any:
    from lm_eval.api.instance import Instance

    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def ours(folder: Path, kind: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(next((folder / "run" / "eval").glob(f"{kind}-*.json")).read_text())
    return found


def test_word_and_byte_perplexity_of_the_wikitext_task(folder: Path, harness: Any) -> None:
    from lm_eval.api.metrics import bits_per_byte, weighted_perplexity
    from lm_eval.tasks.wikitext.preprocess_wikitext import process_results, wikitext_detokenizer

    documents = [{"page": page} for page in split_pages((folder / "wiki.raw").read_text())]
    assert len(documents) == 3
    sums = harness.loglikelihood_rolling(
        [request("loglikelihood_rolling", wikitext_detokenizer(doc)) for doc in documents]
    )
    rows = [process_results(doc, (value,)) for doc, value in zip(documents, sums, strict=True)]
    result = ours(folder, "wikitext103_pages")
    assert result["word_ppl"] == pytest.approx(weighted_perplexity([row["word_perplexity"] for row in rows]), rel=1e-5)
    assert result["byte_ppl"] == pytest.approx(weighted_perplexity([row["byte_perplexity"] for row in rows]), rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(bits_per_byte([row["bits_per_byte"] for row in rows]), rel=1e-5)


def test_accuracy_and_perplexity_of_the_lambada_openai_task(folder: Path, harness: Any) -> None:
    import math

    texts = [json.loads(line)["text"] for line in (folder / "lambada.jsonl").read_text().splitlines()]
    pairs = [text.rsplit(" ", 1) for text in texts]
    found = harness.loglikelihood([request("loglikelihood", context, " " + word) for context, word in pairs])
    result = ours(folder, "lambada")
    assert result["accuracy"] == pytest.approx(sum(greedy for _, greedy in found) / len(found))
    assert result["word_ppl"] == pytest.approx(math.exp(-sum(value for value, _ in found) / len(found)), rel=1e-5)
