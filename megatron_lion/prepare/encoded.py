"""A document as token ids: what every encoder returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class EncodedDocument:
    """A document as ids.

    Attributes:
        ids: (N,) in the dtype they are stored in.
        lengths: (S,) tokens of each sentence, none 0; empty where documents are not divided into sentences.
        divided: sentences that were divided because they were too long.
    """

    ids: npt.NDArray[Any]
    lengths: npt.NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    divided: int = 0
