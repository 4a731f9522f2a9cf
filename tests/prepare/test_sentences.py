"""Sentence splitter: cases of each rule, no lost text, and linear time."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from megatron_lion.prepare.sentences import sentence_spans, split_sentences


@pytest.mark.parametrize(
    "marked",
    [
        "Mr. and Mrs. Smith met Dr. No. | They left. | He stayed.",
        "J. R. R. Tolkien wrote it. | So did C. S. Lewis. | It was I. | We knew.",
        "It costs $3.50 in v2.0.1 at example.com today. | Is that so? | Yes!",
        "He came at 5 p.m. | The shop was shut. | He met her at 6 p.m. Tuesday near St. Paul.",
        "The U.S. Senate met. | She lives in the U.S. | The flight was long.",
        '"Why?" she asked. | "Go!" | "Now?" | He went.',
        "He said (rather loudly!) that it was over. | (It was not.) | Then he left…  | Or did he?",
        "See Fig. 3 and No. 10 of vol. 2, pp. 4 and 5. | He said no. | Then he left.",
        "Davis v. Bell was decided in Jan. 2011 by Gov. Bell. | And again, e.g. The Times said so, etc. | But who knows?",
        "A claim.[12] | Another one.[3][4] | A third.",
        "Wait... what? | No! | really! | it is.",
        "1. Buy milk. | Then go home.",
        "A Title Without Stop\n\n|The text begins. | It goes on\nover a line. \n \n|And ends",
        "Apple Inc. said so. | Apple Inc. | The company said no more.",
    ],
)
def test_rules(marked: str) -> None:
    expected = [part.strip() for part in marked.split("|")]
    assert split_sentences(marked.replace("|", "")) == expected


@examples(300)
@given(text=st.text(st.sampled_from(list("aAbI1 \n.!?…\"')]([,:é東\t\u00a0\r")), max_size=60))
def test_spans_cover_the_text_in_order(text: str) -> None:
    spans = sentence_spans(text)
    assert all(begin < end and text[begin:end] == text[begin:end].strip() for begin, end in spans)
    gaps = [0, *(position for span in spans for position in span), len(text)]
    assert gaps == sorted(gaps)
    assert all(not text[gaps[i] : gaps[i + 1]].strip() for i in range(0, len(gaps), 2)), "only white space is lost"


@pytest.mark.parametrize(
    "text", ["." * 200_000, ". " * 100_000, "\n \n" * 60_000, "a" * 200_000, " " * 200_000 + "a", '!"' * 100_000]
)
def test_no_text_takes_for_ever(text: str) -> None:
    began = time.process_time()
    sentence_spans(text)
    assert time.process_time() - began < 2.0  # linear time takes a tenth of this, quadratic time minutes
