"""All claims of an artefact, and their table: paper, result, tolerance, convention and source in each row."""

from __future__ import annotations

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
    from megatron_lion.reproduce.language_claims import curve_claims, perplexity_claims

    return perplexity_claims(plan) if plan.artefact == "table-b1" else curve_claims(plan)


def as_markdown(key: str, claims: Sequence[Claim]) -> str:
    """The table of an artefact and the number of its statements that hold; `key` is "artefact/scale"."""
    artefact, _, scale = key.partition("/")
    name, _, quick = scale.partition(" ")
    head = f"## {artefact}, {name} scale{', quick: a few steps show that the path works, not how it ends' if quick else ''}"
    cells = [[c.what, c.paper, c.ours, c.tolerance or "–", c.verdict, c.convention or "–", c.source] for c in claims]
    table = markdown_grid(["what", "paper", "ours", "tolerance", "verdict", "convention", "source"], cells)
    verdicts = Counter(claim.verdict for claim in claims)
    counted = [(verdicts[verdict], words) for verdict, *words in _COUNTED if verdicts[verdict]]
    counts = ", ".join(f"{number} {words[number > 1]}" for number, words in counted)
    return f"{head}\n\n{table}\n\nOf {len(claims)} statements: {counts}.\n"
