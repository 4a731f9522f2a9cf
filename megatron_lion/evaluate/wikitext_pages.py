r"""WikiText page by page, as lm-evaluation-harness scores it, for comparison with its published numbers.

Each page is detokenised and encoded separately. Its first token is predicted from the end-of-document token.
Windows of the model's length do not overlap, except that the last one is moved back to full length. With the
summed loss over all pages, and words and bytes counted on the *original* pages,

$$\mathrm{word\ ppl} = e^{\mathrm{sum}/\mathrm{words}}, \quad \mathrm{byte\ ppl} = e^{\mathrm{sum}/\mathrm{bytes}},
\quad \mathrm{bits/byte} = \mathrm{sum} / (\mathrm{bytes} \ln 2).$$

Source: the `wikitext` task of lm-evaluation-harness, whose text is the raw test file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_lion.errors import DataError
from megatron_lion.evaluate.token_scores import Segment
from megatron_lion.evaluate.wikitext import count_harness_words, detokenize, split_pages


@dataclass(frozen=True, kw_only=True)
class PageCounts:
    """The counts that divide the summed loss.

    Attributes:
        n_pages: number of pages.
        n_words: words of the original pages.
        n_bytes: UTF-8 bytes of the original pages.
    """

    n_pages: int
    n_words: int
    n_bytes: int

    def word_loss(self, loss_sum: float) -> float:
        """Returns the loss in nats per original word; `loss_sum` is in nats."""
        return loss_sum / self.n_words

    def byte_loss(self, loss_sum: float) -> float:
        """Returns the loss in nats per original byte; `loss_sum` is in nats."""
        return loss_sum / self.n_bytes

    def bits_per_byte(self, loss_sum: float) -> float:
        """Returns the loss in bits per original byte; `loss_sum` is in nats."""
        return loss_sum / self.n_bytes / math.log(2)


def read_pages(original: str) -> tuple[list[str], PageCounts]:
    """Splits WikiText into pages and returns them detokenised, with the counts of the original pages.

    Raises:
        DataError: the text has no page.
    """
    pages = split_pages(original)
    if not pages:
        raise DataError("the text has no page to score: it is blank")
    counts = PageCounts(
        n_pages=len(pages),
        n_words=sum(map(count_harness_words, pages)),
        n_bytes=sum(len(page.encode("utf-8")) for page in pages),
    )
    return [detokenize(page) for page in pages], counts


def page_segments(ids: Sequence[int], eod_id: int, seq_length: int) -> list[Segment]:
    """Returns the windows over one page; every token is scored once, the first from the end-of-document token.

    Args:
        ids: token ids of the page.
        eod_id: id of the end-of-document token.
        seq_length: the model's context length in tokens.

    >>> [(s.ids.tolist(), s.num_scored) for s in page_segments([1, 2, 3, 4, 5, 6, 7], eod_id=0, seq_length=3)]
    [([0, 1, 2, 3], 3), ([3, 4, 5, 6], 3), ([4, 5, 6, 7], 1)]
    """
    stream = torch.tensor([eod_id, *ids], dtype=torch.int64)
    segments = []
    for begin in range(1, len(stream), seq_length):
        end = min(begin + seq_length, len(stream))
        start = max(0, end - seq_length - 1)  # moves the last window back, so its tokens get the full context
        segments.append(Segment(ids=stream[start:end], num_scored=end - begin))
    return segments
