"""What a disk holds after a power cut, rebuilt from what the shim copied at each fsync.

Two models. "strict": a file holds what its last fsync wrote, and a folder lists what it listed at its own last fsync.
"names": every name is on the disk at once, but a file that was not synced is empty. Real file systems are between the two.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

MODELS = ("strict", "names")
Snapshot = dict[int, bytes | dict[str, int]]


def snapshot(folder: Path) -> Snapshot:
    """Contents of a folder by inode: a file's bytes, or a folder's names with their inodes."""
    found: Snapshot = {}
    for place, _, names in os.walk(folder):
        entries = list(os.scandir(place))
        found[os.stat(place).st_ino] = {entry.name: entry.inode() for entry in entries}
        found.update({entry.inode(): Path(entry.path).read_bytes() for entry in entries if entry.name in names})
    return found


def cut(folder: Path, before: Snapshot, shadow: Path, model: str) -> None:
    """Replaces a folder by what a power cut leaves of it.

    Args:
        folder: its present state, which the processes left.
        before: its snapshot before they started; everything in it was on the disk.
        shadow: copies by the shim: f.INODE.CALL and d.INODE.CALL.
        model: one of MODELS.
    """
    synced: Snapshot = dict(before)
    for path in sorted(shadow.iterdir(), key=lambda path: int(path.name.rsplit(".", 1)[1])):
        kind, inode, _ = path.name.split(".")
        if kind == "f":
            synced[int(inode)] = path.read_bytes()
        else:
            lines = [line.split(" ", 1) for line in path.read_text().splitlines()]
            synced[int(inode)] = {name: int(number) for number, name in lines}
    present = snapshot(folder)
    rebuilt = folder.with_name(f"{folder.name}.rebuilt")

    def build(inode: int, target: Path) -> None:
        is_folder = isinstance(present.get(inode, synced.get(inode)), dict)
        known = synced.get(inode)
        if is_folder:
            names = present.get(inode) if model == "names" else known
            target.mkdir()
            for name, child in (names if isinstance(names, dict) else {}).items():
                build(child, target / name)
        else:
            target.write_bytes(known if isinstance(known, bytes) else b"")

    build(os.stat(folder).st_ino, rebuilt)
    shutil.rmtree(folder)
    os.replace(rebuilt, folder)
    shutil.rmtree(shadow)
