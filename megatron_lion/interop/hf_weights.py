"""Reads the safetensors files of a Hugging Face model folder, and rejects tensors that the network does not have."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from megatron_lion.errors import CheckpointError
from megatron_lion.evaluate.hf_files import weight_files
from megatron_lion.interop.weight_names import Shape

_PREFIX = "transformer."
_EMBEDDING = {"gpt2": "transformer.wte.weight", "bert": "bert.embeddings.word_embeddings.weight"}
# Stored copies of other parameters: the name, and the parameter that this project's network uses instead.
_COPIES = {
    "gpt2": {"lm_head.weight": _EMBEDDING["gpt2"]},
    "bert": {
        "cls.predictions.decoder.weight": _EMBEDDING["bert"],
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
}
# Constants that older versions of transformers stored: the causal mask, its fill value, and the numbers 0, 1, 2, ...
_BUFFERS = {
    "gpt2": re.compile(r"transformer\.h\.(?P<layer>\d+)\.attn\.(bias|masked_bias)"),
    "bert": re.compile(r"bert\.embeddings\.position_ids"),
}


class StoredWeights:
    """The tensors of a folder under transformers' names; each is read when it is requested.

    Older GPT-2 files omit the prefix "transformer." of the names, and some store only one of the two tied matrices,
    the output layer.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        """Opens the files.

        Args:
            folder: a folder with model.safetensors, or with its index and the files that it names.
            kind: "gpt2" or "bert".

        Raises:
            CheckpointError: the folder has no safetensors, or a file is damaged.
        """
        from safetensors import SafetensorError, safe_open

        self.folder, self.kind = folder, kind
        self._files: dict[str, Any] = {}
        try:
            for path in weight_files(folder):
                file = safe_open(path, framework="pt")
                self._files.update(dict.fromkeys(file.keys(), file))
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{folder}: the weights cannot be read ({error}); copy the folder again") from None
        self._stored = {self._canonical(name): name for name in self._files}
        self._unread = set(self._stored)

    def _canonical(self, name: str) -> str:
        if self.kind == "gpt2" and not name.startswith((_PREFIX, "lm_head.")):
            return _PREFIX + name
        return name

    def __call__(self, name: str) -> torch.Tensor:
        """Returns the tensor that has this name in transformers.

        Raises:
            CheckpointError: the files do not contain it.
        """
        if name == _EMBEDDING["gpt2"] and name not in self._stored and "lm_head.weight" in self._stored:
            name = "lm_head.weight"  # the tied output layer, as transformers reads such a file
        if name not in self._stored:
            heads = (
                "; a model without its heads (such as MegatronBertModel) cannot be trained further here"
                if "cls." in name
                else ""
            )
            raise CheckpointError(f"{self.folder}: the weights have no {name}{heads}")
        self._unread.discard(name)
        return self._tensor(name)

    def _tensor(self, name: str) -> torch.Tensor:
        stored = self._stored[name]
        tensor: torch.Tensor = self._files[stored].get_tensor(stored)
        return tensor

    def refuse_unread(self, shape: Shape) -> None:
        """Raises an error unless every stored tensor was read, is a known constant, or equals the tensor it is tied to.

        Any other tensor belongs to another model, for example to one with more layers, an adapter or an untied head.

        Args:
            shape: settings of the network.

        Raises:
            CheckpointError: a tensor does not belong to a network of this shape; the message names it.
        """
        strange: list[str] = []
        for name in sorted(self._unread):
            original = _COPIES[self.kind].get(name)
            if original is not None and original in self._stored:
                if not torch.equal(self._tensor(name), self._tensor(original)):
                    raise CheckpointError(
                        f"{self.folder}: {name} differs from {original}; this project's networks tie the two, so they cannot compute this "
                        "model"
                    )
                continue
            constant = _BUFFERS[self.kind].fullmatch(name)
            if constant is not None and int(constant.groupdict().get("layer") or 0) < shape.num_layers:
                continue
            strange.append(self._stored[name])
        if strange:
            more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
            raise CheckpointError(
                f"{self.folder}: the weights have {strange[0]}{more}, which the {self.kind} network of config.json does not have; without "
                "it, the run would be another model"
            )
