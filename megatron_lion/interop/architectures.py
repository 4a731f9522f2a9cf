"""Which Hugging Face architecture a run fits; no torch, so that a wrong wish is refused at once."""

from __future__ import annotations

from megatron_lion.errors import ConfigError

ARCHITECTURES = {"gpt2": "gpt2", "megatron-bert": "bert"}


def check_architecture(wanted: str, kind: str) -> None:
    """Refuses a Hugging Face architecture that a kind of run does not fit.

    Raises:
        ConfigError: says why, and what fits.
    """
    if wanted == "bert":
        raise ConfigError(
            "--architecture bert: Hugging Face's BERT normalises after each block, this one before it (pre-LN), so its weights mean "
            "something else there; export as megatron-bert"
        )
    if wanted != "auto" and ARCHITECTURES[wanted] != kind:
        fits = next(name for name, ours in ARCHITECTURES.items() if ours == kind)
        raise ConfigError(f"--architecture {wanted}: the run is a {kind}; leave it out, or give {fits}")
