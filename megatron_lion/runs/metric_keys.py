"""The keys of metrics.jsonl: unit, the lines that have them, and meaning. docs/reference/metrics.md is made from this table."""

from __future__ import annotations

from typing import NamedTuple

STEP = "every `train.log_every` steps"
TEST = "every `train.test_every` steps"
STEP_BERT = f"{STEP}, for BERT"
TEST_BERT = f"{TEST}, for BERT"
FAILURE = "if a step is skipped or a run fails"
PROBE = "every `probe.every` steps"


class MetricKey(NamedTuple):
    """A key of metrics.jsonl.

    Attributes:
        key: its name.
        unit: unit of its value.
        when: the lines that have it.
        text: its meaning.
    """

    key: str
    unit: str
    when: str
    text: str


METRIC_KEYS = (
    MetricKey("step", "steps", "in each line", "optimizer steps done when the line was written; 0 is before training"),
    MetricKey("time", "seconds", "in each line", "seconds since 1970, clock of the first process"),
    MetricKey("train/loss", "nats per token", STEP, "loss of the step's batch; BERT: sum of both losses"),
    MetricKey("train/mlm_loss", "nats", STEP_BERT, "masked-LM loss of a masked token"),
    MetricKey("train/sop_loss", "nats", STEP_BERT, "sentence-order loss of a sample"),
    MetricKey("train/mlm_accuracy", "share", STEP_BERT, "masked tokens predicted correctly"),
    MetricKey("train/sop_accuracy", "share", STEP_BERT, "sentence orders predicted correctly"),
    MetricKey("valid/loss", "nats per token", TEST, "validation split: the same samples each time, dropout off"),
    MetricKey("test/loss", "nats per token", TEST, "test split: the same samples each time, dropout off"),
    MetricKey("valid/mlm_loss", "nats", TEST_BERT, "as train/mlm_loss, on the validation split"),
    MetricKey("valid/sop_loss", "nats", TEST_BERT, "as train/sop_loss, on the validation split"),
    MetricKey("valid/mlm_accuracy", "share", TEST_BERT, "as train/mlm_accuracy, on the validation split"),
    MetricKey("valid/sop_accuracy", "share", TEST_BERT, "as train/sop_accuracy, on the validation split"),
    MetricKey("test/mlm_loss", "nats", TEST_BERT, "as train/mlm_loss, on the test split"),
    MetricKey("test/sop_loss", "nats", TEST_BERT, "as train/sop_loss, on the test split"),
    MetricKey("test/mlm_accuracy", "share", TEST_BERT, "as train/mlm_accuracy, on the test split"),
    MetricKey("test/sop_accuracy", "share", TEST_BERT, "as train/sop_accuracy, on the test split"),
    MetricKey("optim/lr", "–", STEP, "learning rate of the step"),
    MetricKey("optim/grad_l2", "–", STEP, "l2 norm of the step's gradient before clipping"),
    MetricKey("optim/skipped_steps", "steps", STEP, "steps skipped since the start: NaN, infinity, or no token"),
    MetricKey(
        "optim/nonfinite_gradient",
        "text",
        FAILURE,
        "at a skipped step: place of the first NaN or infinity in the gradient",
    ),
    MetricKey("optim/uncounted", "text", FAILURE, "at a skipped step: the loss that counted no token"),
    MetricKey("optim/zero_gradient", "1", FAILURE, "at the first such step in a row: the gradient was exactly zero"),
    MetricKey(
        "optim/nonfinite_state",
        "text",
        FAILURE,
        "at the end of a failed run: NaN or infinity in weights or optimizer state",
    ),
    MetricKey("optim/gave_up", "1 or 0", FAILURE, "at the end of a failed run: 1: the run diverged"),
    MetricKey("perf/tokens_per_s", "tokens/s", STEP, "of all processes, training steps alone, since the line before"),
    MetricKey("perf/mfu", "share", STEP, "model FLOPs utilization, on a known GPU; as in PaLM, appendix B"),
    MetricKey("memory/max_gib", "GiB", STEP, "largest memory of the first process so far"),
    MetricKey("progress/consumed_samples", "samples", STEP, "training samples read so far"),
    MetricKey("progress/consumed_tokens", "tokens", STEP, "training tokens read so far"),
    MetricKey("probe/loss", "nats per token", PROBE, "mean loss over the batches of the probe"),
    MetricKey("probe/loss_standard_error", "nats", PROBE, "standard error of probe/loss; 0 if all samples were read"),
    MetricKey("probe/grad_l1", "–", PROBE, "‖∇f‖₁ of the mean gradient"),
    MetricKey("probe/grad_l2", "–", PROBE, "‖∇f‖₂ of the mean gradient"),
    MetricKey("probe/grad_linf", "–", PROBE, "largest |∇f| of a coordinate"),
    MetricKey("probe/grad_dot_theta", "–", PROBE, "⟨∇f, θ⟩"),
    MetricKey("probe/norm_ratio", "–", PROBE, "r = ‖∇f‖₁/‖∇f‖₂, between 1 and √d"),
    MetricKey("probe/norm_ratio_over_sqrt_d", "–", PROBE, "r/√d, at most 1"),
    MetricKey("probe/norm_ratio_standard_error", "–", PROBE, "standard error of r over other batches; null if unknown"),
    MetricKey("probe/norm_ratio_low", "–", PROBE, "lower bound on r without noise; null if the signal is not resolved"),
    MetricKey("probe/norm_ratio_low_standard_error", "–", PROBE, "standard error of this bound"),
    MetricKey(
        "probe/norm_ratio_high", "–", PROBE, "upper bound on r without noise; null if the signal is not resolved"
    ),
    MetricKey("probe/norm_ratio_high_standard_error", "–", PROBE, "standard error of this bound"),
    MetricKey(
        "probe/norm_ratio_noise", "–", PROBE, "r of the noise in the mean gradient; 0.798 √d if it is normal and even"
    ),
    MetricKey("probe/norm_ratio_noise_standard_error", "–", PROBE, "standard error of the noise's r; null if unknown"),
    MetricKey("probe/norm_ratio_one_batch", "–", PROBE, "r of the first batch alone"),
    MetricKey("probe/norm_ratio_gaussian", "–", PROBE, "0.798 √d, the r of pure Gaussian noise"),
    MetricKey("probe/kkt_residual", "–", PROBE, "λ⟨∇f, θ⟩ + ‖∇f‖₁ with each group's λ; null without weight decay"),
    MetricKey("probe/theta_linf", "–", PROBE, "‖θ‖∞"),
    MetricKey("probe/box_fraction", "share", PROBE, "decayed weights with |θ| ≥ 0.99/λ"),
    MetricKey("probe/num_parameters", "coordinates", PROBE, "d, padded rows of the vocabulary included"),
    MetricKey("probe/sqrt_d", "–", PROBE, "√d"),
    MetricKey("probe/num_parameters_unpadded", "coordinates", PROBE, "d without padded rows of the vocabulary"),
    MetricKey("probe/norm_ratio_unpadded_over_sqrt_d", "–", PROBE, "r/√d without padded rows"),
    MetricKey("probe/num_parameters_without_embeddings", "coordinates", PROBE, "d without the embeddings"),
    MetricKey("probe/norm_ratio_without_embeddings_over_sqrt_d", "–", PROBE, "r/√d without the embeddings"),
    MetricKey("probe/norm_ratio_without_embeddings_low", "–", PROBE, "lower bound on r without noise and embeddings"),
    MetricKey("probe/norm_ratio_without_embeddings_high", "–", PROBE, "upper bound on r without noise and embeddings"),
    MetricKey("probe/norm_ratio_without_embeddings_noise", "–", PROBE, "r of the noise without the embeddings"),
    MetricKey(
        "probe/grad_l2_corrected", "–", PROBE, "‖∇f‖₂ without noise; 0 if the estimate of its square is negative"
    ),
    MetricKey("probe/signal_standard_error", "–", PROBE, "standard error of the corrected ‖∇f‖₂²"),
    MetricKey(
        "probe/noise_share", "share", PROBE, "noise in the squared norm of the mean gradient; about 1 is pure noise"
    ),
    MetricKey("probe/noise_share_standard_error", "share", PROBE, "its standard error"),
    MetricKey("probe/noise_variance", "–", PROBE, "σ², E‖g − ∇f‖₂² of one global batch"),
    MetricKey("probe/noise_variance_standard_error", "–", PROBE, "its standard error"),
    MetricKey("probe/noise_scale_samples", "samples", PROBE, "noise scale σ²/‖∇f‖₂² times the batch size"),
    MetricKey("probe/noise_scale_standard_error", "samples", PROBE, "its standard error"),
    MetricKey("probe/descent_share_low", "share", PROBE, "LION: ⟨∇f, sign(c)⟩/‖∇f‖₁, with the upper bound on ‖∇f‖₁"),
    MetricKey("probe/descent_share_high", "share", PROBE, "LION: the same with the lower bound on ‖∇f‖₁"),
    MetricKey("probe/sign_agreement_share", "share", PROBE, "LION: coordinates whose direction has the sign of ḡ"),
    MetricKey("probe/sign_flip_share", "share", PROBE, "LION: signs that change from one step to the next, θ fixed"),
    MetricKey("probe/noise_groups", "groups", PROBE, "groups of batches that the standard errors are computed from"),
    MetricKey("probe/num_batches", "batches", PROBE, "global batches in the mean"),
    MetricKey("probe/is_moving", "1 or 0", PROBE, "1: mean of the last training gradients (`probe.mode moving`)"),
    MetricKey("probe/seconds", "seconds", PROBE, "wall time of the probe"),
)
