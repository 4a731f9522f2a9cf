"""Divides English text into sentences: by our rules, fast, or by NLTK's Punkt if it is installed.

Sentence-order tasks need the boundaries. The rules:

A sentence may end where `.`, `!`, `?` or `…`, with closing quotes, brackets and note numbers ([7]) after it, is followed
by white space, and at a blank line. Whether a full stop does end it is decided by the word before and the word after:

1. A word that begins with a small letter begins a sentence after a bare ! or ? only ("Why?" she asked).
2. Titles and other words that lead to what follows (Mr., Dr., St., vs., e.g., Fig. 3) end none.
3. Single capitals are initials (J. R. R. Tolkien), save "I" and where the next word commonly begins sentences.
4. Abbreviations that can end a sentence (Inc., a.m., U.S., Jan.) do so where the next word commonly begins sentences.
5. A number alone before the stop, at the beginning of a line, counts an item of a list.

Decimals, versions and addresses (3.14, v1.2, example.com) have no white space after the point and are never divided.
Nothing but the white space between sentences is lost.
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


# Never at a sentence's end.
_LEADING = _words(
    """
    mr mrs ms messrs dr prof rev hon st sgt capt col gen lt cmdr adm maj gov sen rep pres supt det insp mt ft
    vs v c cf viz e.g i.e eg ie approx ca op trans
    """
)
# Not at a sentence's end before a number.
_COUNTING = _words("no nos p pp fig figs eq eqs sec secs ch chap vol vols art ed par")
# At a sentence's end if what follows commonly begins one.
_TRAILING = _words(
    """
    inc ltd corp bros llc plc jr sr esq etc al a.m p.m b.c a.d ph.d sept oct nov dec feb aug tues thu thur thurs wed
    ave blvd rd bldg dept univ assn hrs lb lbs oz calif colo conn fla mich minn okla tenn tex wis ariz
    """
)
# The same where they are written with a capital; without, they are words.
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

# A run of end marks and what closes after it, before white space or the end; or a blank line.
# Possessive, and begun at the first mark or white space of a run alone: a megabyte of "!!!!" is read once.
_CANDIDATE = re.compile(
    r"""(?<![.!?…])[.!?…]++(?:["'”’»)\]}]|\[\d++\])*+(?=(\s++|\Z))|(?<!\s)(?=([^\S\n]*+\n[^\S\n]*+\n\s*+))"""
)
_BLANK_LINE = re.compile(r"\n[^\S\n]*+\n\s*+")
_OPENING = "\"'“‘«([{¿¡*_—–-"
_CLOSING = "\"'”’.,;:!?)]}"
_LOOK_BACK, _LOOK_AHEAD = 30, 24


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


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """Begin and end of each sentence in the text, without the white space around it.

    Args:
        text: a document.

    Returns:
        [(begin, end), …] in order; empty for a text of white space.

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
    """The sentences of a text; see `sentence_spans`.

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
        return False  # the mark stands inside brackets, or between other marks
    if word_after[:1].islower():
        return bare and text[mark] in "!?"
    if not bare or text[mark] != ".":
        return True  # !, ?, an ellipsis, or a stop with something closed after it
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
