"""JSON objects of a run folder that carry a digest of themselves: written atomically, refused if they were changed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from megatron_lion.files import read_own
from megatron_lion.plain_text import plain_tree
from megatron_lion.runs.folder import write_json

SEAL = "sha256"
"""Key of the digest; files of earlier versions do not have it."""


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """Writes an object as JSON with its digest, atomically.

    Raises:
        ValueError: a number is NaN or infinite, which JSON cannot represent.
        StorageError: the file could not be written.
    """
    write_json(path, {**content, SEAL: _digest(content)})


def read_sealed(path: Path) -> dict[str, Any]:
    """Reads an object and compares it with its digest, if it has one; returns it without the digest.

    Characters that a terminal or a page would obey are replaced by their escapes, see `plain`.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not such an object; the message is one line.
    """
    try:
        content = json.loads(read_own(path))
    except UnicodeDecodeError:
        raise ValueError("damaged: not UTF-8") from None
    except RecursionError:
        raise ValueError("damaged: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"damaged: {(str(error).splitlines() or ['not JSON'])[0]}") from None
    if not isinstance(content, dict):
        raise ValueError(f"must contain an object, got {type(content).__name__}")
    if not _is_intact(content):
        raise ValueError(
            f"does not match its own {SEAL}: damaged or changed; copy it here again, or, if you changed it, remove its line "
            f'"{SEAL}"'
        )
    plain: dict[str, Any] = plain_tree({key: value for key, value in content.items() if key != SEAL})
    return plain


def _is_intact(content: dict[str, Any]) -> bool:
    """Whether an object has its digest, or none at all; a digest under another key is a damaged key."""
    for key, value in content.items():
        if key == SEAL or (isinstance(value, str) and len(value) == 64):
            rest = {name: item for name, item in content.items() if name != key}
            matches = value == _digest(rest)
            if matches or key == SEAL:
                return matches and key == SEAL
    return True


def _digest(content: dict[str, Any]) -> str:
    # Through JSON once, so that tuples and numeric keys have the form in which they are read back.
    stored = json.loads(json.dumps(content))
    return hashlib.sha256(json.dumps(stored, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
