"""Published perplexities, each with the convention by which it was measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Convention:
    """A way of measuring perplexity, and the field of our results that follows it.

    Attributes:
        name: short name.
        text: the text and its preparation.
        divides_by: divisor of the summed loss.
        windows: the windows over the text.
        kind: kind of our result that is measured this way, or None if no kind is.
        field: field of that result.
        stride: required stride: a number, "seq_length" for no overlap, or None for any.
        version: required beginning of the result's text version, or "" for any.
        scale: factor from our field to the published unit, such as 100 for percent.
    """

    name: str
    text: str
    divides_by: str
    windows: str
    kind: str | None = None
    field: str = ""
    stride: int | str | None = None
    version: str = ""
    scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published number with its model, source and convention."""

    value: float
    model: str
    source: str
    convention: Convention


MEGATRON = Convention(
    name="Megatron adjusted",
    text="WikiText-103 test tokens, detokenised, one stream",
    divides_by="original words, (n_tok - 1)/(n_orig - 1) in the exponent",
    windows="overlapping, each scores its last 32 targets",
    kind="wikitext103",
    field="adjusted_ppl",
    stride=32,
    version="WikiText-103 tokens test",
)
HARNESS_WORD = Convention(
    name="lm-evaluation-harness word",
    text="raw test file page by page, detokenised, first token from end-of-document",
    divides_by="white-space words of the original",
    windows="not overlapping",
    kind="wikitext103_pages",
    field="word_ppl",
    version="WikiText raw test",
)
HARNESS_BYTE = Convention(
    name="lm-evaluation-harness byte",
    text=HARNESS_WORD.text,
    divides_by="UTF-8 bytes of the original",
    windows="not overlapping",
    kind="wikitext103_pages",
    field="byte_ppl",
    version="WikiText raw test",
)
HARNESS_BITS = Convention(
    name="lm-evaluation-harness bits per byte",
    text=HARNESS_WORD.text,
    divides_by="UTF-8 bytes of the original, in bits",
    windows="not overlapping",
    kind="wikitext103_pages",
    field="bits_per_byte",
    version="WikiText raw test",
)
GPT2_WORD = Convention(
    name="GPT-2 paper, WikiText-103",
    text="WikiText-103 test, invertible detokenisers that were not published",
    divides_by="original words",
    windows="not stated; Megatron's adjusted number is the nearest that can be measured",
    kind="wikitext103",
    field="adjusted_ppl",
    stride=32,
    version="WikiText-103 tokens test",
)
GPT2_WIKITEXT2 = Convention(
    name="GPT-2 paper, WikiText-2",
    text="the same test articles as WikiText-103, invertible detokenisers that were not published",
    divides_by="fits tokens, not words",
    windows="not stated",
    kind="wikitext103",
    field="token_ppl",
    stride=32,
)
RAW_JOINED = Convention(
    name="token level, raw text joined by blank lines",
    text="raw test file, not detokenised, lines joined by blank lines",
    divides_by="tokens of the model's vocabulary",
    windows="stride as stated with the number",
)
PAPER_LOG = Convention(
    name="LION paper, Table B.1 (natural log)",
    text="WikiText-103 test tokens by Megatron's zero-shot evaluation",
    divides_by="fits tokens: as word-level values they would put GPT-2 Medium at GPT-2 1.5B's quality",
    windows="overlapping, each scores its last 32 targets",
    kind="wikitext103",
    field="log_token_ppl",
    stride=32,
    version="WikiText-103 tokens test",
)
_LAMBADA = "LAMBADA test"
GPT2_LAMBADA_ACCURACY = Convention(
    name="GPT-2 paper, LAMBADA accuracy in percent",
    text=f"{_LAMBADA}; invertible detokenisers that were not published",
    divides_by="passages; the last token comes close (46.67 for 117M in huggingface/transformers#491), the last word does not",
    windows="one passage each",
    kind="lambada",
    field="last_token_accuracy",
    version=_LAMBADA,
    scale=100.0,
)
GPT2_LAMBADA_PPL = Convention(
    name="GPT-2 paper, LAMBADA perplexity",
    text=GPT2_LAMBADA_ACCURACY.text,
    divides_by="not stated; the loss of the last token is the nearest that is measured here",
    windows="one passage each",
    kind="lambada",
    field="last_token_ppl",
    version=_LAMBADA,
)
HARNESS_LAMBADA_ACCURACY = Convention(
    name="lm-evaluation-harness lambada_openai accuracy in percent",
    text=f"{_LAMBADA}, as processed for GPT-2",
    divides_by="passages; every token of the last word must be the likeliest",
    windows="one passage each, without a start token",
    kind="lambada",
    field="accuracy",
    version=_LAMBADA,
    scale=100.0,
)
HARNESS_LAMBADA_PPL = Convention(
    name="lm-evaluation-harness lambada_openai perplexity",
    text=HARNESS_LAMBADA_ACCURACY.text,
    divides_by="passages; the loss of all tokens of the last word",
    windows=HARNESS_LAMBADA_ACCURACY.windows,
    kind="lambada",
    field="word_ppl",
    version=_LAMBADA,
)
LLM_C = Convention(
    name="llm.c, nats per token",
    text="WikiText-103 test, detokenised",
    divides_by="tokens of the model's vocabulary",
    windows="overlapping",
    kind="wikitext103",
    field="loss",
    stride=32,
)

_GPT2_SIZES = ("117M", "345M", "762M", "1.5B")
TABLE_B1 = {
    ("GPT-2 Small", "SGD"): (8.202, 8.005, 7.922, 7.892, 7.887),
    ("GPT-2 Small", "LION"): (3.659, 3.409, 3.326, 3.293, 3.284),
    ("GPT-2 Medium", "SGD"): (8.029, 7.807, 7.737, 7.715, 7.712),
    ("GPT-2 Medium", "LION"): (3.221, 3.004, 2.918, 2.882, 2.876),
}


def _known() -> list[Published]:
    def add(values: Iterable[float], models: Iterable[str], source: str, convention: Convention) -> None:
        for value, model in zip(values, models, strict=True):
            found.append(Published(value=value, model=model, source=source, convention=convention))

    found: list[Published] = []
    gpt2 = "Radford et al. 2019, table 3"
    add((37.50, 26.37, 22.05, 17.48), (f"GPT-2 {s}" for s in _GPT2_SIZES), gpt2, GPT2_WORD)
    add((29.41, 22.76, 19.93, 18.34), (f"GPT-2 {s}" for s in _GPT2_SIZES), gpt2, GPT2_WIKITEXT2)
    add((45.99, 55.48, 60.12, 63.24), (f"GPT-2 {s}" for s in _GPT2_SIZES), gpt2, GPT2_LAMBADA_ACCURACY)
    add((35.13, 15.60, 10.87, 8.63), (f"GPT-2 {s}" for s in _GPT2_SIZES), gpt2, GPT2_LAMBADA_PPL)
    sizes = ("Megatron-LM 345M", "Megatron-LM 2.5B", "Megatron-LM 8.3B")
    add((19.31, 12.76, 10.81), sizes, "Shoeybi et al. 2019", MEGATRON)
    page = "Hugging Face, Perplexity of fixed-length models"
    add((19.44, 16.45), ("GPT-2 large, stride 1024", "GPT-2 large, stride 512"), page, RAW_JOINED)
    add((29.94,), ("GPT-2 small, stride 1024",), "widely reported for the same recipe", RAW_JOINED)
    harness = "lm-evaluation-harness, wikitext task"
    add((37.3698,), ("gpt2",), harness, HARNESS_WORD)
    add((1.9682,), ("gpt2",), harness, HARNESS_BYTE)
    add((0.9769,), ("gpt2",), harness, HARNESS_BITS)
    harness = "lm-evaluation-harness, lambada_openai task"
    add((32.56,), ("gpt2",), harness, HARNESS_LAMBADA_ACCURACY)
    add((40.06,), ("gpt2",), harness, HARNESS_LAMBADA_PPL)
    add((3.0585,), ("GPT-2 small",), "llm.c discussion 374", LLM_C)
    for (model, optimizer), values in TABLE_B1.items():
        steps = (f"{model}, {optimizer}, step {10_000 * k}" for k in range(1, 6))
        add(values, steps, "Dong, Li, Lin, arXiv 2411.07724, Table B.1", PAPER_LOG)
    return found


PUBLISHED: tuple[Published, ...] = tuple(_known())


def find_published(value: float) -> list[Published]:
    """Returns the published numbers within 0.5 % of a value, the nearest first.

    >>> [(p.model, p.convention.name) for p in find_published(37.5)]
    [('GPT-2 117M', 'GPT-2 paper, WikiText-103'), ('gpt2', 'lm-evaluation-harness word')]
    """
    close = [p for p in PUBLISHED if abs(p.value - value) <= 0.005 * abs(value)]
    return sorted(close, key=lambda p: abs(p.value - value))


def ours(convention: Convention, results: Iterable[Mapping[str, Any]]) -> float | None:
    """Returns our number of a convention from the latest step in the results, or None if there is none."""
    # A result of a shortened text (max_tokens) is never compared: published numbers are of whole texts.
    fitting = [
        r for r in results
        if r.get("kind") == convention.kind
        and r.get(convention.field) is not None
        and r.get("max_tokens") is None
        and str(r.get("text_version", "")).startswith(convention.version)
        and (convention.stride is None or r.get("stride") == (
            r.get("seq_length") if convention.stride == "seq_length" else convention.stride))
    ]  # fmt: skip
    return convention.scale * float(max(fitting, key=lambda r: r["step"])[convention.field]) if fitting else None


def explain(value: float, results: Iterable[Mapping[str, Any]]) -> str:
    """Returns a text that names a published number, its convention, and our number of the same convention.

    Args:
        value: the number as published.
        results: our evaluation results (the JSON objects).
    """
    results = list(results)
    found = find_published(value)
    if not found:
        known = ", ".join(f"{p.value:g}" for p in PUBLISHED if p.convention is not PAPER_LOG)
        return f"{value:g}: no published number near it (known: {known} and the paper's Table B.1)"
    blocks = []
    for published in found:
        convention = published.convention
        mine = ours(convention, results)
        if convention.kind is None:
            here = "not measured here"
        elif mine is None:
            here = f"not measured yet ({convention.field} of a {convention.kind} result)"
        else:
            here = f"{mine:.4f} ({convention.field} of {convention.kind})"
        blocks.append(
            f"{published.value:g}  {published.model}  [{published.source}]\n"
            f"  convention  {convention.name}\n"
            f"  text        {convention.text}\n"
            f"  divided by  {convention.divides_by}\n"
            f"  windows     {convention.windows}\n"
            f"  ours        {here}"
        )
    return "\n\n".join(blocks)
