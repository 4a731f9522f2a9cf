"""The two ways to divide a document into sentences: our rules, or NLTK's Punkt where it is installed."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Literal

from megatron_lion.errors import EnvironmentFault
from megatron_lion.prepare.sentences import split_sentences

SplitterName = Literal["rules", "punkt"]
Splitter = Callable[[str], Sequence[str]]

_BLANK_LINE = re.compile(r"\n[^\S\n]*+\n\s*+")


def load_splitter(name: SplitterName) -> Splitter:
    """The splitter of that name; its sentences are not empty and have no white space around them.

    With Punkt too a blank line ends a sentence, as it does in every document that a person laid out.

    Raises:
        EnvironmentFault: Punkt was asked for and NLTK or its English model is not installed.
    """
    if name == "rules":
        return split_sentences
    try:
        from nltk.tokenize.punkt import PunktTokenizer

        punkt = PunktTokenizer("english")
    except (ImportError, LookupError):
        raise EnvironmentFault(
            "--splitter punkt: needs NLTK and its English model (pip install nltk; python -m nltk.downloader punkt_tab, "
            "or a folder that holds tokenizers/punkt_tab in NLTK_DATA); or use --splitter rules"
        ) from None

    def split(text: str) -> list[str]:
        parts = (part for sentence in punkt.tokenize(text) for part in _BLANK_LINE.split(sentence))
        return [part for part in map(str.strip, parts) if part]

    return split
