"""Which token each row holds, for rows that came from token ids: what rules about text need to know of a trace.

Nothing waits for the device while tokens are written: their ids are kept as they came, and read when somebody asks.
"""

import numpy as np
from torch import Tensor

__all__ = ["TokenIds"]

MOST_PENDING = 64  # writes that are kept before they are read


class TokenIds:
    """The token ids of a store's rows, -1 where none is known. The caller holds the store's lock."""

    def __init__(self):
        self._ids = np.zeros(0, dtype=np.int64)
        self._pending: list[tuple[np.ndarray, Tensor | None]] = []

    def write(self, rows: np.ndarray, ids: Tensor | None) -> None:
        """Rows of the tokens `ids` [len(rows)], or of none."""
        self._pending.append((rows, ids))
        if len(self._pending) > MOST_PENDING:
            self._settle()

    def read(self, rows: np.ndarray) -> np.ndarray:
        """The ids of rows, -1 where none was ever written."""
        self._settle()
        found = np.full(len(rows), -1, dtype=np.int64)
        known = rows < len(self._ids)
        found[known] = self._ids[rows[known]]
        return found

    def _settle(self) -> None:
        top = max((int(rows.max()) + 1 for rows, _ in self._pending if len(rows)), default=0)
        if top > len(self._ids):
            more = np.full(max(top, 2 * len(self._ids)) - len(self._ids), -1, dtype=np.int64)
            self._ids = np.concatenate((self._ids, more))
        for rows, ids in self._pending:
            self._ids[rows] = -1 if ids is None else ids.cpu().numpy()
        self._pending = []
