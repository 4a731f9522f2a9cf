"""Splits English text into sentences, by rules or by NLTK's Punkt.

BERT's sentence-order task needs the boundaries. A blank line ends a sentence. White space after `.`, `!`, `?` or `…`, with
closing quotes, brackets and note numbers ([7]) between them, may end one. For a full stop the words before and after it
decide:

1. A word that begins with a small letter begins a sentence only after a bare ! or ? ("Why?" she asked).
2. Titles and other words that belong to the next word (Mr., Dr., St., vs., e.g., Fig. 3) end no sentence.
3. A single capital is an initial (J. R. R. Tolkien), except "I", and except if the next word commonly begins sentences.
4. Abbreviations that can end a sentence (Inc., a.m., U.S., Jan.) end it if the next word commonly begins sentences.
5. A number alone before the stop, at the beginning of a line, numbers an item of a list and ends no sentence.

Decimals, versions and addresses (3.14, v1.2, example.com) have no white space after the point and are not divided.
Only the white space between sentences is lost.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Literal

from megatron_lion.errors import EnvironmentFault

SplitterName = Literal["rules", "punkt"]
Splitter = Callable[[str], Sequence[str]]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# These never end a sentence.
_LEADING = _words(
    """
    mr mrs ms messrs dr prof rev hon st sgt capt col gen lt cmdr adm maj gov sen rep pres supt det insp mt ft
    vs v c cf viz e.g i.e eg ie approx ca op trans
    """
)
# These do not end a sentence before a number.
_COUNTING = _words("no nos p pp fig figs eq eqs sec secs ch chap vol vols art ed par")
# These end a sentence if the next word commonly begins one (_STARTERS).
_TRAILING = _words(
    """
    inc ltd corp bros llc plc jr sr esq etc al a.m p.m b.c a.d ph.d sept oct nov dec feb aug tues thu thur thurs wed
    ave blvd rd bldg dept univ assn hrs lb lbs oz calif colo conn fla mich minn okla tenn tex wis ariz
    """
)
# The same if written with a capital; without one they are ordinary words.
_TRAILING_CAPITAL = _words(
    "Co Jan Mar Apr Jun Jul Sep Mon Tue Fri Sat Sun La Ill Ind Mass Miss Del Va Pa Md Ga Ala Mo Wash Ore"
)
_STARTERS = _words(
    """
    The A An This That These Those It He She They We You I His Her Its Their Our My Your There Here In On At By For
    From With As If When While After Before Since But And So Yet Or However Although Though Because Then Now What Who
    Why How Where Which Some Many Most All Both Each Every Another Other Such Not One Two Also According Meanwhile
    Despite During Once Until Under Over To Let Do Did Does Is Are Was Were Can Could Will Would Should
    """
)

# A run of end marks with closing characters, before white space or the end of the text; or a blank line.
# Possessive quantifiers, and matches only at the first mark or white space of a run, keep the time linear for a
# megabyte of "!!!!"; backtracking would take minutes.
_CANDIDATE = re.compile(
    r"""(?<![.!?…])[.!?…]++(?:["'”’»)\]}]|\[\d++\])*+(?=(\s++|\Z))|(?<!\s)(?=([^\S\n]*+\n[^\S\n]*+\n\s*+))"""
)
_BLANK_LINE = re.compile(r"\n[^\S\n]*+\n\s*+")
_OPENING = "\"'“‘«([{¿¡*_—–-"
_CLOSING = "\"'”’.,;:!?)]}"
_LOOK_BACK, _LOOK_AHEAD = 30, 24


def load_splitter(name: SplitterName) -> Splitter:
    """Returns the splitter of a name, a function from a text to its sentences.

    The sentences are not empty and have no white space around them. A blank line ends a sentence with Punkt too.

    Raises:
        EnvironmentFault: Punkt was requested and NLTK or its English model is not installed.
    """
    if name == "rules":
        return split_sentences
    try:
        from nltk.tokenize.punkt import PunktTokenizer

        punkt = PunktTokenizer("english")
    except (ImportError, LookupError):
        raise EnvironmentFault(
            "--splitter punkt: needs NLTK and its English model (pip install nltk; python -m nltk.downloader punkt_tab, "
            "or set NLTK_DATA to a folder with tokenizers/punkt_tab); or use --splitter rules"
        ) from None

    def split(text: str) -> list[str]:
        parts = (part for sentence in punkt.tokenize(text) for part in _BLANK_LINE.split(sentence))
        return [part for part in map(str.strip, parts) if part]

    return split


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """Returns the begin and end of each sentence in a text, without the white space around it.

    Args:
        text: text of a document.

    Returns:
        [(begin, end), …] in characters, in order; empty for a text of white space only.

    >>> text = 'Mr. J. Smith paid $3.50 at 5 p.m. He left. "Why?" she asked.'
    >>> [text[begin:end] for begin, end in sentence_spans(text)]
    ['Mr. J. Smith paid $3.50 at 5 p.m.', 'He left.', '"Why?" she asked.']
    """
    spans = []
    begin = len(text) - len(text.lstrip())
    for candidate in _CANDIDATE.finditer(text, begin):
        end, blank_line = candidate.end(), candidate.group(2)
        after = end + len(blank_line or candidate.group(1))
        if blank_line or "\n\n" in text[end:after] or _ends_sentence(text, begin, candidate.start(), end, after):
            end = begin + len(text[begin:end].rstrip())
            if end > begin:
                spans.append((begin, end))
            begin = max(begin, after)
    end = begin + len(text[begin:].rstrip())
    return [*spans, (begin, end)] if end > begin else spans


def split_sentences(text: str) -> list[str]:
    """Returns the sentences of a text; see `sentence_spans`.

    >>> split_sentences("It works. Version 2.0 does, too! See Fig. 3 for more.")
    ['It works.', 'Version 2.0 does, too!', 'See Fig. 3 for more.']
    """
    return [text[begin:end] for begin, end in sentence_spans(text)]


def _ends_sentence(text: str, begin: int, mark: int, end: int, after: int) -> bool:
    """Whether the end mark at `mark`, closed at `end`, ends the sentence that began at `begin`."""
    following = text[after : after + _LOOK_AHEAD].split(None, 1)
    word_after = following[0].lstrip(_OPENING).rstrip(_CLOSING) if following else ""
    bare = end - mark == 1
    if following and not word_after and following[0][0] in _CLOSING:
        return False  # the mark is inside brackets or between other marks
    if word_after[:1].islower():
        return bare and text[mark] in "!?"
    if not bare or text[mark] != ".":
        return True  # !, ?, an ellipsis, or a stop with a closing character after it
    before = text[max(begin, mark - _LOOK_BACK) : mark].split()
    word_before = before[-1].lstrip(_OPENING) if before else ""
    lowered = word_before.lower()
    starts_line = mark - len(word_before) == begin or text[mark - len(word_before) - 1] == "\n"
    if starts_line and word_before.isalnum() and len(word_before) <= 3 and not word_before.isalpha():
        return False  # 1. Item of a list
    if lowered in _LEADING or (lowered in _COUNTING and word_after[:1].isdigit()):
        return False
    initial = len(word_before) == 1 and word_before.isupper() and word_before != "I"
    dotted = "." in word_before and max(map(len, lowered.split("."))) == 1 and not word_before[0].isdigit()
    if initial or dotted or lowered in _TRAILING or word_before in _TRAILING_CAPITAL:
        return word_after in _STARTERS
    return True
