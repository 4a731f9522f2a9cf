"""Page-by-page scores and LAMBADA equal plain loops over a random transformer."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from megatron_lion.data.tokenizers import load_tokenizer
from megatron_lion.errors import DataError
from megatron_lion.evaluate.lambada import passage_segment, read_passages
from megatron_lion.evaluate.token_scores import LogitsScorer, Segment, score_segments
from megatron_lion.evaluate.wikitext_pages import page_segments, read_pages

PAGES = " \n = One = \n \n Some words , and more . \n = Two = \n \n = = Part = = \n The rest . \n"


def tiny_gpt2(n_positions: int, vocab: int = 130) -> torch.nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(2)
    config = GPT2Config(vocab_size=vocab, n_positions=n_positions, n_embd=16, n_layer=1, n_head=2)
    model = GPT2LMHeadModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model


@examples(100)
@given(st.integers(0, 60), st.integers(1, 15))
def test_page_windows_score_every_token_once_and_are_full_where_they_can_be(n: int, seq_length: int) -> None:
    stream = list(range(1, n + 1))
    segments = page_segments(stream, eod_id=0, seq_length=seq_length)
    scored = [token for s in segments for token in s.ids[-s.num_scored :].tolist()]
    assert scored == stream
    for segment in segments:
        assert len(segment.ids) == min(n, seq_length) + 1
        assert segment.ids.tolist() == list(range(int(segment.ids[0]), int(segment.ids[-1]) + 1))


def test_page_counts_are_of_the_original() -> None:
    pages, counts = read_pages(PAGES)
    assert [page.split("\n")[0] for page in pages] == [" = One =", " = Two ="]
    assert "more." in pages[0]
    assert counts.n_bytes == len(PAGES.encode()) - len(" \n") - len("\n")
    # White-space pieces, with the empty ones at both ends of each page.
    assert counts.n_words == len(PAGES.split()) + 4
    assert counts.bits_per_byte(counts.n_bytes * math.log(2)) == 1.0


def test_page_loss_equals_a_loop_over_tokens() -> None:
    seq_length, model = 12, tiny_gpt2(12)
    pages, _ = read_pages(PAGES)
    segments, expected = [], 0.0
    for page in pages:
        ids = list(page.encode())
        segments += page_segments(ids, eod_id=128, seq_length=seq_length)
        whole = [128, *ids]
        for target in range(1, len(whole)):
            block = (target - 1) // seq_length
            end = min((block + 1) * seq_length, len(ids))
            start = max(0, end - seq_length)
            with torch.no_grad():
                logits = model(torch.tensor([whole[start:target]])).logits[0, -1].double()
            expected -= float(logits.log_softmax(-1)[whole[target]])
    scorer = LogitsScorer(lambda t, last: model(t).logits[:, -last:])
    scores = score_segments(segments, scorer, seq_length=seq_length, batch_size=4)
    assert scores.num_targets == sum(len(page.encode()) for page in pages)
    assert scores.loss_sum == pytest.approx(expected, rel=1e-5)  # fp32 logits


def test_lambada_equals_greedy_decoding_and_the_probability_of_the_target() -> None:
    seq_length, model = 24, tiny_gpt2(24)
    texts = [f"{'x' * n} word {last}" for n, last in [(3, "a"), (9, "bc"), (1, "abc"), (40, "de")]]
    with torch.no_grad():  # a passage that greedy decoding of this model ends so
        ids = [*b"so it goes on ", int(model(torch.tensor([list(b"so it goes on ")])).logits[0, -1, :128].argmax())]
    segments = [passage_segment(text, lambda s: list(s.encode()), seq_length) for text in texts]
    segments.append(Segment(ids=torch.tensor(ids), num_scored=1))
    scorer = LogitsScorer(lambda t, last: model(t).logits[:, -last:, :128])
    scores = score_segments(segments, scorer, seq_length=seq_length, batch_size=2)

    right, loss = 0, 0.0
    whole = [list(text.encode())[-(seq_length + 1) :] for text in texts] + [ids]
    targets = [len(text.rpartition(" ")[2]) + 1 for text in texts] + [1]
    for tokens, count in zip(whole, targets, strict=True):
        greedy = True
        for at in range(len(tokens) - count, len(tokens)):
            with torch.no_grad():
                logits = model(torch.tensor([tokens[:at]])).logits[0, -1, :128].double()
            loss -= float(logits.log_softmax(-1)[tokens[at]])
            greedy &= int(logits.argmax()) == tokens[at]
        right += greedy
    assert 1 <= right < len(whole)
    assert (scores.num_greedy, scores.num_targets) == (right, sum(targets))
    assert scores.loss_sum == pytest.approx(loss, rel=1e-5)  # fp32 logits


def test_the_published_set_is_recognised_and_encodes_with_gpt2(shared_data: Path) -> None:
    passages = read_passages(shared_data / "lambada" / "lambada_test.jsonl")
    assert len(passages.texts) == 5153
    assert passages.version == "LAMBADA test, as processed for GPT-2"
    tokenizer = load_tokenizer(shared_data / "gpt2")
    for text in passages.texts[:200]:
        segment = passage_segment(text, tokenizer.encode, 1024)
        assert tokenizer.decode(segment.ids[-segment.num_scored :].tolist()) == " " + text.split(" ")[-1]
        assert tokenizer.decode(segment.ids.tolist()) == text


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "no passage"),
        ("not json\n", ":1: not JSON: "),
        ('{"text": "fine passage"}\n{"other": 1}\n', ":2: no key 'text'"),
        ('{"text": "word"}\n', ":1: a passage needs at least two words"),
        ('{"text": 5}\n', ":1: 'text' is a number"),
    ],
)
def test_bad_lambada_files_name_the_line(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "lambada.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=says):
        read_passages(path)


def test_missing_lambada_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_passages(tmp_path / "none.jsonl")


def test_passages_round_trip_through_json(tmp_path: Path) -> None:
    path = tmp_path / "l.jsonl"
    path.write_text("\n".join(json.dumps({"text": t}) for t in [" a b ", "c d e"]))
    assert read_passages(path).texts == ["a b", "c d e"]
