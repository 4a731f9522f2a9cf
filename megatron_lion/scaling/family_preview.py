"""`scaling --dry-run`: sizes, rates, tokens and FLOP of a family before it is trained."""

from __future__ import annotations

from megatron_lion.compare.table import Cell, Table
from megatron_lion.config import ModelConfig
from megatron_lion.configfile import load_config
from megatron_lion.model.sizes import VOCAB_SIZES, flops_per_token, model_size
from megatron_lion.reproduce.recipes import VOCAB_SIZE
from megatron_lion.reproduce.sources import Sources
from megatron_lion.runs.record import OPTIMIZER_NAMES
from megatron_lion.scaling.family import Family, scaled_recipe
from megatron_lion.scaling.family_steps import config_path, is_trained


def preview(family: Family, sources: Sources) -> tuple[Table, str]:
    """A table of the models, and lines on the cost of trainings and probes. No time is estimated.

    A probe's cost is known after it: its batches follow from the measured noise. The lines give the least and the most.

    Args:
        family: the family.
        sources: text, tokenizer and output folder.
    """
    config = load_config(config_path(family))
    vocab = VOCAB_SIZE if sources.tokenizer is None and family.scale == "tiny" else VOCAB_SIZES["gpt2"]
    rows: list[list[Cell]] = []
    per_token = {}
    for shape in family.shapes:
        model: ModelConfig = family.model(shape, config.model)
        size, per_token[shape] = model_size(model, vocab), flops_per_token(model, vocab)
        rates = [scaled_recipe(recipe, shape.width, family.base_width).lr for recipe in family.recipes]
        rows.append([
            shape.width, shape.depth, model.num_attention_heads, size.num_parameters,
            size.num_parameters - size.embedding_parameters, per_token[shape], *rates,
        ])  # fmt: skip
    names = [f"lr {OPTIMIZER_NAMES[recipe.optimizer]}" for recipe in family.recipes]
    table = Table(
        slug="family", title="Models", columns=["width", "depth", "heads", "d", "d w/o emb.", "FLOP/token", *names],
        rows=rows, num_keys=1, formats={"FLOP/token": ".3g"} | dict.fromkeys(names, ".3g"),
        notes=[f"with a vocabulary of {vocab:,} ids"],
    )  # fmt: skip
    runs = family.runs()
    left = [run for run in runs if not is_trained(family, run, sources.output)]
    batch = config.train.global_batch_size * config.model.seq_length
    tokens, points = family.steps * batch, len(family.measure_at)
    longer = sum(step > 0 for step in family.measure_at)
    most = "all" if family.max_batches == "all" else f"{family.max_batches:,}"
    flops = sum(per_token[run.shape] for run in left) * tokens
    steps = ", ".join(f"{step:,}" for step in family.measure_at)
    first = points * family.first_batches * batch
    lines = [
        f"runs       {len(runs)}: {len(family.shapes)} models, {len(family.recipes)} optimizers, {len(family.seeds)} seeds; "
        f"{len(left)} to train",
        f"training   {family.steps:,} steps of {batch:,} tokens = {tokens:,} tokens a run; {len(left) * tokens:,} tokens, {flops:.3g} FLOP",
        f"probes     steps {steps} of each run: {family.first_batches} batches each = {len(runs) * first:,} tokens, "
        f"{sum(per_token[run.shape] for run in runs) * first:.3g} FLOP",
        f"           then up to {most} batches at {longer} of these steps, until the noise share is at most {family.noise_share:.0%}"
        + _most_cost(family, batch, longer, sum(per_token[run.shape] for run in runs)),
    ]
    return table, "\n".join(lines) + "\n"


def _most_cost(family: Family, batch: int, longer: int, flops: float) -> str:
    """The largest cost of longer probes, if all need the most batches at once; those of a whole data set are not known."""
    if family.max_batches == "all":
        return ""
    tokens = longer * family.max_batches * batch
    return (
        f": at most {len(family.runs()) * tokens:,} tokens and {flops * tokens:.3g} FLOP if each needs one such probe"
    )
