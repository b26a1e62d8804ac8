"""Copies of a trace's rows: in one run, in another trace's storage, in a file."""

from typing import Self

import numpy as np
import torch
from torch import Tensor

from diffmas.trace import file
from diffmas.trace.autograd import reposition
from diffmas.trace.cache import CacheFace
from diffmas.trace.spec import spec_of
from diffmas.trace.store import Hold
from diffmas.trace.views import Segment, rows_of

__all__ = ["Copying"]


class Copying(CacheFace):
    """What a `Trace` does with the values of its rows."""

    def repack(self) -> Self:
        """A copy of what it sees in fresh rows, one run per sequence, with position offsets applied to the keys;
        differentiable.

        Worth it before a long decode over many segments or offsets. Positions become the ones they were read at.
        """
        total = sum(self.lengths)
        hold = Hold(self._store, self._segments)
        offset, rows = [], []
        with self._store.allocation():
            first = done = self._store.write(self._store.allocate(total), total, self._lineage)
            hold.claimed.append((first, first + total))
        for segments in self._segments:
            row = []
            for s in segments:
                offset.append(torch.full((s.length,), s.offset))
                row.append(s._replace(start=done, position=s.position + s.offset, offset=0))
                done += s.length
            rows.append(row)
        order = self._order
        if total:
            src, offset, dst = rows_of(self.segments), torch.cat(offset), np.arange(first, done)
            with self._store.lock:
                self._store.token_ids.write(dst, torch.from_numpy(self._store.token_ids.read(src)))
            src, dst = torch.from_numpy(src), torch.from_numpy(dst)
            moves = []
            for layer, pool in zip(self.spec.layers, self._store.pools):
                if pool is None:
                    continue
                with self._store.lock:
                    pool.reserve(self._store.top, self._store.rows)
                by = offset if layer.rope != "none" else torch.zeros_like(offset)
                inv_freq = self.spec.frequencies(layer, pool.device) if by.any() else torch.zeros(0, device=pool.device)
                moves.append((pool, (*(x.to(pool.device) for x in (src, dst, by)), inv_freq, layer.rope == "interleaved")))
            order = reposition(order, moves, self._lineage, self.spec.backend, hold)
        return self._view(rows, None, self._next, order)

    def save(self, path) -> None:
        """Writes the rows it sees to one safetensors file, with fingerprints of model, adapter and RoPE, and a checksum.

        Raises ValueError for an empty trace.
        """
        if not any(self.lengths):
            raise ValueError("trace: expected one that holds tokens, got an empty one")
        file.write(path, self.spec.fingerprint(), self._segments, self._next, *_rows_of(self))

    @classmethod
    def load(cls, path, model, offload: str | None = None) -> Self:
        """A trace of a patched model from a file that `save` wrote. offload: as `Trace` takes it.

        Raises ValueError for a file that is missing, damaged, or of another model or adapter. These are told apart by all
        their weights, rounded to bfloat16: what differs by less than that is the same model.
        """
        spec = spec_of(model)
        return cls.of_rows(spec, *file.read(path, spec.fingerprint()), offload=offload)

    @classmethod
    def of_rows(
        cls, model, segments: list[list[Segment]], next_positions: list[int], kv: list[tuple[Tensor, Tensor]],
        ids: Tensor | None = None, capacity: int | None = None, offload: str | None = None,
    ) -> Self:  # fmt: skip
        """A trace with rows that were written before: kv, by layer, k and v [rows, Hkv, D]; segments of these rows; ids [rows],
        their token ids, -1 where there is none."""
        return cls(model, len(segments), capacity, offload=offload)._with_rows(segments, next_positions, kv, ids)

    def adopted(self, other: Self) -> Self:
        """The other's view, of a copy of its rows in this trace's store."""
        rows, done = [[] for _ in range(other.batch_size)], 0
        for s in other.segments:
            rows[s.sequence].append(s._replace(start=done))
            done += s.length
        return self._with_rows(rows, other.next_positions, *_rows_of(other))

    def _with_rows(self, segments, next_positions, kv, ids: Tensor | None) -> Self:
        """A view of rows from elsewhere, which are copied into this trace's store as constants; see `of_rows`."""
        store, rows = self._store, kv[0][0].shape[0] if kv else 0
        hold = Hold(store)  # until the view is there
        with store.allocation():
            first = store.write(store.allocate(rows), rows, self._lineage)
            hold.claimed.append((first, first + rows))
            store.token_ids.write(np.arange(first, first + rows), ids)
        for layer, pair in zip(self.spec.layers, kv):
            pair = [x.to(self.spec.device(layer.index)) for x in pair]
            pool = store.pool(layer.index, *pair)
            with pool.writing(np.arange(first, first + rows)) as kv:
                for mine, x in zip(kv, pair):
                    mine[first : first + rows] = x
        moved = [[s._replace(start=s.start + first) for s in row] for row in segments]
        return self._view(moved, None, next_positions, torch.zeros(0))


def _rows_of(trace: Copying) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """What a trace sees, sequence by sequence, as `of_rows` takes it: kv and ids."""
    sequences = range(trace.batch_size)
    ids = torch.cat([trace.token_ids(b) for b in sequences])
    if not len(ids):
        return [], ids
    layers = [[trace.keys_values(i, b) for b in sequences] for i in range(len(trace))]
    return [tuple(torch.cat(column) for column in zip(*rows)) for rows in layers], ids
