"""All claims of an artefact, and their table: paper, result, tolerance, convention and source in each row."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence

from megatron_lion.compare.table import markdown_grid
from megatron_lion.reproduce.artefacts import Plan
from megatron_lion.reproduce.claim import Claim

_COUNTED = (
    ("holds", "holds here", "hold here"),
    ("does not hold here", "does not hold here", "do not hold here"),
    ("not resolved", "is not resolved by these measurements", "are not resolved by these measurements"),
    ("not comparable", "is not comparable", "are not comparable"),
)
"""Verdict, and how one and several statements with it are counted."""


def claims_of(plan: Plan) -> list[Claim]:
    """All claims of an artefact, computed from its run folders.

    Raises:
        CheckpointError: a run or a result is missing.
    """
    if plan.artefact == "toy":
        from megatron_lion.reproduce.toy_claims import toy_claims

        return toy_claims()
    if plan.artefact == "rates":
        from megatron_lion.reproduce.rate_claims import rate_claims

        return rate_claims(plan)
    if plan.artefact == "batches":
        from megatron_lion.reproduce.batch_claims import batch_claims

        return batch_claims(plan)
    if plan.artefact == "scaling":
        from megatron_lion.reproduce.scaling_claims import scaling_claims

        return scaling_claims(plan)
    from megatron_lion.reproduce.language_claims import curve_claims, perplexity_claims

    return perplexity_claims(plan) if plan.artefact == "table-b1" else curve_claims(plan)


def as_markdown(key: str, claims: Sequence[Claim]) -> str:
    """The table of an artefact and the number of its statements that hold; `key` is "artefact/scale"."""
    cells = [[c.what, c.paper, c.ours, c.tolerance or "–", c.verdict, c.convention or "–", c.source] for c in claims]
    table = markdown_grid(["what", "paper", "ours", "tolerance", "verdict", "convention", "source"], cells)
    return f"## {_title(key)}\n\n{table}\n\n{_counts(claims)}\n"


def as_text(key: str, claims: Sequence[Claim]) -> str:
    """The same content for a terminal: a paragraph for each statement, in 79 columns, and each convention once, below them."""
    conventions = list(dict.fromkeys(claim.convention for claim in claims if claim.convention))
    lines = _wrapped(_title(key), "", "")
    for claim in claims:
        lines += ["", *_wrapped(f"{claim.verdict}: {claim.what}", "", "  ")]
        source = f" ({claim.source})" if claim.source != "–" else ""
        lines += _wrapped(f"{claim.paper}{source}", "  paper  ", " " * 9)
        tolerance = f" (tolerance: {claim.tolerance})" if claim.tolerance else ""
        note = f" [{conventions.index(claim.convention) + 1}]" if claim.convention else ""
        lines += _wrapped(f"{claim.ours}{tolerance}{note}", "  ours   ", " " * 9)
    if conventions:
        lines += ["", "How ours were measured:"]
        for number, convention in enumerate(conventions, 1):
            lines += _wrapped(convention, f"  [{number}] ", " " * 6)
    return "\n".join([*lines, "", *_wrapped(_counts(claims), "", ""), ""])


def _wrapped(text: str, first: str, others: str) -> list[str]:
    return textwrap.wrap(
        text, 79, initial_indent=first, subsequent_indent=others, break_on_hyphens=False, break_long_words=False
    )


def _title(key: str) -> str:
    artefact, _, scale = key.partition("/")
    name, _, quick = scale.partition(" ")
    return (
        f"{artefact}, {name} scale{', quick: a few steps show that the path works, not how it ends' if quick else ''}"
    )


def _counts(claims: Sequence[Claim]) -> str:
    verdicts = Counter(claim.verdict for claim in claims)
    counted = [(verdicts[verdict], words) for verdict, *words in _COUNTED if verdicts[verdict]]
    counts = ", ".join(f"{number} {words[number > 1]}" for number, words in counted)
    return f"Of {len(claims)} statements: {counts}."
