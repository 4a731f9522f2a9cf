"""Opens a run for reading: its model at any step, on any number of processes, without optimizer or data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_lion.config import ParallelConfig, RunConfig
from megatron_lion.data.tokenizers import Tokenizer, load_tokenizer
from megatron_lion.device import Device, select_device
from megatron_lion.errors import CheckpointError, DataError
from megatron_lion.evaluate.token_scores import LogitsScorer
from megatron_lion.model.build import build_model
from megatron_lion.optim.parameter_shards import named_global_parameters
from megatron_lion.parallel import Ranks, agree, all_reduce_sum, process_groups
from megatron_lion.runs.folder import read_config
from megatron_lion.runs.paths import tokenizer_folder
from megatron_lion.runs.steps import Checkpoint, list_steps, open_checkpoint, step_folder
from megatron_lion.train.checkpoint import verify_checkpoint
from megatron_lion.train.checkpoint_tensors import read_tensors
from megatron_lion.train.model_state import load_model_tensors, model_sharded_state, unwrap


class RestoredRun:
    """A run's network, ready to score text. Made by `open_run`.

    Attributes:
        config: of the run, on this job's layout: every process holds the whole model and takes a share of the text.
        tokenizer: of the run's data.
        seq_length: longest window (tokens).
        steps: of the complete checkpoints, ascending.
        ranks: this process's place.
    """

    def __init__(self, run_dir: Path, config: RunConfig, tokenizer: Tokenizer, device: Device, ranks: Ranks) -> None:
        self.run_dir, self.config, self.tokenizer, self.device, self.ranks = run_dir, config, tokenizer, device, ranks
        self.seq_length = config.model.seq_length
        self.steps = list_steps(run_dir)
        self.vocab_size = 0
        self._model: list[Any] | None = None

    @property
    def rank(self) -> int:
        return self.ranks.rank

    @property
    def world_size(self) -> int:
        return self.ranks.world_size

    def manifest(self, step: int) -> dict[str, Any]:
        """A checkpoint's manifest.

        Raises:
            CheckpointError: no complete checkpoint of that step.
        """
        if step not in self.steps:
            known = ", ".join(map(str, self.steps)) or "none"
            raise CheckpointError(f"{self.run_dir}: no complete checkpoint of step {step} (there are: {known})")
        return open_checkpoint(step_folder(self.run_dir, step)).manifest

    def state_sha256(self, step: int) -> str:
        """What identifies the weights of a step: their layout-independent fingerprint."""
        return str(self.manifest(step)["weights_fingerprint"])

    def load(self, step: int) -> None:
        """Verifies a checkpoint and loads its weights; a collective call.

        Raises:
            CheckpointError: it is missing, damaged or of another model.
            DataError: it was trained with another tokenizer than the run folder holds.
        """
        manifest = self.manifest(step)
        checkpoint = Checkpoint(step_folder(self.run_dir, step), manifest)
        with agree("checking the tokenizer"):
            if manifest["tokenizer_sha256"] not in (None, self.tokenizer.sha256):
                raise DataError(
                    f"{self.run_dir}: trained with tokenizer {manifest['tokenizer_sha256'][:12]}, given is "
                    f"{self.tokenizer.sha256[:12]}; use the run's own (leave --tokenizer out)"
                )
        verify_checkpoint(checkpoint, self.ranks)
        if self._model is None:
            self.vocab_size = int(manifest["model"]["vocab_size"])
            self._model = build_model(self.config, self.device, self.vocab_size)
        loaded = read_tensors({"model": model_sharded_state(self._model)}, checkpoint.folder)
        load_model_tensors(self._model, loaded["model"])
        for chunk in self._model:
            chunk.eval()

    def named_weights(self) -> dict[str, torch.Tensor]:
        """The loaded parameters by their names over the whole model; not copies."""
        if self._model is None:
            raise CheckpointError("load a step first")
        return {name: tensor.detach() for name, tensor in named_global_parameters(unwrap(self._model[0]))}

    @torch.no_grad()
    def round_weights(self, dtype: torch.dtype) -> None:
        """Rounds the loaded weights to a dtype and keeps them in their own: what a file of that dtype would give back."""
        for tensor in self.named_weights().values():
            tensor.copy_(tensor.to(dtype))

    def scorer(self) -> LogitsScorer:
        """Scores batches of tokens with the loaded weights."""
        return LogitsScorer(self.logits, self.device.torch_device)

    @torch.no_grad()
    def logits(self, tokens_BS: torch.Tensor, last: int) -> torch.Tensor:
        """Logits after the last `last` tokens [B, last, V]; the output layer runs for those alone.

        V is the real vocabulary: the rows that pad the embedding belong to no token and get no probability.
        """
        if self._model is None:
            raise CheckpointError("load a step before scoring")
        network = unwrap(self._model[0])
        positions = torch.arange(tokens_BS.shape[1], device=tokens_BS.device).expand_as(tokens_BS)
        hidden_SBH = network.decoder(hidden_states=network.embedding(tokens_BS, positions), attention_mask=None)
        logits_SBV, _ = network.output_layer(hidden_SBH[-last:], weight=network.shared_embedding_or_output_weight())
        return logits_SBV[..., : self.vocab_size].transpose(0, 1)

    @torch.no_grad()
    def bert_logits(
        self, tokens_1S: torch.Tensor, types_1S: torch.Tensor, places: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits over the real vocabulary at M places [M, V] and of the order (as it is, swapped) [2], of a BERT run."""
        if self._model is None:
            raise CheckpointError("load a step before scoring")
        where = self.device.torch_device
        tokens_1S, types_1S = tokens_1S.to(where), types_1S.to(where)
        positions_1M = torch.tensor([places], device=where)
        logits_1MV, order_12 = unwrap(self._model[0])(tokens_1S, torch.ones_like(tokens_1S), types_1S, positions_1M)
        return logits_1MV[0, :, : self.vocab_size], order_12[0]

    def all_reduce_sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sums over all processes, in place; float64 stays float64."""
        moved = values.to(self.device.torch_device)
        return values.copy_(all_reduce_sum(moved))


@contextmanager
def open_run(
    run_dir: str | Path, *, device: str = "auto", precision: str | None = None, tokenizer: str | None = None
) -> Iterator[RestoredRun]:
    """Opens a run folder on this job's processes (all data-parallel, whatever layout trained it).

    Args:
        run_dir: made by `pretrain`.
        device: "auto", "cuda" or "cpu".
        precision: "fp32" or "bf16"; default the run's own.
        tokenizer: instead of the run's own.

    Raises:
        CheckpointError: the folder holds no run.
    """
    run_dir = Path(run_dir)
    config = read_config(run_dir)
    chosen = select_device(device)
    train = replace(config.train, precision=precision or config.train.precision)  # type: ignore[arg-type]
    config = replace(config, train=train, parallel=ParallelConfig(timeout_s=config.parallel.timeout_s))
    with process_groups(chosen, timeout_s=config.parallel.timeout_s) as ranks:
        with agree("opening the tokenizer"):
            source = Path(tokenizer) if tokenizer else tokenizer_folder(run_dir)
            if not source.exists():
                raise DataError(f"{source}: no tokenizer there; give --tokenizer")
            loaded = load_tokenizer(source)
        yield RestoredRun(run_dir, config, loaded, chosen, ranks)
