"""Opens Megatron's datasets over one or several corpora, without barriers and for any number of passes."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder

from megatron_lion.data.index_cache import Content
from megatron_lion.parallel import derive_seed


def open_datasets(dataset_class: Any, settings: Any, num_samples: Sequence[int | None]) -> list[Any]:
    """Opens the train, validation and test datasets; writes the index files that `settings.path_to_cache` lacks.

    It calls no collective. Only rank 0 may call it while files are missing, because Megatron lets no other rank write.

    Args:
        dataset_class: Megatron's dataset class.
        settings: an object of its config class.
        num_samples: number of samples of each split, or None for a split that `settings` leaves out.

    Returns:
        Three datasets, each with at least the number of samples, or None.
    """
    datasets = _Builder(dataset_class, list(num_samples), lambda: True, settings).build()
    return [
        SeveralPasses(dataset, count)
        if isinstance(dataset, BlendedDataset) and count is not None and len(dataset) < count
        else dataset
        for dataset, count in zip(datasets, num_samples, strict=True)
    ]


class SeveralPasses(torch.utils.data.Dataset[Any]):
    """One pass over several corpora, blended in proportion to their sizes, and what is read after it.

    Megatron ends a blend without weights after one pass. The samples after it are drawn in the same proportions, from
    passes of each corpus in another order, as Megatron draws them for given weights. The first pass stays as it is, so a run of one
    pass, and the first pass of a longer run, have the samples that they always had.

    Attributes:
        first: the blend of one pass.
        later: the blend of the samples after it.
    """

    def __init__(self, first: BlendedDataset, num_samples: int) -> None:
        """Builds the samples after the first pass.

        Args:
            first: blend of one whole pass.
            num_samples: samples needed in all, more than `first` has.
        """
        size = num_samples - len(first)
        config = copy.copy(first.config)  # not dataclasses.replace: the config computes fields when it is made
        config.random_seed = derive_seed(config.random_seed, "passes after the first")
        sizes = [len(part) for part in first.datasets]
        # Megatron's blend draws the corpus that is furthest behind its share, so none gets more than its share + 1.
        counts = [-(-size * samples // sum(sizes)) + 1 for samples in sizes]
        parts = [
            type(part)(part.dataset, part.dataset_path, part.indices, count, part.index_split, config)
            for part, count in zip(first.datasets, counts, strict=True)
        ]
        self.first = first
        self.later = BlendedDataset(parts, sizes, size, config)

    def __len__(self) -> int:
        return len(self.first) + len(self.later)

    def __getitem__(self, index: int) -> Any:
        """Returns sample `index`, an item of Megatron's dataset."""
        return self.first[index] if index < len(self.first) else self.later[index - len(self.first)]


def index_contents(dataset: Any) -> Iterator[Content]:
    """Yields the contents of a dataset's index files: descriptions, and arrays as they are in memory."""
    if isinstance(dataset, SeveralPasses):
        yield from index_contents(dataset.first)
        yield from index_contents(dataset.later)
        return
    yield dataset.unique_description
    for name in ("document_index", "sample_index", "shuffle_index", "dataset_index", "dataset_sample_index"):
        if hasattr(dataset, name):
            yield getattr(dataset, name)
    for part in getattr(dataset, "datasets", ()):
        yield from index_contents(part)


class _Builder(BlendedMegatronDatasetBuilder):
    """Megatron's builder without its barriers.

    mcore 0.19.2: it lets rank 0 go first and the others wait at a barrier, in which they stay if rank 0 fails, and it
    turns an OSError into an Exception without errno. Here rank 0 has built the files before anyone opens them.
    """

    @staticmethod
    def build_generic_dataset(cls: Any, is_built_on_rank: Any, synchronize_ranks: bool, *args: Any) -> Any:
        """Returns `cls(*args)`."""
        return cls(*args)

    def _build_megatron_datasets_parallel(self, prefixes: Any, split: Any, sizes_per_dataset: Any) -> list[list[Any]]:
        """Returns for each split the datasets of the prefixes, in order."""
        built = [
            self._build_megatron_dataset_splits(prefix, split, sizes, False)
            for prefix, sizes in zip(prefixes, sizes_per_dataset, strict=True)
        ]
        return [list(datasets) for datasets in zip(*built, strict=True)]
