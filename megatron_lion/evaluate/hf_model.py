"""A Hugging Face GPT-2 folder to evaluate: published weights, or an export of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_lion.data.tokenizers import Tokenizer, load_tokenizer
from megatron_lion.errors import CheckpointError, MegatronLionError
from megatron_lion.evaluate.hf_errors import cause, importing_transformers, refusal
from megatron_lion.evaluate.hf_files import model_sha256, unread_weights, weight_files
from megatron_lion.evaluate.token_scores import LogitsScorer
from megatron_lion.streams import say


class HuggingFaceModel:
    """A folder with one set of weights, on one process, with the interface that evaluation expects of a run.

    Attributes:
        folder: the model folder.
        model: transformers' GPT2LMHeadModel.
        tokenizer: the folder's tokenizer, or the one given instead.
        device: the device of the model.
        seq_length: the model's context length in tokens.
        steps: [0], for the one set of weights.
        rank, world_size: 0 and 1.
    """

    rank = 0
    world_size = 1

    def __init__(self, folder: Path, model: Any, tokenizer: Tokenizer, device: torch.device) -> None:
        self.folder, self.model, self.tokenizer, self.device = folder, model, tokenizer, device
        self.seq_length = int(model.config.n_positions)
        self.steps = [0]
        self._sha256: str | None = None

    def load(self, step: int) -> None:
        """Does nothing: `open_huggingface` has loaded the weights."""

    def state_sha256(self, step: int) -> str:
        """Returns one SHA-256 over the weight files and config.json, which determine the logits."""
        if self._sha256 is None:
            self._sha256 = model_sha256(self.folder)
        return self._sha256

    def scorer(self) -> LogitsScorer:
        """Returns the scorer of batches of tokens."""
        return LogitsScorer(self.hidden, self.device, self.model.lm_head)

    def hidden(self, tokens_BS: Tensor, last: int) -> Tensor:
        """Returns the hidden states [B, last, H] before the output layer; the arguments are those of `logits`."""
        return self.model.transformer(tokens_BS, use_cache=False).last_hidden_state[:, -last:]

    def logits(self, tokens_BS: Tensor, last: int) -> Tensor:
        """Returns the logits [B, last, V] after the last `last` of the tokens [B, S] (int64, on the model's device).

        The output layer, a third of GPT-2 Small's work, runs for these positions alone.
        """
        return self.model(tokens_BS, logits_to_keep=last, use_cache=False).logits

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Returns the values unchanged, because there is one process."""
        return values


@contextmanager
def open_huggingface(
    folder: str | Path, *, device: str = "auto", precision: str = "fp32", tokenizer: str | None = None
) -> Iterator[HuggingFaceModel]:
    """Opens a folder that `GPT2LMHeadModel.from_pretrained` reads; never downloads.

    Args:
        folder: a folder with config.json, model.safetensors, and vocab.json + merges.txt or tokenizer.json.
        device: "auto", "cuda" or "cpu".
        precision: "fp32" or "bf16", the dtype of weights and forward pass.
        tokenizer: a tokenizer to use instead of the folder's own.

    Yields:
        The model in evaluation mode.

    Raises:
        CheckpointError: the folder has no GPT-2 model in safetensors, or transformers cannot load all its weights.
        DataError: no tokenizer is found.
    """
    with importing_transformers():
        from transformers import GPT2Config, GPT2LMHeadModel
        from transformers.utils import logging as transformers_logging

    folder = Path(folder)
    weight_files(folder)  # raises if there are none
    if (note := unread_weights(folder)) is not None:
        say(note)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    try:
        config = GPT2Config.from_pretrained(folder, local_files_only=True)
        model, notes = GPT2LMHeadModel.from_pretrained(
            folder, config=config, dtype=dtype, local_files_only=True, output_loading_info=True, use_safetensors=True,
            ignore_mismatched_sizes=True,
        )  # fmt: skip
    except MegatronLionError:  # a stop signal
        raise
    except Exception as error:  # transformers raises many unrelated classes for files that it rejects
        raise refusal(error, f"{folder}: not a GPT-2 model that transformers can load: {cause(error)}") from None
    for name, stored, needed in sorted(notes["mismatched_keys"]):  # transformers' own error does not name them
        raise CheckpointError(
            f"{folder}: {name} has shape {tuple(stored)}, but config.json gives {tuple(needed)}; use the weights and the config.json "
            "of one model"
        )
    if config.model_type != "gpt2" or notes["missing_keys"]:
        missing = ", ".join(sorted(map(str, notes["missing_keys"]))[:3]) or config.model_type
        raise CheckpointError(
            f"{folder}: not a complete GPT-2 language model (missing weights, or the model type: {missing})"
        )
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    loaded = load_tokenizer(tokenizer or folder)
    if loaded.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer has {loaded.vocab_size} ids, the model {config.vocab_size}; give --tokenizer"
        )
    yield HuggingFaceModel(folder, model.eval().to(kind), loaded, torch.device(kind))
