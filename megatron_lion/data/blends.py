"""Opens Megatron's datasets over one or several corpora, without barriers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder

from megatron_lion.data.index_cache import Content


def open_datasets(dataset_class: Any, settings: Any, num_samples: Sequence[int | None]) -> list[Any]:
    """Opens the train, validation and test datasets; writes the index files that `settings.path_to_cache` lacks.

    It calls no collective. Only rank 0 may call it while files are missing, because Megatron lets no other rank write.

    Args:
        dataset_class: Megatron's dataset class.
        settings: an object of its config class.
        num_samples: number of samples of each split, or None for a split that `settings` leaves out.

    Returns:
        Three datasets, or None for a split that is left out.
    """
    return list(_Builder(dataset_class, list(num_samples), lambda: True, settings).build())


def index_contents(dataset: Any) -> Iterator[Content]:
    """Yields the contents of a dataset's index files: descriptions, and arrays as they are in memory."""
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
