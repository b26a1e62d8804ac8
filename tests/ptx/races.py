"""Which accesses of a block's threads to its memory are ordered by barriers, byte by byte."""

import numpy as np

from ptx.text import Fault

__all__ = ["Order"]

NEVER = -1


class Order:
    """Times of the last accesses to every byte. Two accesses by different threads of which one writes need a barrier between
    them: of the block, or of the warp if both are of one. Time goes on at every access and barrier, and through programs, so
    that nothing has to be cleared."""

    def __init__(self, size: int, threads: int):
        """size: bytes, a multiple of 16."""
        self.threads, self.warps = threads, threads // 32
        self.written = np.zeros(size, np.int32)  # when
        self.writer = np.zeros(size, np.int32)  # which thread
        self.read = np.zeros((self.warps, size), np.int32)  # when by each warp
        self.now = 1
        self.block_met, self.warp_met = 1, np.ones(self.warps, np.int32)
        self.last_write = self.last_read = NEVER

    def meet(self, warps=None) -> None:
        """A barrier of the block, or of some warps each on its own."""
        self.now += 1
        if warps is None:
            self.block_met = self.now
            self.warp_met[:] = self.now
        else:
            self.warp_met[warps] = self.now

    def reads(self, rows: np.ndarray, n: int, threads: np.ndarray, what: str) -> None:
        """Threads [k] read the n bytes from rows [k] * n on."""
        self.now += 1
        warps = threads // 32
        if self.last_write >= self.block_met:
            self._after_writes(rows, n, threads, warps, what)
        self.read.reshape(self.warps, -1, n)[warps, rows] = self.now
        self.last_read = self.now

    def writes(self, rows: np.ndarray, n: int, threads: np.ndarray, what: str) -> None:
        self.now += 1
        warps = threads // 32
        if self.last_write >= self.block_met:
            self._after_writes(rows, n, threads, warps, what)
        if self.last_read >= self.block_met:
            seen = self.read.reshape(self.warps, -1, n)[:, rows] >= self.block_met  # [warps, k, n]
            seen[warps, np.arange(len(rows))] = False  # a warp's own reads
            if seen.any():
                at = np.argwhere(seen)[0]
                raise Fault(f"race: {what} by thread {threads[at[1]]}, warp {at[0]} may still read there: no barrier between")
        self.written.reshape(-1, n)[rows] = self.now
        self.writer.reshape(-1, n)[rows] = threads[:, None]
        self.last_write = self.now

    def _after_writes(self, rows, n, threads, warps, what) -> None:
        when = self.written.reshape(-1, n)[rows]
        if when.max(initial=NEVER) < self.block_met:
            return
        who = self.writer.reshape(-1, n)[rows]
        met = np.where(who // 32 == warps[:, None], self.warp_met[warps][:, None], self.block_met)
        wrong = (when >= met) & (who != threads[:, None])
        if wrong.any():
            i, j = np.argwhere(wrong)[0]
            raise Fault(f"race: {what} by thread {threads[i]} after a write by thread {who[i, j]}: no barrier between")
