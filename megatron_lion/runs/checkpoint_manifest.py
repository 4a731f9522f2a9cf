"""A checkpoint's manifest.json: its keys with their types, its digest, and the one place that reads it.

Whoever can write a manifest can also write a digest that fits it. So every value is checked here, before anything uses it.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from megatron_lion.errors import CheckpointError
from megatron_lion.files import read_own
from megatron_lion.plain_text import is_file_name

FORMAT = 1
MANIFEST = "manifest.json"
GO_BACK = (
    "restore it from a copy of this same step, or give pretrain --fall-back, or move this step's folder away to resume from "
    "the checkpoint before it"
)
GO_BACK_BY_HAND = (
    "restore it from a copy of this same step, or move this step's folder away to resume from the checkpoint before it"
)
"""For faults that the digests do not show, so that --fall-back would choose the same checkpoint."""
MAX_STEP = 10**12
_MAX_COUNT = 2**63 - 1  # what torch and safetensors can count


class _Kind(NamedTuple):
    """What a value must be: a test, and its description for messages."""

    fits: Callable[[Any], bool]
    description: str


def _integer(low: int, high: int = _MAX_COUNT) -> _Kind:
    # bool is a subclass of int, and `true` in JSON is no number.
    return _Kind(
        lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high,
        f"an integer from {low} to {high}",
    )


def _number(low: float) -> _Kind:
    return _Kind(
        lambda value: isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value < math.inf,
        f"a finite number of at least {low:g}",
    )


def _hexadecimal(digits: int) -> _Kind:
    pattern = re.compile(rf"[0-9a-f]{{{digits}}}")
    return _Kind(
        lambda value: isinstance(value, str) and bool(pattern.fullmatch(value)), f"{digits} hexadecimal digits"
    )


def _one_of(*allowed: str) -> _Kind:
    return _Kind(lambda value: isinstance(value, str) and value in allowed, f"one of {', '.join(allowed)}")


def _object(entries: dict[str, _Kind], optional: tuple[str, ...] = ()) -> _Kind:
    """A JSON object with exactly these entries."""

    def fits(value: Any) -> bool:
        if not isinstance(value, dict) or not value.keys() <= entries.keys():
            return False
        return all(kind.fits(value[key]) if key in value else key in optional for key, kind in entries.items())

    described = ", ".join(f"{key} ({kind.description})" for key, kind in entries.items())
    return _Kind(fits, f"an object of {described}")


def _or_null(kind: _Kind) -> _Kind:
    return _Kind(lambda value: value is None or kind.fits(value), f"null or {kind.description}")


def _is_text(value: Any) -> bool:
    # Names and origins are printed; a control character would change the terminal that shows them.
    return isinstance(value, str) and 0 < len(value) <= 4096 and value.isprintable()


def _is_sizes(value: Any, depth: int = 0) -> bool:
    if isinstance(value, list):
        return depth < 4 and all(_is_sizes(item, depth + 1) for item in value)
    return depth > 0 and _integer(0).fits(value)


def _is_setting(value: Any) -> bool:
    if isinstance(value, list):
        return all(_is_setting(item) and not isinstance(item, list) for item in value)
    return value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value))


_TEXT = _Kind(_is_text, "a printable text")
_FILE = _object({"bytes": _integer(0), "sha256": _hexadecimal(64)})
_FILES = _Kind(
    lambda value: isinstance(value, dict) and all(is_file_name(name) and _FILE.fits(value[name]) for name in value),
    f"an object of plain file names without folders, each with {_FILE.description}",
)
_SETTINGS = _Kind(
    lambda value: isinstance(value, dict) and all(_is_setting(item) for item in value.values()),
    "an object of settings: texts, finite numbers, true, false, null or lists of them",
)
_SCALER = _object({"scale": _number(0), "growth_tracker": _integer(0), "hysteresis_tracker": _integer(0)})
_MODEL = _object({
    "kind": _one_of("gpt2", "bert"), "num_layers": _integer(1), "hidden_size": _integer(1), "num_attention_heads": _integer(1),
    "ffn_hidden_size": _integer(1), "seq_length": _integer(1), "gelu": _TEXT, "layernorm_epsilon": _number(0),
    "vocab_size": _integer(1),
})  # fmt: skip

_NEEDED: dict[str, _Kind] = {
    "step": _integer(0, MAX_STEP),
    "layout": _object({name: _integer(1) for name in ("world_size", "dp_size", "tp_size", "pp_size")}),
    "model": _MODEL,
    "data_digest": _or_null(_hexadecimal(64)),
    "tokenizer_sha256": _or_null(_hexadecimal(64)),
    "weights_fingerprint": _hexadecimal(32),
    "files": _FILES,
}
"""Entries of every checkpoint."""
_WITH_STATE: dict[str, _Kind] = {
    "consumed_samples": _integer(0),
    "optimizer": _TEXT,
    "optimizer_state": _object(
        {"num_steps": _integer(0), "num_skipped": _integer(0), "grad_scaler": _SCALER}, optional=("grad_scaler",)
    ),
    "precision": _one_of("fp32", "bf16", "fp16"),
    "buckets": _or_null(_Kind(_is_sizes, "a list of sizes")),
    "state_fingerprint": _hexadecimal(32),
}
"""Entries that a checkpoint with optimizer state (`state_layout` is not null) needs; null or absent in others."""
_MAY_BE_ABSENT: dict[str, _Kind] = {
    "run_id": _or_null(_hexadecimal(32)),
    "settings": _or_null(_SETTINGS),
    "seed": _integer(0),
    "state_layout": _or_null(_one_of("fully_reshardable", "dp_reshardable")),
    "state_form": _object({"master_weights": _TEXT, "momentum": _TEXT}),
    "config_sha256": _hexadecimal(64),
    "source": _TEXT,
}
"""Entries that earlier versions or imported checkpoints do not have."""


def manifest_digest(manifest: dict[str, Any]) -> str:
    """SHA-256 of a manifest without its "sha256" entry, in hexadecimal."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def manifest_bytes(manifest: dict[str, Any]) -> bytes:
    """The content of manifest.json: the entries and their digest."""
    return json.dumps({**manifest, "sha256": manifest_digest(manifest)}, indent=1).encode()


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads and checks a checkpoint's manifest, without its digest.

    Raises:
        CheckpointError: the manifest is missing, damaged, of another format, or has a value that cannot be; names the key.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(read_own(path).decode("utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder}: no {MANIFEST}, so the checkpoint is not complete; {GO_BACK}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged ({error}); {GO_BACK}") from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT or isinstance(found, bool):
        raise CheckpointError(f"{folder}: format {printable(found)}; this version reads format {FORMAT}")
    stated = manifest.pop("sha256", None)
    try:
        computed = manifest_digest(manifest)
    except RecursionError as error:
        raise CheckpointError(f"{path}: damaged ({error}); {GO_BACK}") from error
    if stated != computed:
        raise CheckpointError(f"{path}: does not match its own sha256: damaged or changed; {GO_BACK}")
    check_manifest(manifest, path)
    return manifest


def check_manifest(manifest: dict[str, Any], path: Path) -> None:
    """Raises CheckpointError unless every known entry of a manifest has a possible value; unknown entries are ignored."""
    has_state = manifest.get("state_layout") is not None
    for key, kind in {**_NEEDED, **_MAY_BE_ABSENT, **_WITH_STATE}.items():
        needed = key in _NEEDED or (has_state and key in _WITH_STATE)
        if key not in manifest:
            if needed:
                raise CheckpointError(f"{path}: {key} is missing; {GO_BACK}")
            continue
        value = manifest[key]
        if not (kind.fits(value) or (value is None and key in _WITH_STATE and not has_state)):
            raise CheckpointError(f"{path}: {key} must be {kind.description}, got {_shown(value)}; {GO_BACK}")


def printable(value: Any) -> str:
    """A value of a file as a message shows it: short and without control characters."""
    text = str(value)
    return text if text.isprintable() and len(text) <= 60 else ascii(text)[:60]


def _shown(value: Any) -> str:
    """A value in a message, short and without control characters."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:60] + "…"
