"""Separates what transformers rejects in a folder from what is wrong with the installed transformers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata

from megatron_lion.errors import CheckpointError, EnvironmentFault, MegatronLionError
from megatron_lion.installation import unsuitable

_INVOLVED = ("transformers", "tokenizers", "huggingface_hub", "safetensors", "torch", "numpy")


@contextmanager
def importing_transformers() -> Iterator[None]:
    """Wraps an import of transformers, which checks the versions of other packages, in a readable error.

    Raises:
        EnvironmentFault: the import failed.
    """
    try:
        yield
    except (ImportError, RuntimeError, AttributeError) as error:
        raise _fault(error) from error


def refusal(error: Exception, message: str) -> MegatronLionError:
    """Returns the error to raise for an exception of transformers while it read a folder.

    transformers raises many unrelated classes, and the same ones for a damaged file and for a call that its version does
    not know. The folder is at fault only if the installed versions are allowed and nothing failed to be imported.

    Args:
        error: the exception.
        message: the message if the folder is at fault.

    Returns:
        An EnvironmentFault that names the package, or a CheckpointError with `message`.

    Raises:
        MemoryError: `error` itself, if it is one.
    """
    if isinstance(error, MemoryError):
        raise error
    return _fault(error) if isinstance(error, ImportError) or _wrong() else CheckpointError(message)


def cause(error: Exception) -> str:
    """Returns the class and the message of an exception on one line of at most 300 characters."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def _wrong() -> list[str]:
    return [text for text in unsuitable() if text.split()[0].replace("-", "_") in _INVOLVED]


def _fault(error: Exception) -> EnvironmentFault:
    if wrong := _wrong():
        needed = " ".join(f"'{text.split()[0]}{text.rpartition(' ')[2]}'" for text in wrong)
        return EnvironmentFault(
            f"{'; '.join(wrong)}; with it, transformers failed ({cause(error)}); run {sys.executable} -m pip install {needed}"
        )
    version = metadata.version("transformers")
    return EnvironmentFault(f"transformers {version} failed: {cause(error)}; `megatron-lion env` lists the versions")
