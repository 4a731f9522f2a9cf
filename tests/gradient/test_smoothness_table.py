"""Which checkpoints can be stepped from, and what the table of `probe --smoothness` states beside its numbers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from tiny import tiny_config

from megatron_lion.errors import ConfigError
from megatron_lion.gradient.smoothness_table import smoothness_table
from megatron_lion.train.smoothness_checkpoints import choose_checkpoints


def test_checkpoints_without_state_and_near_the_end_are_left_out_with_a_reason(monkeypatch):
    layouts = {"step_0000002": None, "step_0000004": "fully_reshardable", "step_0000006": "fully_reshardable"}
    opened = "megatron_lion.train.smoothness_checkpoints.open_checkpoint"
    monkeypatch.setattr(opened, lambda folder: SimpleNamespace(manifest={"state_layout": layouts[folder.name]}))
    config = tiny_config("run", "corpus", train__steps=6)
    assert choose_checkpoints(config, [2, 4, 6], 1) == (
        [4],
        ["step 2 holds no optimizer state", "the run ends at step 6, 0 step(s) after step 6, and 1 are needed"],
    )
    with pytest.raises(ConfigError, match="step 2 holds no optimizer state; give --steps of another checkpoint"):
        choose_checkpoints(config, [2], 1)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"skipped_steps": 1}, "step 7: some of the steps were skipped"),
        ({"loss_change": None}, "step 7: the loss or its gradient is not finite"),
        ({"all": {"step_linf": 0.0}}, "step 7: no weight changed"),
        ({"all": {"num_groups": 3}}, "step 7: too few batches for a standard error"),
        ({"all": {"is_resolved": False}}, "step 7: the change of the gradient is not resolved from noise"),
        ({"precision": "bf16"}, "in bf16, weights and activations are rounded"),
    ],
)
def test_the_table_states_what_a_row_cannot_show(changes, text):
    part = dict.fromkeys(
        ("step_linf", "step_l2", "smoothness_linf_low", "smoothness_linf_high", "smoothness_l2", "change_l1",
         "smoothness_l2_standard_error", "noise_share"), 0.5,
    ) | {"num_groups": 8, "is_resolved": True}  # fmt: skip
    content = dict.fromkeys(("loss_change", "first_order_change", "curvature", "curvature_standard_error"), 0.5) | {
        "step": 7, "num_steps": 2, "skipped_steps": 0, "precision": "fp32",
    }  # fmt: skip
    own = {**content, **changes, "all": part | changes.get("all", {})}
    assert len(smoothness_table([{**content, "all": part}]).notes) == 1
    notes = smoothness_table([own]).notes[1:]
    assert len(notes) == 1
    assert text in notes[0]
    assert "in bf16 (train.acc" in smoothness_table([{**content, "all": part}], has_bf16_gradients=True).notes[1]
