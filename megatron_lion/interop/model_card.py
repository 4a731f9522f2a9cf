"""The model card of an export: the model, its training, evaluation results and licence note."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_lion.compare.table import markdown_grid
from megatron_lion.config import RunConfig
from megatron_lion.evaluate.stored_results import current_results
from megatron_lion.model.sizes import model_size
from megatron_lion.plain_text import plain
from megatron_lion.runs.paths import evaluations_folder
from megatron_lion.runs.sealed_json import read_sealed


def model_card(run_dir: Path, config: RunConfig, manifest: dict[str, Any], vocab_size: int, dtype: str) -> str:
    """Returns the README.md of an exported model, with the evaluation results of the exported checkpoint.

    Results of another state of the model, such as of weights that had this step's name before, are not listed; one line on
    stderr reports them.

    Args:
        run_dir: the run folder, whose eval/*.json are read.
        config: the run's settings.
        manifest: the checkpoint's manifest.
        vocab_size: size of the vocabulary without padding.
        dtype: dtype of the weights, as torch names it.
    """
    step = int(manifest["step"])
    results = _results(run_dir, manifest)
    size, optimizer, train = model_size(config.model, vocab_size), config.optimizer, config.train
    tokens = step * train.global_batch_size * config.model.seq_length
    kind, library = (
        ("text-generation", "GPT2LMHeadModel")
        if config.model.kind == "gpt2"
        else ("fill-mask", "MegatronBertForPreTraining")
    )
    betas = f", betas {optimizer.resolved_betas()}" if optimizer.name != "sgd" else f", momentum {optimizer.momentum}"
    origin = (
        f"imported from {manifest['source']}, not trained here"
        if manifest.get("source")
        else f"trained from random weights: {step:,} steps of {train.global_batch_size} samples, {tokens:,} tokens, in {train.precision}"
    )
    lines = [
        "---", "library_name: transformers", f"pipeline_tag: {kind}", "license: other",
        "license_name: set-by-the-publisher", "---", "",
        f"# {config.label}", "",
        f"{size.num_parameters_unpadded:,} parameters ({config.model.num_layers} layers, width {config.model.hidden_size}, "
        f"{config.model.num_attention_heads} heads, {config.model.seq_length} positions, {vocab_size:,} tokens), {dtype}; `{library}`.", "",
        "## Training", "",
        f"- {origin}",
        f"- optimizer {optimizer.name}: peak learning rate {optimizer.lr:g}, weight decay {optimizer.weight_decay:g}{betas}, "
        f"gradient clipping at norm {optimizer.clip_grad:g}",
        f"- schedule: {config.schedule.kind}, {train.steps:,} steps, of which {config.warmup_steps} are warm-up",
        f"- data: {_data(config, manifest)}",
        f"- tokenizer: definition with SHA-256 {manifest['tokenizer_sha256']}",
        f"- checkpoint: step {step}, weights with fingerprint {manifest['weights_fingerprint']}", "",
        "## Evaluation", "",
    ]  # fmt: skip
    table = _table(results) if results else "Not yet evaluated on a full text."
    lines += [table]
    stored = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}.get(str(manifest["precision"]))
    if results and stored not in (None, dtype):
        lines += ["", f"Measured with the checkpoint's {stored} weights, before they were converted to {dtype}."]
    lines += [
        "", "## Licence and data", "",
        "The publisher of the weights chooses their licence and sets it at the top of this file. The authors of the training "
        "text own its copyright. The text may contain false or offensive statements, and the model may repeat them.", "",
        "Written by `megatron-lion export` (megatron-lion is under Apache-2.0; this does not apply to the weights).", "",
    ]  # fmt: skip
    # One line each: a name must not add lines to the card or to its front matter.
    return "\n".join(plain(line, keep="\n") if line is table else plain(line) for line in lines)


def _data(config: RunConfig, manifest: dict[str, Any]) -> str:
    names = ", ".join(Path(path).name for path in config.data.path) or "unknown"
    digest = manifest.get("data_digest")
    return f"{names}" + (f" (content hash {digest[:16]})" if digest else "")


def _results(run_dir: Path, manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the results of the checkpoint's state on whole texts."""
    found = []
    for path in sorted(evaluations_folder(run_dir).glob("*.json")):
        try:
            result = read_sealed(path)
        except (OSError, ValueError):
            continue  # a damaged file; `evaluate` measures it again
        if result.get("step") == manifest["step"] and result.get("max_tokens") is None:
            found.append(result)
    return current_results(run_dir, found)


def _table(results: list[dict[str, Any]]) -> str:
    """Returns a Markdown table with one row for each number, with its convention."""
    rows = []
    for result in results:
        version = result["text_version"] if result["text_version"] != "unknown" else Path(result["text_path"]).name
        text = f"{version} ({result['text_sha256'][:8]})"
        windows = f"windows of {result['seq_length']}" + (f", stride {result['stride']}" if result["stride"] else "")
        for field, name in (
            ("log_token_ppl", "loss, nats per token"), ("token_ppl", "perplexity per token"),
            ("adjusted_ppl", "perplexity per original word, Megatron's adjustment"), ("word_ppl", "perplexity per word"),
            ("bits_per_byte", "bits per byte"), ("accuracy", "accuracy of the last word"),
            ("last_token_accuracy", "accuracy of the last word's last token"),
        ):  # fmt: skip
            if result.get(field) is not None:
                rows.append([text, name, f"{result[field]:.4f}", f"{result['kind']}, {windows}, {result['precision']}"])
    return markdown_grid(["text", "measured", "value", "convention"], rows, "llrl")
