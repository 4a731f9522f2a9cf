"""Manages the hidden folder in which a dataset is made, and its final rename to the output."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_lion.data.manifest import NAME
from megatron_lion.errors import ConfigError, StorageError
from megatron_lion.files import file_lock, storage_errors
from megatron_lion.folder_swap import put_back, replace_folder

logger = logging.getLogger(__name__)


def work_folder(output: Path) -> Path:
    """Returns the path of the work folder, `.NAME.preparing` beside OUTPUT; on the same disk, a rename is atomic."""
    output = output.absolute()
    return output.parent / f".{output.name}.preparing"


@contextmanager
def locked_work_folder(output: Path) -> Iterator[Path]:
    """Creates and locks the work folder; if the block fails, encoded pieces are kept for the next run.

    Raises:
        BusyError: another prepare is writing the same output.
        StorageError: the folder cannot be created or locked.
    """
    folder = work_folder(output)
    remedy = "wait for it or choose another --output"
    with file_lock(folder / "lock", str(output), remedy, by="another prepare"):
        if put_back(output):
            logger.warning("%s: the dataset that an interrupted run was about to replace has its name again", output)
        try:
            yield folder
        except BaseException:
            if any(folder.glob("shards-*/*.json")):
                logger.info("encoded pieces are kept in %s; run the same command again to continue", folder)
            else:
                shutil.rmtree(folder, ignore_errors=True)
            raise


def check_output(output: Path, overwrite: bool) -> None:
    """Rejects an output that `prepare` must not replace.

    Args:
        output: dataset folder to make.
        overwrite: whether --overwrite was given, for the message.

    Raises:
        ConfigError: the output is a file, a link, or a folder with files but without a manifest.
    """
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise ConfigError(f"{output}: exists and is not a folder; choose another --output")
    if not output.exists() or (output / NAME).exists() or not any(output.iterdir()):
        return
    aside = " (not even with --overwrite)" if overwrite else ""
    raise ConfigError(f"{output}: has files but no {NAME}, so it is not replaced{aside}; choose another --output")


def publish(result: Path, output: Path, work: Path) -> None:
    """Renames the finished folder to the output, replacing an older dataset, and removes the work folder.

    Args:
        result: finished dataset folder, inside `work`.
        output: final path.
        work: work folder, on the same disk.

    Raises:
        StorageError: the file system refused; the finished folder and the older dataset are kept.
    """
    replace_folder(result, output)
    shutil.rmtree(work, ignore_errors=True)


def check_free_space(folder: Path, needed_bytes: int) -> None:
    """Checks that the disk of `folder` has `needed_bytes` of free space.

    Raises:
        StorageError: the free space is smaller.
    """
    with storage_errors(folder, "read"):
        free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise StorageError(
            f"{folder}: {free / 1e6:,.0f} MB free, about {needed_bytes / 1e6:,.0f} MB needed (the tokens "
            "twice, while shards are merged); make room or choose an --output on another disk"
        )
