"""EncodedDocument, the token ids of one document: the return type of every encoder."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

NO_SENTENCES: npt.NDArray[np.int32] = np.zeros(0, dtype=np.int32)


class EncodedDocument(NamedTuple):
    """Token ids of a document.

    Attributes:
        ids: (N,) token ids in any integer dtype.
        lengths: (S,) tokens of each sentence, all above 0; empty if documents are not divided into sentences.
        divided: number of sentences that were divided because they were too long.
    """

    ids: npt.NDArray[Any]
    lengths: npt.NDArray[np.int32] = NO_SENTENCES
    divided: int = 0
