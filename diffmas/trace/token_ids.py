"""Which token each row holds, for rows that came from token ids: what rules about text need to know of a trace.

Ids are kept as they came, and read when somebody asks, or when there are many: one copy from the device then has them all.
"""

from collections.abc import Iterator

import numpy as np
import torch
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
        known = [ids for _, ids in self._pending if ids is not None]
        found = {device: _together([x for x in known if x.device == device]) for device in {x.device for x in known}}
        for rows, ids in self._pending:
            self._ids[rows] = -1 if ids is None else next(found[ids.device])
        self._pending = []


def _together(ids: list[Tensor]) -> Iterator[np.ndarray]:
    """Tensors of one device as arrays, by one copy from it."""
    together = torch.cat([x.long() for x in ids]).cpu().numpy()
    return iter(np.split(together, np.cumsum([len(x) for x in ids])[:-1]))
