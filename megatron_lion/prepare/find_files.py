"""Finds the input files of a corpus in files, folders and glob patterns, and counts the files that are not read."""

from __future__ import annotations

import glob
import json
import lzma
import os
import re
import stat
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_lion.errors import ConfigError, DataError, EnvironmentFault
from megatron_lion.prepare.decompression import decompressed

FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".txt": "txt",
    ".text": "txt",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".tar": "tar",
}
COMPRESSIONS = {".gz": ".gz", ".zst": ".zst", ".zstd": ".zst", ".xz": ".xz", ".bz2": ".bz2"}
SHORT_TAR = {".tgz": ".gz", ".txz": ".xz", ".tbz2": ".bz2", ".tbz": ".bz2", ".tzst": ".zst"}
"""Endings of compressed archives, as `.tar.gz`, with their compressions."""
TABLES = ("parquet", "arrow")
"""Formats with rows and columns; their files are not compressed as a whole."""

OF_DATASETS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""Files that Hugging Face's `datasets` writes beside its data."""
HIDDEN, LINKED_AGAIN = "hidden", "linked again"
UNLISTED, CACHE = "not in state.json", "cache of datasets"


@dataclass(frozen=True)
class InputFile:
    """One input file.

    Attributes:
        path: path of the file.
        format: "jsonl", "txt", "parquet", "arrow" or "tar".
        compression: ".gz", ".zst", ".xz", ".bz2", or "".
        bytes: size as stored.
        modified_ns: time of the last modification in nanoseconds.
    """

    path: Path
    format: str
    compression: str
    bytes: int
    modified_ns: int


@dataclass
class Survey:
    """The files that a list of inputs names.

    Attributes:
        files: the files to read, in order.
        unread: for each folder and pattern of the list, the number of its other files by kind: an ending like ".zip", or
            a reason.
    """

    files: list[InputFile] = field(default_factory=list)
    unread: dict[str, Counter[str]] = field(default_factory=dict)

    def notes(self) -> list[str]:
        """Returns one line for each folder or pattern that has files that are not read."""
        return [
            f"{kinds.total():,} {'files' if kinds.total() > 1 else 'file'} of {folder} {'are' if kinds.total() > 1 else 'is'} not read "
            f"({', '.join(f'{kind} {count:,}' for kind, count in sorted(kinds.items()))})"
            for folder, kinds in self.unread.items()
            if kinds
        ]

    def unread_counts(self) -> dict[str, int]:
        """Returns the number of files that are not read, by kind, over all folders."""
        return dict(sorted(sum(self.unread.values(), Counter()).items()))


FORMAT_ADVICE = "; or give --format jsonl|txt|parquet|arrow|tar"
"""The part of a message that names a flag of `prepare`, which `pretrain --text` does not have."""


def find_inputs(inputs: Sequence[str | Path], format: str = "auto") -> list[InputFile]:
    """Returns the files that a list of files, folders and glob patterns names; see `survey`."""
    return survey(inputs, format).files


def survey(inputs: Sequence[str | Path], format: str = "auto") -> Survey:
    """Finds the files that a list of files, folders and glob patterns names.

    Folders are searched to any depth for known endings, without regard to case, and for compressed archives with other
    names, such as `a.xz`. Links are followed. A file that is reached twice in one folder is read once, under its path
    without links if it has one there. Names that begin with a dot are skipped, and so are the files that `datasets`
    writes beside its data. The folders that a pattern matches are searched in the same way, all together. The files of
    a folder or pattern are sorted by path; the order of the list is kept.

    Args:
        inputs: files, folders or glob patterns.
        format: "auto" for the format of each file's ending, or "jsonl", "txt", "parquet", "arrow", "tar" for all files.

    Raises:
        ConfigError: the list is empty.
        DataError: a path or pattern matches no file, a path is a stream, an ending is unknown, a folder cannot be read,
            or two inputs name the same file.
    """
    found = Survey()
    for given in inputs:
        path = Path(given).expanduser()
        if path.is_dir():
            paths, kinds = _search([path])
            found.unread[str(given)] = kinds
            if not paths:
                raise _no_input(f"{given}: no file in this folder", found, kinds)
        elif path.is_file():
            paths = [path]
        elif path.exists() or str(given) == "-":
            raise DataError(
                f"{given}: is a stream; files are needed, because the input is hashed and read again after an interruption; write it "
                "to a file and give that"
            )
        else:
            pattern = f"{path}/" if str(given).endswith("/") else str(path)  # with the slash it matches folders alone
            matches = [Path(match) for match in glob.glob(pattern, recursive=True)]
            paths, kinds = _search_matches(matches)
            found.unread[str(given)] = kinds
            if not paths and any(match.is_dir() for match in matches):
                raise _no_input(f"{given}: no file in the folders that match", found, kinds)
            if not paths:
                raise DataError(f"{given}: no such file or folder, and no file matches it as a pattern")
        found.files += [input_file(one, format) for one in paths]
    if not found.files:
        raise ConfigError("no input given; name at least one file: --input FILE")
    seen: set[Path] = set()
    for file in found.files:
        real = file.path.resolve()  # also finds a file that is named by two links
        if real in seen:
            raise DataError(f"{file.path}: named twice, so its documents would be counted twice; name it once")
        seen.add(real)
    return found


def _no_input(what: str, found: Survey, kinds: Counter[str]) -> DataError:
    others = f"; {found.notes()[-1]}" if kinds else ""
    return DataError(f"{what} ends in {', '.join(FORMATS)} (or these + .gz, .zst){others}")


def _search_matches(matches: Sequence[Path]) -> tuple[list[Path], Counter[str]]:
    """Returns what `_search` returns, for the files and folders that a pattern matches."""
    folders = {match for match in matches if match.is_dir()}
    # For `data/**`, all files are in a folder that the pattern matches too, and the search of that folder finds them.
    single = [match for match in matches if match not in folders and folders.isdisjoint(match.parents)]
    return _search([folder for folder in folders if folders.isdisjoint(folder.parents)], single)


def _search(folders: Sequence[Path], single: Sequence[Path] = ()) -> tuple[list[Path], Counter[str]]:
    """Returns the files of some folders to read, sorted, and the number of the others by kind.

    Args:
        folders: folders, none inside another.
        single: more paths, which are added, whatever their ending, if they are files.
    """
    paths: list[Path] = []
    kinds: Counter[str] = Counter()
    links = sorted(folder for folder in folders if folder.is_symlink())
    waiting = sorted(set(folders) - set(links))
    walked: set[str] = set()
    while waiting or links:
        # Links are followed last, so a file inside keeps its path without links.
        folder = (waiting or links).pop(0)
        if os.path.realpath(folder) in walked:
            kinds[LINKED_AGAIN] += 1
        else:
            _walk(folder, paths, kinds, links, walked)
        links.sort()
    repeated = _caches(paths) | _not_of_the_dataset(paths)
    kinds.update(repeated.values())
    for path in single:
        kind = _kind_of_no_file(path)
        if kind is None:
            paths.append(path)
        else:
            kinds[kind] += 1
    real: set[str] = set()
    chosen: list[Path] = []
    # Links come last, so a file inside is read under its path without links.
    for path in sorted(set(paths) - repeated.keys(), key=lambda path: (path.is_symlink(), path)):
        if os.path.realpath(path) in real:
            kinds[LINKED_AGAIN] += 1
            continue
        real.add(os.path.realpath(path))
        chosen.append(path)
    return sorted(chosen), +kinds


def _walk(folder: Path, paths: list[Path], kinds: Counter[str], links: list[Path], walked: set[str]) -> None:
    """Adds a folder's content, at any depth, to the paths to read, the counts of others, and the links to folders."""

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}")

    for where, folders, files in os.walk(folder, onerror=refuse):
        walked.add(os.path.realpath(where))
        for name in list(folders):
            path = Path(where, name)
            if name.startswith("."):
                kinds[HIDDEN] += sum(len(inner) for _, _, inner in os.walk(path))
            elif path.is_symlink():
                links.append(path)
            else:
                continue
            folders.remove(name)
        for name in files:
            path = Path(where, name)
            kind = _kind_of_unread(path)
            if kind is None:
                paths.append(path)
            else:
                kinds[kind] += 1


def _kind_of_unread(path: Path) -> str | None:
    """Returns the kind under which an unread file of a folder is counted, or None if the file is read."""
    if path.name.startswith("."):
        return HIDDEN
    if path.name in OF_DATASETS:
        return path.name
    kind = _kind_of_no_file(path)
    if kind is not None:
        return kind
    return None if kind_of(path) or holds_archive(path) else ending_of(path)


def ending_of(path: Path) -> str:
    """Returns the kind under which a file with an unknown ending is counted, such as ".zip" or ".csv.gz"."""
    ending = path.suffix.lower() or "without ending"
    inner = Path(path.stem).suffix.lower()
    return inner + ending if ending in COMPRESSIONS and inner else ending


def _kind_of_no_file(path: Path) -> str | None:
    """Returns the kind under which a broken link or a special file is counted, or None for a regular file."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return "broken link"
    return None if stat.S_ISREG(mode) else "not a regular file"


def _caches(paths: Sequence[Path]) -> dict[Path, str]:
    """Returns the Arrow files that `map` or `filter` wrote into a folder of `load_dataset`, with their kind.

    They repeat the data, or hold only row numbers.
    """

    def has(folder: Path, name: str) -> bool:
        return (folder / name).is_file()

    caches = [path for path in paths if re.fullmatch(r"cache-.*\.arrow", path.name, re.IGNORECASE)]
    return {
        path: CACHE
        for path in caches
        if has(path.parent, "dataset_info.json") and not has(path.parent, "state.json")  # which lists its files itself
    }


def _not_of_the_dataset(paths: Sequence[Path]) -> dict[Path, str]:
    """Returns the Arrow files that the state.json beside them does not name, such as caches of `map`, with their kind.

    These repeat the data.

    Raises:
        DataError: a state.json is damaged, names a missing file, or selects only some rows of its files.
    """
    unlisted: dict[Path, str] = {}
    for folder in {path.parent for path in paths if path.suffix.lower() == ".arrow"}:
        state = folder / "state.json"
        if not state.is_file():
            continue
        try:
            content = json.loads(state.read_text(encoding="utf-8"))
            names = {one["filename"] for one in content["_data_files"]}
            indices = content.get("_indices_files") or content.get("_indices_data_files")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(f"{state}: damaged ({error}); save the dataset again with save_to_disk") from None
        if indices:
            raise DataError(
                f"{state}: the dataset is a selection of the rows of its files; write the rows with flatten_indices(), then save_to_disk"
            )
        absent = sorted(name for name in names if not (folder / name).is_file())
        if absent:
            raise DataError(f"{folder / absent[0]}: is named in {state.name} but missing; copy the dataset again")
        unlisted |= {
            path: UNLISTED
            for path in paths
            if path.parent == folder and path.suffix.lower() == ".arrow" and path.name not in names
        }
    return unlisted


def kind_of(path: Path) -> tuple[str, str] | None:
    """Returns (format, compression) by a path's endings, or None if the ending is unknown."""
    if path.suffix.lower() in SHORT_TAR:
        return "tar", SHORT_TAR[path.suffix.lower()]
    compression = COMPRESSIONS.get(path.suffix.lower(), "")
    ending = Path(path.stem).suffix if compression else path.suffix
    kind = FORMATS.get(ending.lower())
    return None if kind is None or (kind in TABLES and compression) else (kind, compression)


def is_tar(head: bytes) -> bool:
    """Whether data are an archive, by their first 512 bytes."""
    return head[257:262] == b"ustar"


def holds_archive(path: Path) -> bool:
    """Whether a compressed file such as `a.xz`, whose inner ending is unknown, is an archive by its content."""
    compression = COMPRESSIONS.get(path.suffix.lower())
    if compression is None or kind_of(path) or kind_of(Path(path.stem)):
        return False
    try:
        with open(path, "rb") as stored, decompressed(compression, stored, path, buffer_bytes=512) as stream:
            return is_tar(stream.read(512))
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, EnvironmentFault):
        return False


def input_file(path: Path, format: str = "auto") -> InputFile:
    """Returns the description of one file.

    Args:
        path: path of the file.
        format: as for `survey`.

    Raises:
        DataError: the file cannot be read, or its ending is unknown with "auto".
    """
    suffix = path.suffix.lower()
    if format != "auto":
        endings = SHORT_TAR | COMPRESSIONS if format == "tar" else COMPRESSIONS
        kind: tuple[str, str] | None = (format, "" if format in TABLES else endings.get(suffix, ""))
    else:
        kind = kind_of(path) or (("tar", COMPRESSIONS[suffix]) if holds_archive(path) else None)
    if kind is None:
        raise DataError(f"{path}: unknown ending {path.suffix!r}; known: {', '.join(FORMATS)}{FORMAT_ADVICE}")
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    return InputFile(path, *kind, bytes=status.st_size, modified_ns=status.st_mtime_ns)
