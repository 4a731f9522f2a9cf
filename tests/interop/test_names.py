"""The name tables cover all tensors of transformers' networks, each once, and convert them exactly both ways."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import examples
from tiny import same_bits

from megatron_lion.interop.weight_names import Shape, from_huggingface, to_huggingface


def their_tensors(shape: Shape, hidden: int, positions: int) -> dict[str, torch.Tensor]:
    """Returns random tensors with the names and shapes of a small transformers network, without tied tensors."""
    import transformers

    if shape.kind == "gpt2":
        config = transformers.GPT2Config(
            n_layer=shape.num_layers, n_embd=hidden, n_head=shape.num_attention_heads, n_positions=positions, vocab_size=shape.vocab_size,
            bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        network = transformers.GPT2LMHeadModel(config)
        tied = {"lm_head.weight"}
    else:
        config = transformers.MegatronBertConfig(
            num_hidden_layers=shape.num_layers, hidden_size=hidden, num_attention_heads=shape.num_attention_heads,
            intermediate_size=4 * hidden, max_position_embeddings=positions, vocab_size=shape.vocab_size,
        )  # fmt: skip
        network = transformers.MegatronBertForPreTraining(config)
        tied = {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
    return {name: torch.randn_like(tensor) for name, tensor in network.state_dict().items() if name not in tied}


@examples(12)
@given(
    kind=st.sampled_from(["gpt2", "bert"]),
    layers=st.integers(1, 3),
    heads=st.integers(1, 4),
    channels=st.integers(1, 5),
    vocab=st.integers(3, 40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_every_tensor_goes_there_and_back_bit_for_bit(kind, layers, heads, channels, vocab, dtype) -> None:
    shape = Shape(kind, layers, heads, vocab)
    theirs = {name: tensor.to(dtype) for name, tensor in their_tensors(shape, heads * channels, 7).items()}
    ours = dict(from_huggingface(theirs.__getitem__, shape))
    back = to_huggingface(ours, shape)
    assert back.keys() == theirs.keys()
    assert all(same_bits(back[name], theirs[name]) for name in theirs)


def test_queries_keys_and_values_are_sorted_by_head() -> None:
    """Rows are grouped by head: head 0's queries, keys, values, then head 1's; in GPT-2 all queries come first."""
    heads, channels = 2, 3
    shape = Shape("gpt2", 1, heads, 5)
    theirs = their_tensors(shape, heads * channels, 4)
    theirs["transformer.h.0.attn.c_attn.bias"] = torch.arange(18.0)
    ours = dict(from_huggingface(theirs.__getitem__, shape))
    expected = torch.tensor([0, 1, 2, 6, 7, 8, 12, 13, 14, 3, 4, 5, 9, 10, 11, 15, 16, 17]).float()
    assert torch.equal(ours["decoder.layers.0.self_attention.linear_qkv.bias"], expected)


def test_padded_rows_stay_here() -> None:
    shape = Shape("gpt2", 1, 1, 5)
    ours = dict(from_huggingface(their_tensors(shape, 4, 3).__getitem__, shape))
    ours["embedding.word_embeddings.weight"] = torch.cat([ours["embedding.word_embeddings.weight"], torch.ones(3, 4)])
    assert to_huggingface(ours, shape)["transformer.wte.weight"].shape == (5, 4)


def test_a_missing_tensor_is_named() -> None:
    shape = Shape("bert", 1, 1, 5)
    theirs = their_tensors(shape, 4, 3)
    del theirs["bert.pooler.dense.bias"]
    with pytest.raises(KeyError, match=r"bert\.pooler\.dense\.bias"):
        dict(from_huggingface(theirs.__getitem__, shape))
