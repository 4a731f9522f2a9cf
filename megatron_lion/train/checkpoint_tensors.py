"""Writes and reads a checkpoint's tensors in megatron-core's torch_dist format, without a helper process.

Upstream writes through a manager process that it spawns at the first save. That process costs seconds, outlives a
killed rank, and reports a full disk as an unspecific failure. This module uses upstream's planner and writer without it.

Upstream's `.metadata` is a pickle, which may run code when it is loaded. Before megatron-core opens it, an unpickler
that allows only the sixteen classes of checkpoint metadata reads it.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import queue
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from megatron.core.dist_checkpointing.dict_utils import merge, nested_values
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess, save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistLoadShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem, _StorageWriterTransforms

from megatron_lion.collective_faults import is_collective_fault, worker_fault
from megatron_lion.errors import CheckpointError, StorageError
from megatron_lion.files import storage_errors
from megatron_lion.parallel import agree
from megatron_lion.runs.steps import naming_removal
from megatron_lion.signals import StopNow

_LARGE = 1 << 20  # bytes from which hashing in another thread, while they are written, takes less time than starting it
_METADATA_CLASSES = {
    ("collections", "OrderedDict"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.metadata", "BytesStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "Metadata"),
    ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
    ("torch.distributed.checkpoint.metadata", "StorageMeta"),
    ("torch.distributed.checkpoint.metadata", "TensorProperties"),
    ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.planner", "SavePlan"),
    ("torch.distributed.checkpoint.planner", "TensorWriteData"),
    ("torch.distributed.checkpoint.planner", "WriteItem"),
    ("torch.distributed.checkpoint.planner", "WriteItemType"),
}


class _MetadataUnpickler(pickle.Unpickler):
    """Rejects every class except those that torch's checkpoint metadata consists of."""

    def find_class(self, module: str, name: str) -> Any:
        plain_torch_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) in _METADATA_CLASSES or plain_torch_dtype:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it references {module}.{name}")


class Stored(NamedTuple):
    """Dtype and whole shape of a tensor in a checkpoint."""

    dtype: torch.dtype
    shape: tuple[int, ...]


def check_metadata(path: Path, files: Collection[str]) -> dict[str, Stored]:
    """Loads a `.metadata` pickle with an allow-list of classes; nothing else in it can run.

    Args:
        path: the file.
        files: names of the checkpoint's files; the metadata may point to no other.

    Returns:
        Dtype and shape of every tensor in the checkpoint, by its key.

    Raises:
        CheckpointError: the file contains anything but checkpoint metadata.
    """
    try:
        found = _MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
        kinds = [type(item).__name__ for item in found.state_dict_metadata.values()]
        places = {item.relative_path for item in found.storage_data.values()}
        stored = {
            key: Stored(item.properties.dtype, tuple(item.size))
            for key, item in found.state_dict_metadata.items()
            if hasattr(item, "properties")
        }
    except Exception as error:  # a damaged pickle can raise any exception
        raise CheckpointError(f"{path}: not plain checkpoint metadata ({error}); it was not loaded") from error
    if pickled := kinds.count("BytesStorageMetadata"):
        raise CheckpointError(
            f"{path}: holds {pickled} pickled objects; a checkpoint of this project holds tensors only"
        )
    if strange := sorted(places - set(files)):
        raise CheckpointError(
            f"{path}: points to {strange[0]}, which is not a file of this checkpoint; it was not loaded"
        )
    return stored


class _HashingTransforms(_StorageWriterTransforms):
    """Hashes every byte on its way to the file. Read back from the disk, a digest would fit whatever the disk stored."""

    # mcore 0.19.2: its writer takes torch's transforms as an argument and opens one stream through them for each tensor.
    def __init__(self, helper: ThreadPoolExecutor) -> None:
        super().__init__()
        self.digest = hashlib.sha256()
        self.helper = helper

    def transform_save_stream(self, write_item: Any, raw_stream: Any) -> tuple[Any, list[str]]:
        return super().transform_save_stream(write_item, _HashedStream(raw_stream, self.digest, self.helper))  # type: ignore[arg-type]


class _HashingFileSystem(FileSystem):
    """Hashes the metadata on its way to the file. torch 2.11 writes a copy of the object, which nobody else holds."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        with super().create_stream(path, mode) as stream:
            yield _HashedStream(stream, self.digest)


class _HashedStream:
    """The methods of a stream that torch's writer calls."""

    def __init__(self, raw: Any, digest: Any, helper: ThreadPoolExecutor | None = None) -> None:
        self.raw, self.digest, self.flush, self.fileno = raw, digest, raw.flush, raw.fileno
        self.helper = helper

    def write(self, content: Any) -> int:
        hashing = None
        if self.helper is not None and len(content) >= _LARGE:
            with suppress(RuntimeError):  # no thread can be started
                hashing = self.helper.submit(self.digest.update, content)
        if hashing is None:
            self.digest.update(content)
        try:
            return int(self.raw.write(content))
        finally:
            if hashing is not None:
                hashing.result()  # in order, and before the caller frees the memory of `content`


def write_tensors(sharded: dict[str, Any], folder: Path) -> dict[str, str]:
    """Writes ShardedTensors in megatron-core's torch_dist format; a collective call.

    Args:
        sharded: nested dictionaries of ShardedTensors; plain values are not allowed.
        folder: an existing folder, the same on all ranks.

    Returns:
        On the first rank, the SHA-256 of what was written to each file, by its name; it is not read back from the disk.

    Raises:
        StorageError: a write failed on some rank; on all ranks.
    """
    tensors, plain = save_preprocess(sharded, validate_access_integrity=True)
    assert not any(True for _ in nested_values(plain)), "plain values belong in the manifest"
    # mcore 0.19.2: if this is None, a manager process is spawned that passes results from one thread to itself.
    filesystem_async._results_queue = queue.SimpleQueue()
    by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(tensors, keep_only_main_replica=True)
    planner = MCoreSavePlanner(
        dedup_replicated_tensors=False, flatten_state_dict=False, flatten_sharded_tensors=False
    )  # fmt: skip
    writer = FileSystemWriterAsync(folder, thread_count=1)
    (_, metadata, group), *_ = save_state_dict_async_plan(mcore_to_pyt_state_dict(by_key), writer, planner=planner)
    written: tuple[list[Any], dict[str, str]] = [], {}
    with agree("writing the checkpoint"), storage_errors(folder):
        written = _write_files(writer, folder)
    # The coordinator's .metadata lists where each tensor part is, so it needs the results of all ranks.
    written_by_all = group.gather_object(written)
    digests: dict[str, str] = {}
    with agree("writing the checkpoint's metadata"), storage_errors(folder):
        if group.is_coordinator:
            writer.fs = files = _HashingFileSystem()
            writer.finish(metadata, [results for results, _ in written_by_all])
            for _, of_rank in written_by_all:
                digests |= of_rank
            digests[".metadata"] = files.digest.hexdigest()
    return digests


def _write_files(writer: Any, folder: Path) -> tuple[list[Any], dict[str, str]]:
    """Writes this rank's file, with fsync, and returns where each tensor was written, and the file's SHA-256 by name."""
    written: list[Any] = []
    digests: dict[str, str] = {}
    for number, bucket in enumerate(writer.write_buckets):
        on_cpu = writer.preload_tensors([bucket])[0]
        with ThreadPoolExecutor(1) as helper:
            transforms = _HashingTransforms(helper)
            _, results = writer.write_preloaded_data([transforms], number, on_cpu, None, None, use_fsync=True)
        if isinstance(results, OSError):
            raise results
        if isinstance(results, Exception) and worker_fault(results):  # torch raises it in any line
            raise results
        if isinstance(results, Exception):  # torch's writer re-raises the OSError, or fails with an unrelated exception
            raise StorageError(
                f"{folder}: cannot be written ({' '.join(str(results).split())[:120]}), as happens on a full disk; make room there or "
                "choose a folder on another disk, then give the same command again"
            ) from results
        written += results
        digests[Path(bucket[0]).name] = transforms.digest.hexdigest()
    return written, digests


def read_tensors(sharded: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Reads the tensors that `sharded` describes, at any layout; a collective call.

    Args:
        sharded: nested dictionaries of ShardedTensors: the parts that this rank needs.
        folder: a verified checkpoint.

    Returns:
        The same dictionaries with tensors in place of the ShardedTensors.

    Raises:
        CheckpointError: a tensor is not in the checkpoint or has another shape; on all ranks.
    """
    loaded: dict[str, Any] = {}
    with agree("reading the checkpoint"), naming_removal(folder):
        try:
            tensors, local, factories = load_preprocess(sharded)
            assert not factories, "no model here has tensors that are split on loading"
            loaded = TorchDistLoadShardedStrategy().load(tensors, folder)
            merge(loaded, local)
        except (Exception, CheckpointException) as error:  # torch's CheckpointException is not an Exception
            if is_collective_fault(error):
                raise  # a lost rank does not mean a damaged checkpoint
            causes = (
                [reason for reason, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
            )
            stop = next((cause for cause in causes if isinstance(cause, StopNow)), None)
            if stop is not None:  # torch's reader catches every BaseException
                raise stop from None
            text = " ".join(str(causes[0] if causes else error).split())[:300]
            raise CheckpointError(f"{folder}: does not fit this model: {text}") from error
    return loaded
