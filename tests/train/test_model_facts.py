"""What a checkpoint records of its model, written out by hand: two models that differ in any of it do not fit."""

from __future__ import annotations

import dataclasses

from megatron_lion.config import ModelConfig, RunConfig
from megatron_lion.train.model_state import model_facts


def test_facts_of_a_model() -> None:
    model = ModelConfig(kind="gpt2", num_layers=3, hidden_size=96, num_attention_heads=6, seq_length=40, gelu="erf")
    expected = {
        "kind": "gpt2", "num_layers": 3, "hidden_size": 96, "num_attention_heads": 6, "ffn_hidden_size": 384, "seq_length": 40,
        "gelu": "erf", "layernorm_epsilon": 1e-5, "vocab_size": 777,
    }  # fmt: skip
    assert model_facts(RunConfig(model=model), 777) == expected
    wider = dataclasses.replace(model, ffn_hidden_size=100)
    assert model_facts(RunConfig(model=wider), 777) == {**expected, "ffn_hidden_size": 100}
