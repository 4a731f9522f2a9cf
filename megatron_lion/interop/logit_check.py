"""Compares a run's logits with those that transformers computes from a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_lion.errors import CheckpointError, MegatronLionError
from megatron_lion.evaluate.hf_errors import cause, importing_transformers, refusal
from megatron_lion.evaluate.open_run import RestoredRun

LOGIT_TOLERANCE = 1e-5
"""Largest allowed difference of two fp32 logits over the largest logit; the two networks add in different orders."""


@torch.no_grad()
def compare_logits(run: RestoredRun, folder: Path, class_name: str, shown: Path) -> float:
    """Returns the largest difference between a run's logits and transformers', divided by the largest logit.

    Args:
        run: a run in fp32 with loaded weights, on one process.
        folder: the folder that transformers loads.
        class_name: the class of transformers that loads it.
        shown: the folder's name in messages.

    Raises:
        CheckpointError: transformers cannot load the folder, or the difference exceeds LOGIT_TOLERANCE, so it is not
            rounding.
    """
    with importing_transformers():
        import transformers
        from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        other = getattr(transformers, class_name).from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, use_safetensors=True
        )
    except MegatronLionError:  # a stop signal
        raise
    except Exception as error:  # transformers raises many unrelated classes for files that it rejects
        raise refusal(
            error,
            f"{shown}: transformers cannot load it ({cause(error)}), so the logits cannot be compared; save it again with "
            "save_pretrained, or give --check false",
        ) from None
    other.eval()
    # A fixed seed on the CPU: every check of a checkpoint compares the same tokens and prints the same difference.
    generator = torch.Generator().manual_seed(0)
    length = min(run.seq_length, 64)
    tokens_BS = torch.randint(run.vocab_size, (2, length), generator=generator)
    if run.config.model.kind == "gpt2":
        pairs = [(run.logits(tokens_BS.to(run.device.torch_device), length), other(tokens_BS).logits)]
    else:
        # The second half is a second passage, so the token-type embedding is compared too.
        types_BS = (torch.arange(length) >= length // 2).long().repeat(2, 1)
        theirs = other(tokens_BS, token_type_ids=types_BS, attention_mask=torch.ones_like(tokens_BS))
        rows = [
            run.bert_logits(tokens_BS[row : row + 1], types_BS[row : row + 1], list(range(length))) for row in range(2)
        ]
        pairs = [
            (torch.stack([logits for logits, _ in rows]), theirs.prediction_logits),
            (torch.stack([order for _, order in rows]), theirs.seq_relationship_logits),
        ]
    worst = max(
        float((ours.cpu().float() - given).abs().max() / given.abs().max().clamp(min=1.0)) for ours, given in pairs
    )
    if not worst <= LOGIT_TOLERANCE:  # negated, so that NaN fails too
        raise CheckpointError(
            f"{shown}: transformers computes other logits from these weights (relative difference {worst:.2g}); nothing was written; "
            "please report this"
        )
    return worst
