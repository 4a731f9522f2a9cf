"""Opens the data of a job: one process of each node reads and checks the files, the others take its result."""

from __future__ import annotations

from pathlib import Path

from megatron_lion.config import DataConfig, ModelConfig
from megatron_lion.data.corpora import Corpora, PairContent, open_corpora
from megatron_lion.jobs import place_from_env
from megatron_lion.parallel import agree, gather_objects


def open_once_a_node(data: DataConfig, model: ModelConfig, cache: Path) -> Corpora:
    """Opens and checks the data on every rank; a collective call.

    The checks that read index files and tokens whole run on local rank 0 of each node, as each node may see other files. If
    one finds an error, all ranks raise it.

    Args:
        data, model: settings.
        cache: folder that keeps what was read of plain token files.

    Raises:
        ConfigError, DataError: see `open_corpora`.
    """
    place, corpora = place_from_env(), None
    # Rank 0 as well, so that there is one if no launcher counts the processes of a node from 0.
    is_first = place.local_rank == 0 or place.rank == 0
    with agree("opening the data"):
        if is_first:
            corpora = open_corpora(data, model, cache=cache)
    found = gather_objects(_pairs(corpora) if corpora is not None else None)
    with agree("opening the data"):
        if corpora is None:
            # Launchers number the processes of a node one after another. If another one does not, this may be the result of
            # another node. If that node's data differ, its first rank reports so when it compares the index files.
            before = [pairs for pairs in found[: place.rank] if pairs is not None]
            corpora = open_corpora(data, model, checked=before[-1])
    return corpora


def _pairs(corpora: Corpora) -> dict[Path, PairContent]:
    """What was found of each plain prefix; {} for dataset folders, whose manifests have the hashes."""
    if corpora.split is None:
        return {}
    return {path: PairContent(info.idx_sha256, info.content) for path, info in corpora.infos.items()}
