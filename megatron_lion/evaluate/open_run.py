"""Opens a run folder to score text: its model at any step, on any number of processes, without optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_lion.config import ParallelConfig, RunConfig
from megatron_lion.data.tokenizers import Tokenizer, load_tokenizer_of
from megatron_lion.device import Device, select_device
from megatron_lion.errors import CheckpointError, DataError
from megatron_lion.evaluate.stored_results import state_of_manifest
from megatron_lion.evaluate.token_scores import LogitsScorer
from megatron_lion.model.build import build_model
from megatron_lion.optim.parameter_shards import named_global_parameters
from megatron_lion.parallel import Ranks, agree, all_reduce_sum, process_groups
from megatron_lion.runs.folder import read_config
from megatron_lion.runs.paths import config_file, tokenizer_folder
from megatron_lion.runs.steps import Checkpoint, list_steps, open_checkpoint, step_folder
from megatron_lion.train.model_state import model_facts, read_weights, unwrap


class RestoredRun:
    """A run's network, ready to score text. Made by `open_run`.

    Attributes:
        run_dir: the run folder.
        config: the run's settings with this job's layout: every process has the whole model and scores a part of the text.
        tokenizer: the tokenizer of the run's data, or the one given instead.
        device: the device of the model.
        seq_length: the model's context length in tokens.
        steps: steps of the complete checkpoints, ascending.
        vocab_size: size of the vocabulary without padding; 0 before the first `load`.
        ranks: this process's place in the job.
    """

    def __init__(self, run_dir: Path, config: RunConfig, tokenizer: Tokenizer, device: Device, ranks: Ranks) -> None:
        self.run_dir, self.config, self.tokenizer, self.device, self.ranks = run_dir, config, tokenizer, device, ranks
        self.seq_length = config.model.seq_length
        self.steps = list_steps(run_dir)
        self.vocab_size = 0
        self._model: list[Any] | None = None

    @property
    def rank(self) -> int:
        """Rank of this process."""
        return self.ranks.rank

    @property
    def world_size(self) -> int:
        """Number of processes, all data-parallel."""
        return self.ranks.world_size

    def manifest(self, step: int) -> dict[str, Any]:
        """Returns the manifest of a checkpoint.

        Raises:
            CheckpointError: the run has no complete checkpoint of that step, or config.yaml describes another network.
        """
        if step not in self.steps:
            known = ", ".join(map(str, self.steps)) or "none"
            raise CheckpointError(f"{self.run_dir}: no complete checkpoint of step {step} (there are: {known})")
        manifest = open_checkpoint(step_folder(self.run_dir, step)).manifest
        # Settings such as layernorm_epsilon change no tensor's shape, so the weights would load into another network.
        saved = manifest["model"]
        ours = model_facts(self.config, saved["vocab_size"])
        different = [
            f"model.{key}: {saved.get(key)}, now {value}" for key, value in ours.items() if saved.get(key) != value
        ]
        if different:
            path = config_file(self.run_dir)
            raise CheckpointError(
                f"{path}: describes another network than {step_folder(self.run_dir, step)} ({'; '.join(different)}); change it back"
            )
        return manifest

    def state_sha256(self, step: int) -> str:
        """Returns a hash of the weights of a step and the network's settings, at any layout; a collective call."""
        with agree("opening the checkpoint"):  # a collective call follows at the caller
            return state_of_manifest(self.manifest(step))

    def load(self, step: int) -> None:
        """Verifies a checkpoint and loads its weights; a collective call.

        Raises:
            CheckpointError: it is missing, damaged or of another model, or other weights arrived than were saved.
            DataError: the checkpoint was trained with another tokenizer than the one opened.
        """
        # Raised on all ranks: verifying and reading the checkpoint are collective.
        with agree("opening the checkpoint"):
            manifest = self.manifest(step)
            if manifest["tokenizer_sha256"] not in (None, self.tokenizer.sha256):
                raise DataError(
                    f"{self.run_dir}: trained with tokenizer {manifest['tokenizer_sha256'][:12]}, got "
                    f"{self.tokenizer.sha256[:12]}; omit --tokenizer to use the run's own"
                )
        checkpoint = Checkpoint(step_folder(self.run_dir, step), manifest)
        if self._model is None:
            self.vocab_size = int(manifest["model"]["vocab_size"])
            # Scores come from logits: what this machine cannot compute for training must not keep it from scoring.
            train = replace(self.config.train, gradient_accumulation_fusion=False)
            config = replace(
                self.config, model=replace(self.config.model, loss="auto", elementwise="auto"), train=train
            )
            self._model = build_model(config, self.device, self.vocab_size)
        read_weights(self._model, checkpoint, self.ranks)
        for chunk in self._model:
            chunk.eval()  # without dropout

    def named_weights(self) -> dict[str, torch.Tensor]:
        """Returns the loaded parameters by their global names; they share memory with the model."""
        if self._model is None:
            raise CheckpointError("load a step first")
        return {name: tensor.detach() for name, tensor in named_global_parameters(unwrap(self._model[0]))}

    @torch.no_grad()
    def round_weights(self, dtype: torch.dtype) -> None:
        """Rounds the loaded weights to a dtype, as a file of that dtype would; their own dtype stays."""
        for tensor in self.named_weights().values():
            tensor.copy_(tensor.to(dtype))

    def scorer(self) -> LogitsScorer:
        """Returns a scorer of batches of tokens with the loaded weights."""
        return LogitsScorer(self.hidden, self.device.torch_device, self.project)

    @torch.no_grad()
    def hidden(self, tokens_BS: torch.Tensor, last: int) -> torch.Tensor:
        """Returns the hidden states [B, last, H] before the output layer; the arguments are those of `logits`."""
        if self._model is None:
            raise CheckpointError("load a step before scoring")
        network = unwrap(self._model[0])
        positions = torch.arange(tokens_BS.shape[1], device=tokens_BS.device).expand_as(tokens_BS)
        hidden_SBH = network.decoder(hidden_states=network.embedding(tokens_BS, positions), attention_mask=None)
        return hidden_SBH[-last:].transpose(0, 1)

    @torch.no_grad()
    def project(self, hidden_NH: torch.Tensor) -> torch.Tensor:
        """Returns the logits [N, V] of hidden states [N, H]; V is the vocabulary without padding."""
        if self._model is None:
            raise CheckpointError("load a step before scoring")
        network = unwrap(self._model[0])
        logits_NV, _ = network.output_layer(hidden_NH, weight=network.shared_embedding_or_output_weight())
        return logits_NV[..., : self.vocab_size]

    def logits(self, tokens_BS: torch.Tensor, last: int) -> torch.Tensor:
        """Returns the logits [B, last, V] after the last `last` of the tokens [B, S] (int64, on the model's device).

        The output layer, a third of GPT-2 Small's work, runs for these positions alone. V is the vocabulary without
        padding: the rows that pad the embedding belong to no token and get no probability.
        """
        return self.project(self.hidden(tokens_BS, last))

    @torch.no_grad()
    def bert_logits(
        self, tokens_1S: torch.Tensor, types_1S: torch.Tensor, places: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs a BERT on one sample and returns its logits at M positions and of the sentence order.

        Args:
            tokens_1S: token ids, int64 [1, S].
            types_1S: token types, 0 for the first passage and 1 for the second, int64 [1, S].
            places: the M positions to predict.

        Returns:
            Logits over the vocabulary without padding [M, V], and of the order (in order, swapped) [2].
        """
        if self._model is None:
            raise CheckpointError("load a step before scoring")
        where = self.device.torch_device
        tokens_1S, types_1S = tokens_1S.to(where), types_1S.to(where)
        positions_1M = torch.tensor([places], device=where)
        logits_1MV, order_12 = unwrap(self._model[0])(tokens_1S, torch.ones_like(tokens_1S), types_1S, positions_1M)
        return logits_1MV[0, :, : self.vocab_size], order_12[0]

    def all_reduce_sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sums values over all processes, in place, in their own dtype; a collective call."""
        # NCCL reduces CUDA tensors alone, and the caller's values are on the CPU.
        moved = values.to(self.device.torch_device)
        return values.copy_(all_reduce_sum(moved))


@contextmanager
def open_run(
    run_dir: str | Path, *, device: str = "auto", precision: str | None = None, tokenizer: str | None = None
) -> Iterator[RestoredRun]:
    """Opens a run folder on this job's processes, all data-parallel, whatever layout trained the run.

    Args:
        run_dir: a run folder made by `pretrain` or `import`.
        device: "auto", "cuda" or "cpu".
        precision: "fp32" or "bf16"; default: the run's own.
        tokenizer: a tokenizer to use instead of the run's own.

    Yields:
        The run, without weights until its first `load`.

    Raises:
        CheckpointError: the folder is not a run folder.
        DataError: no tokenizer is found.
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
                raise DataError(f"{source}: no such tokenizer; give --tokenizer")
            steps = list_steps(run_dir)
            newest = open_checkpoint(step_folder(run_dir, steps[-1])).manifest if steps else {}
            loaded = load_tokenizer_of(newest.get("tokenizer_sha256"), source)
        yield RestoredRun(run_dir, config, loaded, chosen, ranks)
