"""Yields resumable micro-batches of datasets, read ahead by worker processes.

Step k reads samples [k·G, (k+1)·G) of one shuffled sequence at any number of processes (G: global batch size), so a
resumed run continues with the next sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from megatron_lion.data import loader_workers
from megatron_lion.device import Device
from megatron_lion.errors import DataError
from megatron_lion.parallel import Ranks, derive_seed
from megatron_lion.signals import obey_only_the_parent


def sample_ids(start: int, step_samples: int, micro_batch_size: int, ranks: Ranks) -> Iterator[list[int]]:
    """Yields the sample numbers of this data rank's micro-batches from `start` on, without end.

    Micro-batch j of a global batch takes, over all data ranks, the j-th run of `micro_batch_size × dp_size` samples.
    So the samples of a step are the same at every data-parallel size; only their distribution over ranks differs.

    Args:
        start: number of the first sample of a global batch.
        step_samples: samples of a global batch over all ranks.
        micro_batch_size: samples of a micro-batch on one rank.
        ranks: this process's place; the data-parallel rank and size are used.

    Example:
        >>> one = Ranks(0, 1, 0, 1, 0, 1, 0, 1)
        >>> batches = sample_ids(8, 4, 2, one)
        >>> next(batches), next(batches), next(batches)
        ([8, 9], [10, 11], [12, 13])
    """
    width = micro_batch_size * ranks.dp_size
    while True:
        for first in range(start + ranks.dp_rank * micro_batch_size, start + step_samples, width):
            yield list(range(first, first + micro_batch_size))
        start += step_samples


class _Sampler:
    def __init__(self, start: int, end: int, step_samples: int, micro_batch_size: int, ranks: Ranks) -> None:
        self.arguments = (start, step_samples, micro_batch_size, ranks)
        self.count = (end - start) // (micro_batch_size * ranks.dp_size)

    def __iter__(self) -> Iterator[list[int]]:
        ids = sample_ids(*self.arguments)
        for _ in range(self.count):
            yield next(ids)

    def __len__(self) -> int:
        return self.count


def micro_batches(
    dataset: Any,
    *,
    start: int,
    end: int,
    global_batch_size: int,
    micro_batch_size: int,
    ranks: Ranks,
    device: Device,
    num_workers: int | None = None,
    vocab_size: int | None = None,
    timeout_s: float = 600,
) -> Iterator[dict[str, torch.Tensor]]:
    """Yields this rank's micro-batches of samples [start, end) on the device, read ahead by worker processes.

    The default random state does not change.

    Args:
        dataset: from `build_datasets`.
        start, end: sample numbers, both multiples of `global_batch_size`.
        global_batch_size: samples of a step over all ranks.
        micro_batch_size: samples of a micro-batch on one rank.
        ranks: this process's place among the ranks.
        device: target device of the tensors.
        num_workers: worker processes; None starts 2 with CUDA and none on CPU.
        vocab_size: number of ids of the vocabulary, to detect a damaged token file; None skips this check.
        timeout_s: longest wait for a batch of the workers, seconds.

    Yields:
        Dictionaries of (micro_batch_size, …) tensors, with the keys of the dataset's items.

    Raises:
        DataError: a token id is beyond the vocabulary.
        WorkerError: the workers sent no batch in time.
    """
    loader, limit_s = _open_loader(
        dataset, _Sampler(start, end, global_batch_size, micro_batch_size, ranks), start, ranks, device, num_workers, timeout_s
    )  # fmt: skip
    yield from _on_device(loader_workers.read_batches(loader, limit_s, ranks.rank), device, vocab_size)


class RepeatedBatches:
    """The first samples of several datasets, read again and again by one set of worker processes.

    The workers start at the first reading, are idle between two readings with nothing read ahead, and end at `close`.
    """

    def __init__(
        self,
        datasets: Sequence[Any],
        *,
        end: int,
        global_batch_size: int,
        micro_batch_size: int,
        ranks: Ranks,
        device: Device,
        num_workers: int | None = None,
        vocab_size: int | None = None,
        timeout_s: float = 600,
    ) -> None:
        """Opens the loader.

        Args:
            datasets: from `build_datasets`; None for one that is not read.
            end: samples [0, end) of a dataset are read.
            global_batch_size, micro_batch_size, ranks, device, num_workers, vocab_size, timeout_s: see `micro_batches`.
        """
        self._sampler = _PartSampler(_Sampler(0, end, global_batch_size, micro_batch_size, ranks))
        loader, self._limit_s = _open_loader(
            _Parts(datasets), self._sampler, 0, ranks, device, num_workers, timeout_s, keep_workers=True
        )
        self._loader: torch.utils.data.DataLoader[Any] | None = loader
        self._workers: list[BaseProcess] = []
        self._rank, self._device, self._vocab_size = ranks.rank, device, vocab_size

    def read(self, part: int) -> Iterator[dict[str, torch.Tensor]]:
        """Yields the micro-batches of dataset `part`, as `micro_batches` does; one reading at a time."""
        assert self._loader is not None, "closed"
        self._sampler.part = part
        batches = loader_workers.read_batches(self._loader, self._limit_s, self._rank, self._workers)
        yield from _on_device(batches, self._device, self._vocab_size)

    def close(self) -> None:
        """Ends the workers."""
        loader_workers.let_end(self._workers)
        self._loader = None  # with the loader, torch ends its workers
        loader_workers.end(self._workers)


class _Parts(torch.utils.data.Dataset[Any]):
    """Several datasets as one; an item's key is (number of the dataset, number of the sample)."""

    def __init__(self, datasets: Sequence[Any]) -> None:
        self.datasets = datasets

    def __getitem__(self, key: tuple[int, int]) -> Any:
        part, number = key
        return self.datasets[part][number]


class _PartSampler:
    """The keys of `_Parts` for the samples of one of its datasets."""

    def __init__(self, samples: _Sampler) -> None:
        self.samples, self.part = samples, 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        part = self.part
        for ids in self.samples:
            yield [(part, number) for number in ids]

    def __len__(self) -> int:
        return len(self.samples)


def _open_loader(
    dataset: Any,
    sampler: Any,
    start: int,
    ranks: Ranks,
    device: Device,
    num_workers: int | None,
    timeout_s: float,
    *,
    keep_workers: bool = False,
) -> tuple[torch.utils.data.DataLoader[Any], float]:
    """Returns a loader of the samples that `sampler` names, and the longest wait for a batch of its workers, seconds."""
    workers = num_workers if num_workers is not None else (2 if device.kind == "cuda" else 0)
    # With other ranks a little earlier than the collective in which they wait: they then name the cause.
    limit_s = timeout_s - (min(10.0, timeout_s / 5) if ranks.world_size > 1 else 0.0)
    loader: torch.utils.data.DataLoader[Any] = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        pin_memory=device.kind == "cuda",  # only a copy from pinned memory runs beside the kernels (see _on_device)
        # A loader draws its workers' base seed. From the default generator, every held-out loss and every probe would
        # advance the state that dropout uses, and a resumed run would no longer repeat bit for bit.
        generator=torch.Generator().manual_seed(derive_seed(start, "loader")),
        timeout=limit_s if workers else 0,
        worker_init_fn=obey_only_the_parent,
        persistent_workers=keep_workers and workers > 0,
    )
    return loader, limit_s


def _on_device(
    batches: Iterator[dict[str, torch.Tensor]], device: Device, vocab_size: int | None
) -> Iterator[dict[str, torch.Tensor]]:
    for batch in batches:
        if vocab_size is not None:
            _check_ids(batch["tokens"], vocab_size)
        yield {
            key: value.to(device.torch_device, non_blocking=True)
            for key, value in batch.items()
            if key != "dataset_id"  # which of the blended corpora each sample is from
        }


def _check_ids(tokens: torch.Tensor, vocab_size: int) -> None:
    """Rejects ids beyond the vocabulary, for which the embedding fails without naming the data or reads other memory.

    The tokens are on the CPU here, so the check does not wait for the device.
    """
    low, high = (int(end) for end in torch.aminmax(tokens))
    if low < 0 or high >= vocab_size:
        raise DataError(
            f"the data holds token id {high if high >= vocab_size else low}, the vocabulary has {vocab_size}: a .bin file is damaged, "
            "or was made with another tokenizer; prepare the data again"
        )
