"""Result of a probe: the values for metrics.jsonl and the content of RUN/probe/step_0001000.json."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from megatron_lion.gradient.noise import NoiseEstimate, Rung, as_dict
from megatron_lion.gradient.norms import GAUSSIAN_RATIO, NormTable
from megatron_lion.gradient.parameter_kinds import is_padding, kind_of, layer_of
from megatron_lion.runs.probes import FORMAT


@dataclass(frozen=True)
class ProbeResult:
    """A probe of one step.

    Attributes:
        step: number of optimizer steps before the probe.
        mode: "frozen" (gradient at one point) or "moving" (mean of the last training steps' gradients).
        data: "fixed", "fresh" or "test" samples; "training" for a moving window.
        dropout: whether dropout was on.
        num_batches, num_samples, num_tokens: size of the average.
        loss, loss_standard_error: mean loss (nats per token) and its standard error from the spread between batches; 0 if
            every sample of the data set was read.
        table: sums and peaks of each parameter.
        seconds: wall time.
        rungs: the ladder, empty if it is switched off.
        noise: signal and noise, or None if they cannot be separated.
        noise_by_part: the same for parts of the model, from `noise_by_part`, or None.
        signs: statistics of the signs of LION's update direction, from `sign_statistics`, or None.
        facts: further facts for the reader, such as the layout and which weights θ is.
    """

    step: int
    mode: str
    data: str
    dropout: bool
    num_batches: int
    num_samples: int
    num_tokens: int
    loss: float
    loss_standard_error: float | None
    table: NormTable
    seconds: float
    rungs: tuple[Rung, ...] = ()
    noise: NoiseEstimate | None = None
    noise_by_part: dict[str, Any] | None = None
    signs: dict[str, Any] | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def metrics(self) -> dict[str, Any]:
        """Returns values for metrics.jsonl by key probe/…; an undefined value is None."""
        norms = self.table.norms()
        unpadded = self.table.norms(lambda name: not is_padding(name))
        inner = self.table.norms(lambda name: kind_of(name) != "embedding")
        noise = self.noise
        signs = (self.signs or {}).get("all") or {}
        inner_noise = (self.noise_by_part or {}).get("without_embeddings") or {}
        return {
            "probe/loss": self.loss,
            "probe/loss_standard_error": self.loss_standard_error,
            "probe/grad_l1": norms.grad_l1,
            "probe/grad_l2": norms.grad_l2,
            "probe/grad_linf": norms.grad_linf,
            "probe/grad_dot_theta": norms.grad_dot_theta,
            "probe/norm_ratio": norms.norm_ratio,
            "probe/norm_ratio_over_sqrt_d": norms.norm_ratio_over_sqrt_d,
            "probe/norm_ratio_standard_error": self.rungs[-1].norm_ratio_standard_error if self.rungs else None,
            "probe/norm_ratio_low": noise.norm_ratio_low if noise else None,
            "probe/norm_ratio_low_standard_error": noise.norm_ratio_low_standard_error if noise else None,
            "probe/norm_ratio_high": noise.norm_ratio_high if noise else None,
            "probe/norm_ratio_high_standard_error": noise.norm_ratio_high_standard_error if noise else None,
            "probe/norm_ratio_noise": noise.norm_ratio_noise if noise else None,
            "probe/norm_ratio_noise_standard_error": noise.norm_ratio_noise_standard_error if noise else None,
            "probe/norm_ratio_one_batch": self.rungs[0].norm_ratio if self.rungs else None,
            "probe/norm_ratio_gaussian": GAUSSIAN_RATIO * math.sqrt(norms.num_parameters),
            "probe/kkt_residual": norms.kkt_residual,
            "probe/theta_linf": norms.theta_linf,
            "probe/box_fraction": norms.box_fraction,
            "probe/num_parameters": norms.num_parameters,
            "probe/sqrt_d": math.sqrt(norms.num_parameters),
            "probe/num_parameters_unpadded": unpadded.num_parameters,
            "probe/norm_ratio_unpadded_over_sqrt_d": unpadded.norm_ratio_over_sqrt_d,
            "probe/num_parameters_without_embeddings": inner.num_parameters,
            "probe/norm_ratio_without_embeddings_over_sqrt_d": inner.norm_ratio_over_sqrt_d,
            "probe/norm_ratio_without_embeddings_low": inner_noise.get("norm_ratio_low"),
            "probe/norm_ratio_without_embeddings_high": inner_noise.get("norm_ratio_high"),
            "probe/norm_ratio_without_embeddings_noise": inner_noise.get("norm_ratio_noise"),
            "probe/grad_l2_corrected": noise.grad_l2_corrected if noise else None,
            "probe/signal_standard_error": noise.signal_standard_error if noise else None,
            "probe/noise_share": noise.noise_share if noise else None,
            "probe/noise_share_standard_error": noise.noise_share_standard_error if noise else None,
            "probe/noise_variance": noise.noise_variance if noise else None,
            "probe/noise_variance_standard_error": noise.noise_variance_standard_error if noise else None,
            "probe/noise_scale_samples": noise.noise_scale_samples if noise else None,
            "probe/noise_scale_standard_error": noise.noise_scale_standard_error if noise else None,
            "probe/descent_share_low": signs.get("descent_share_low"),
            "probe/descent_share_high": signs.get("descent_share_high"),
            "probe/sign_agreement_share": signs.get("agreement_share"),
            "probe/sign_flip_share": signs.get("flip_share"),
            "probe/noise_groups": noise.num_groups if noise else None,
            "probe/num_batches": self.num_batches,
            "probe/is_moving": int(self.mode == "moving"),
            "probe/seconds": round(self.seconds, 3),
        }

    def as_dict(self) -> dict[str, Any]:
        """Returns the full result, ready for JSON."""
        table = self.table
        content = {
            "format": FORMAT, "step": self.step, "mode": self.mode, "data": self.data, "dropout": self.dropout,
            "num_batches": self.num_batches, "num_samples": self.num_samples, "num_tokens": self.num_tokens,
            "loss": self.loss, "loss_standard_error": self.loss_standard_error, "seconds": round(self.seconds, 3), **self.facts,
            "kkt": "defined" if table.norms().kkt_residual is not None else "undefined: no parameter has a weight decay λ",
            "all": table.norms().as_dict(),
            "without_padding": table.norms(lambda name: not is_padding(name)).as_dict(),
            "without_embeddings": table.norms(lambda name: kind_of(name) != "embedding").as_dict(),
            "ladder": [as_dict(rung) for rung in self.rungs],
            "noise": as_dict(self.noise) if self.noise else None,
            "noise_by_part": self.noise_by_part,
            "signs": self.signs,
            "layers": {name: norms.as_dict() for name, norms in table.grouped(layer_of).items()},
            "kinds": {name: norms.as_dict() for name, norms in table.grouped(kind_of).items()},
            "parameters": {name: norms.as_dict() for name, norms in table.grouped(lambda name: name).items()},
        }  # fmt: skip
        return {key: finite_only(value) for key, value in content.items()}


def finite_only(value: Any) -> Any:
    """JSON has no NaN and no infinity: both become null."""
    if isinstance(value, dict):
        return {key: finite_only(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_only(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
