"""Copies of a trace's rows: in one run, in another trace's storage, in a file, as tensors with a gradient."""

from typing import Self

import numpy as np
import torch
from torch import Tensor

from diffmas.trace import file
from diffmas.trace.autograd import reposition
from diffmas.trace.cache import CacheFace
from diffmas.trace.crossing import arrive, leave
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
        first, hold = self._write_rows(kv, ids)  # held until the view is there
        moved = [[s._replace(start=s.start + first) for s in row] for row in segments]
        return self._view(moved, None, next_positions, torch.zeros(0))

    def _write_rows(self, kv, ids: Tensor | None) -> tuple[int, Hold]:
        """Copies rows into this trace's store; the first of them there, and who holds them."""
        store, rows = self._store, kv[0][0].shape[0] if kv else 0
        hold = Hold(store)
        with store.allocation():
            first = store.write(store.allocate(rows), rows, self._lineage)
            hold.claimed.append((first, first + rows))
            store.token_ids.write(np.arange(first, first + rows), ids)
        for layer, pair in zip(self.spec.layers, kv):
            pair = [x.detach().to(self.spec.device(layer.index)) for x in pair]
            pool = store.pool(layer.index, *pair)
            with pool.writing(np.arange(first, first + rows)) as kv:
                for mine, x in zip(kv, pair):
                    mine[first : first + rows] = x
        return first, hold

    # ---- rows as tensors, with gradients -----------------------------------------------------------------------------

    def packed_rows(self) -> list[tuple[Tensor, Tensor]]:
        """K and V of all that it sees, by layer: copies [n, Hkv, D] each, sequence by sequence, as they were written (position
        offsets are not applied). Differentiable: their gradient goes to whoever wrote the rows.

        Raises ValueError for an empty trace.
        """
        if not any(self.lengths):
            raise ValueError("packed_rows: expected a trace that holds tokens, got an empty one")
        rows = torch.from_numpy(rows_of(self.segments))
        pools = [(pool, rows.to(pool.device)) for pool in self._store.pools]
        return leave(self._order, pools, self._lineage, Hold(self._store, self._segments))

    def extended(self, segments: list[list[Segment]], kv: list[tuple[Tensor, Tensor]]) -> Self:
        """A view with new rows behind what each sequence sees. Differentiable: their gradient goes to k and v.

        segments: for each sequence, of rows of k and v, at the positions that k was rotated for. kv: by layer, k and v [n, Hkv,
        D]. Raises ValueError for other layers, shapes or segments.
        """
        rows = kv[0][0].shape[0] if kv else 0
        if len(segments) != self.batch_size or any(not 0 <= s.start <= s.end <= rows for row in segments for s in row):
            raise ValueError(
                f"segments: expected a list for each of {self.batch_size} sequences, of {rows} rows; got {segments}"
            )
        if len(kv) != len(self.spec.layers):
            raise ValueError(f"kv: expected K and V of {len(self.spec.layers)} layers, got {len(kv)}")
        for layer, (k, v) in zip(self.spec.layers, kv):
            pool = self._store.pools[layer.index]
            shape = k.shape if pool is None else (rows, *pool.read([])[0].shape[1:])
            if k.shape != shape or v.shape != shape or k.dim() != 3 or k.shape[0] != rows:
                found = f"{list(k.shape)} and {list(v.shape)}"
                raise ValueError(f"kv: expected K and V [{rows}, Hkv, D] of layer {layer.index} as it has them, got {found}")
        if not rows:
            return self._view(self._segments, self._extents)
        first, hold = self._write_rows(kv, None)
        order = self._order
        if torch.is_grad_enabled() and any(x.requires_grad for pair in kv for x in pair):
            order = arrive(order, self._store.pools, first, kv, self._lineage, hold)
            for layer, pair in zip(self.spec.layers, kv):
                layer.records |= any(x.requires_grad for x in pair)  # else a frozen layer would leave them no gradient
        row = [[*own, *(s._replace(start=s.start + first) for s in new)] for own, new in zip(self._segments, segments)]
        nexts = [max([after, *(s.next_position for s in new)]) for after, new in zip(self._next, segments)]
        return self._view(row, None, nexts, order)


def _rows_of(trace: Copying) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """What a trace sees, sequence by sequence, as `of_rows` takes it: kv and ids."""
    sequences = range(trace.batch_size)
    ids = torch.cat([trace.token_ids(b) for b in sequences])
    if not len(ids):
        return [], ids
    layers = [[trace.keys_values(i, b) for b in sequences] for i in range(len(trace))]
    return [tuple(torch.cat(column) for column in zip(*rows)) for rows in layers], ids
