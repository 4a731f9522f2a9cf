"""Counts the bytes that operations of torch and Triton kernels read and write."""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = ("mm", "bmm", "addmm", "matmul")
# They address single elements, or return a view or an empty tensor.
NO_PASS = (
    "view",
    "_unsafe_view",
    "t",
    "transpose",
    "detach",
    "index",
    "index_put_",
    "empty_like",
    "empty",
    "slice",
    "alias",
    "permute",
    "split",
    "split_with_sizes",
    "unbind",
    "select",
)


class CountedBytes(TorchDispatchMode):
    """Counts, for each operation on a tensor of `numel` elements or more, the bytes that it reads and writes of such tensors.

    Attributes:
        bytes: by operation, matrix products excepted.
        products: matrix products with such tensors.
        launches: operations on tensors of any size, by name; kernels in Triton's interpreter by their own.
    """

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.bytes, self.products, self.is_paused = numel, Counter(), 0, False
        self.launches: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        if self.is_paused:
            return output
        name = str(function.overloadpacket).removeprefix("aten.")
        if name not in NO_PASS:
            self.launches[name] += 1
        inputs = [value for value in args if isinstance(value, torch.Tensor)]
        outputs = [
            value for value in (output if isinstance(output, tuple) else (output,)) if isinstance(value, torch.Tensor)
        ]
        sizes = [value.numel() * value.element_size() for value in (*inputs, *outputs) if value.numel() >= self.numel]
        if name in PRODUCTS:
            self.products += bool(sizes)
        elif sizes and name not in NO_PASS:
            self.bytes[name] += sum(sizes)
        return output


@contextlib.contextmanager
def counted_kernels(operations: CountedBytes) -> Iterator[Counter[str]]:
    """Counts the bytes that kernels load and store in Triton's interpreter, and not the interpreter's own operations.

    It copies all arguments before a launch and back after it. The counter has "load" and "store", with every access, and
    "distinct", with every address once a launch: what an operation of torch would read and write.
    """
    from unittest.mock import patch

    import numpy as np
    from triton.runtime.interpreter import GridExecutor
    from triton.runtime.interpreter import interpreter_builder as builder

    launch = GridExecutor.__call__

    def launched(executor: Any, *args: Any, **options: Any) -> None:
        operations.is_paused = True
        operations.launches[executor.fn.__name__] += 1
        launch(executor, *args, **options)
        operations.is_paused = False
        for size, places in seen.items():
            found["distinct"] += size * len(np.unique(np.concatenate(places)))
        seen.clear()

    found: Counter[str] = Counter()
    seen: dict[int, list[Any]] = defaultdict(list)
    load, store = builder.create_masked_load, builder.create_masked_store

    def counted_load(places: Any, mask: Any, *more: Any) -> Any:
        values = load(places, mask, *more)
        found["load"] += int(mask.data.sum()) * values.data.itemsize
        seen[values.data.itemsize].append(places.data[mask.data.astype(bool)])
        return values

    def counted_store(places: Any, values: Any, mask: Any, *more: Any) -> Any:
        found["store"] += int(mask.data.sum()) * values.data.itemsize
        seen[values.data.itemsize].append(places.data[mask.data.astype(bool)])
        return store(places, values, mask, *more)

    with (
        patch.object(GridExecutor, "__call__", launched),
        patch.object(builder, "create_masked_load", counted_load),
        patch.object(builder, "create_masked_store", counted_store),
    ):
        yield found
