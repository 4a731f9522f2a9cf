"""Claims on r = Θ(√d) over models of different d, from the scaling.json of `megatron-lion scaling`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_lion.errors import CheckpointError, DataError
from megatron_lion.files import read_own
from megatron_lion.reproduce.artefacts import Plan
from megatron_lion.reproduce.claim import Claim
from megatron_lion.runs.record import OPTIMIZER_NAMES

FORMAT = 1
_PARTS = {"all": "all parameters", "without_embeddings": "without embeddings"}


def scaling_claims(plan: Plan) -> list[Claim]:
    """One statement for each optimizer, measured step, and part (the whole model, and the model without embeddings).

    Raises:
        CheckpointError: the family was not measured.
        DataError: scaling.json is damaged or of another format.
    """
    words = plan.steps[-1].words
    path = Path(words[words.index("--output") + 1]) / "scaling.json"
    try:
        content = json.loads(read_own(path))
        if content["format"] != FORMAT:
            raise DataError(f"{path}: not a result of format {FORMAT}")
        return [_claim(content, fit) for fit in content["fits"] if fit["part"] in _PARTS]
    except FileNotFoundError:
        raise CheckpointError(f"{path}: does not exist; give the same command again") from None
    except (ValueError, KeyError, TypeError, OSError):
        raise DataError(f"{path}: damaged; delete it and give the same command again; finished runs are kept") from None


def _claim(content: dict[str, Any], fit: dict[str, Any]) -> Claim:
    exponent, measured, verdict = fit["exponent"], fit["measured"], fit["verdict"]
    settings = content["settings"]
    sizes = [mean["d"] for mean in fit["sizes"]]
    if exponent["low"] is None:
        ours = f"measured r: b = {measured['slope']:.2f}, noise not removed ({exponent['reason']})"
    else:
        ours = (
            f"b inside {exponent['low']:.2f} to {exponent['high']:.2f} (the bounds on r leave {exponent['set_low']:.2f} to "
            f"{exponent['set_high']:.2f}); measured r: b = {measured['slope']:.2f}"
        )
    if fit["noise_shares"] is not None:
        ours += "; noise share {:.0%}–{:.0%}".format(*fit["noise_shares"])
    return Claim(
        what=f"r ∝ d^b with b = ½: {OPTIMIZER_NAMES[fit['optimizer']]}, {_PARTS[fit['part']]}, step {fit['step']:,}",
        paper="r = Θ(√d)",
        ours=ours,
        tolerance="the 95 % interval inside ½ ± 0.1; does not hold if it excludes ½",
        holds={"holds": True, "does not hold here": False}.get(verdict),
        is_resolved=verdict != "not resolved",
        convention=f"{len(sizes)} models of d = {min(sizes):,} to {max(sizes):,}, {len(settings['seeds'])} seeds, "
        f"{settings['steps']:,} steps each; docs/scaling.md",
    )
