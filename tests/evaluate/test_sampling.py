"""Each sampling rule, and greedy text that equals what transformers generates from the exported weights."""

from __future__ import annotations

import json
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


def test_ids_in_a_hole_of_the_vocabulary_are_not_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The vocabulary has 257 tokens with ids below 257, and one with id 400; the model gives ids 257 to 399 much probability."""
    from safetensors.torch import load_file, save_file
    from tokenizers import pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel

    from megatron_lion.data.tokenizers import Tokenizer

    vocabulary = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary |= {"<|endoftext|>": 256, "th": 400}
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=450, n_positions=16, n_embd=16, n_layer=1, n_head=2)).save_pretrained(
        tmp_path
    )
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nt h\n")
    weights = load_file(tmp_path / "model.safetensors")
    weights["transformer.wte.weight"][257:400] *= 30
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    drawn: list[int] = []
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids: drawn.extend(ids) or "")
    words = ["--temperature", "1", "--top-k", "0", "--max-new-tokens", "40", "--count", "4", "--prompt", "the"]
    assert main(["generate", str(tmp_path), *words, "--device", "cpu"]) == 0
    assert main(["generate", str(tmp_path), *words, "--temperature", "0", "--device", "cpu"]) == 0
    assert len(drawn) > 100
    assert set(drawn) <= set(vocabulary.values())


def test_masked_words_are_tokens(tmp_path: Path) -> None:
    from types import SimpleNamespace

    from tokenizers import Tokenizer, models, pre_tokenizers

    from megatron_lion.data.tokenizers import load_tokenizer
    from megatron_lion.evaluate.bert_cloze import fill_mask

    vocabulary = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "the": 5, "cat": 7, "dog": 8, "##s": 9}
    made = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    likely = torch.zeros(1, 12)
    likely[0, [6, 10]] = 9.0  # the hole, and a row beyond the vocabulary
    likely[0, 7] = 2.0
    likely[0, 8] = 1.0
    run = SimpleNamespace(tokenizer=tokenizer, seq_length=16, bert_logits=lambda *_: (likely, None))
    [guesses] = fill_mask(run, "the [MASK]", top=2)
    expected = likely.double().softmax(-1)[0]
    assert [(guess.token, guess.probability) for guess in guesses] == [
        ("cat", float(expected[7])),
        ("dog", float(expected[8])),
    ]
    assert {guess.token for guess in fill_mask(run, "the [MASK]", top=50)[0]} == set(vocabulary)
