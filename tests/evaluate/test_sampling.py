"""Each sampling rule, and greedy text that equals what transformers generates from the exported weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from tiny_gpt2 import tiny_gpt2, write_text_corpus

from megatron_lion.cli import main
from megatron_lion.evaluate.text_sampling import SamplingSettings, sample


def fixed(logits_V: list[float]):
    """Returns a model whose logits are constant."""
    return lambda tokens_BS, last: torch.tensor(logits_V).expand(len(tokens_BS), last, -1)


def drawn(logits_V: list[float], **settings: float) -> set[int]:
    """Returns the tokens that occur in 400 draws."""
    chosen = SamplingSettings(max_new_tokens=400, **{"temperature": 1.0, "top_k": 0, **settings})
    return set(sample(fixed(logits_V), [0], 1, chosen, seq_length=4, end_id=None)[0])


def test_rules() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().tolist()
    assert drawn(logits) == {0, 1, 2, 3}
    assert drawn(logits, temperature=0.0) == {0}
    assert drawn(logits, top_k=2) == {0, 1}
    assert drawn(logits, top_p=0.69) == {0, 1}
    assert drawn(logits, top_p=0.71) == {0, 1, 2}
    assert drawn(logits, top_p=1e-6) == {0}, "one token always stays"
    assert drawn(logits, temperature=0.01) == {0}


def test_frequencies_follow_the_temperature() -> None:
    logits = [0.0, 2.0]
    settings = SamplingSettings(max_new_tokens=4000, temperature=2.0, top_k=0)
    ones = sum(sample(fixed(logits), [0], 1, settings, seq_length=4, end_id=None)[0])
    assert ones / 4000 == pytest.approx(
        float(torch.tensor(logits).div(2).softmax(-1)[1]), abs=0.03
    )  # four standard errors


def test_window_end_mark_and_seed() -> None:
    seen = []

    def counting(tokens_BS: torch.Tensor, last: int) -> torch.Tensor:
        seen.append(tokens_BS.shape[1])
        return torch.nn.functional.one_hot((tokens_BS[:, -1:] + 1) % 6, 6).float() * 100

    settings = SamplingSettings(max_new_tokens=10)
    assert sample(counting, [0], 2, settings, seq_length=3, end_id=5) == [[1, 2, 3, 4]] * 2
    assert seen == [1, 2, 3, 3, 3]
    flat = [0.0] * 50
    lines = [
        sample(fixed(flat), [0], 2, SamplingSettings(seed=seed, top_k=0), seq_length=3, end_id=None)
        for seed in (1, 1, 2)
    ]
    assert lines[0] == lines[1] != lines[2]
    assert lines[0][0] != lines[0][1]


def test_verb_equals_transformers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = tiny_gpt2(tmp_path / "run", write_text_corpus(tmp_path / "text"), train__steps=20, optimizer__lr=3e-3)
    assert "failed" not in tiny.run_all({"run": (1, config)})["run"]
    assert main(["export", str(tmp_path / "run"), "--output", str(tmp_path / "hf"), "--device", "cpu"]) == 0
    tokenizer, model = (
        AutoTokenizer.from_pretrained(tmp_path / "hf"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "hf"),
    )
    ids = tokenizer("the sign", return_tensors="pt")
    expected = tokenizer.decode(model.generate(**ids, max_new_tokens=8, do_sample=False)[0])
    for target in ("run", "hf"):
        capsys.readouterr()
        words = [
            "generate",
            str(tmp_path / target),
            "--prompt",
            "the sign",
            "--temperature",
            "0",
            "--max-new-tokens",
            "8",
        ]
        assert main([*words, "--count", "2", "--device", "cpu"]) == 0
        assert capsys.readouterr().out == f"{expected.strip()}\n\n" * 2


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--temperature", "-1"], "--temperature"),
        (["--count", "0"], "--count"),
        (["--top-p", "0"], "(0, 1]"),
        (["--seed", str(2**70)], "--seed"),
    ],
)
def test_impossible_settings(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "nowhere", *words]) == 2
    assert says in capsys.readouterr().err


def test_a_checkpoint_is_no_other_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run" / "checkpoints" / "step_0000010"
    for verb, flag in (("generate", "--step"), ("evaluate", "--steps"), ("export", "--step")):
        words = [verb, str(folder), flag, "5", *(["--output", str(tmp_path / "hf")] if verb == "export" else [])]
        assert main(words) == 2
        assert "is step 10, but 5 was requested" in capsys.readouterr().err
