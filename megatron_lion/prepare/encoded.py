"""EncodedDocument, the token ids of one document: the return type of every encoder."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class EncodedDocument:
    """Token ids of a document.

    Attributes:
        ids: (N,) token ids in the dtype of the token files.
        lengths: (S,) tokens of each sentence, all above 0; empty if documents are not divided into sentences.
        divided: number of sentences that were divided because they were too long.
    """

    ids: npt.NDArray[Any]
    lengths: npt.NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    divided: int = 0
