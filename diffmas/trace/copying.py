"""Copies of a trace's rows: in one run, in 8 bits, in another trace's storage, in a file, as tensors with a gradient."""

import functools
from typing import Self

import numpy as np
import torch
from torch import Tensor

from diffmas.ops.backends import check_reads
from diffmas.ops.quantize import format_of
from diffmas.trace import file
from diffmas.trace.autograd import reposition
from diffmas.trace.cache import CacheFace
from diffmas.trace.crossing import arrive, leave
from diffmas.trace.frozen import Frozen, renumbered, rows_seen
from diffmas.trace.offload import runs_of
from diffmas.trace.spec import spec_of
from diffmas.trace.store import Hold
from diffmas.trace.views import FROZEN, Segment, apart, is_quantised, rows_of

__all__ = ["Copying"]


class Copying(CacheFace):
    """What a `Trace` does with the values of its rows."""

    def repack(self) -> Self:
        """A copy of what it sees in fresh rows, one run per sequence, with position offsets applied to the keys;
        differentiable.

        Worth it before a long decode over many segments or offsets. Positions become the ones they were read at.
        """
        if any(s.start >= FROZEN for s in self.segments):
            raise ValueError("repack: expected rows as they were written, got quantised ones or codes, which cannot be moved")
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

    def quantize(self, bits: str = "int8") -> Self:
        """A trace that sees the same rows in 8 bits: a copy of them in a store of its own, constants that attention reads as
        they are. What is written on it stays in full precision, and has its gradients. For a long context that many read: bytes
        and time of reading it are half of 16 bits.

        bits: "int8" or "fp8" (e4m3), with a scale for each row and head, read in the attention kernels; "int4": rows of sixteen
        levels, half a byte an element in files, one in memory. Rows that are quantised already are copied. The pools that the
        rows came from stay as long as a trace of theirs does.

        Raises ValueError for an empty trace, for one that a gradient would have to reach (`detach` it), for rows on the host
        (`offload`), for other bits than the trace has already, and for a backend that cannot read them.

            >>> with torch.no_grad():
            ...     context = prefill(model, torch.arange(3, 40))
            >>> small = context.quantize("int8")
            >>> small.memory() < context.memory(), small.lengths == context.lengths
            (True, True)
        """
        format_of(bits)
        check_reads(self.spec.backend)
        if not any(self.lengths):
            raise ValueError("trace: expected one that holds tokens, got an empty one")
        if self._order.requires_grad:
            raise ValueError("trace: expected one that no gradient has to reach (`detach`), got one with gradients")
        if apart(self.segments)[2]:
            raise ValueError("trace: expected rows as they were written, got some that are read with codes")
        store, (own, quantised) = self._store, rows_seen(self.segments)
        if store.offloaded:
            raise ValueError("offload: expected rows on the device, where quantised ones are read, got rows on the host")
        parts = []
        if len(own):
            ranges = [slice(*span) for span in runs_of(own)]
            with store.lock:
                ids = store.token_ids.read(own)
            parts.append(Frozen.of(bits, [pool.read(ranges) for pool in store.pools], ids))
        if len(quantised):
            parts.append(store.frozen.take(quantised))
        frozen = functools.reduce(Frozen.with_rows, parts)
        segments = renumbered(self._segments, own, quantised)
        small = type(self)(self.spec, self.batch_size)._with_frozen(frozen, segments, self._next)
        small.agent = self.agent
        return small

    def _with_frozen(self, frozen: Frozen, segments: list[list[Segment]], next_positions: list[int]) -> Self:
        """A view of quantised rows in an empty trace's store, where they lie: with offloaded weights, nobody else knows."""
        hold = Hold(self._store)  # until the view is there
        self._store.freeze(frozen, hold)
        return self._view(segments, None, next_positions)

    def save(self, path) -> None:
        """Writes the rows it sees to one safetensors file, with fingerprints of model, adapter and RoPE, and a checksum;
        quantised rows as they are, those of int4 with two elements a byte.

        Raises ValueError for an empty trace.
        """
        if not any(self.lengths):
            raise ValueError("trace: expected one that holds tokens, got an empty one")
        segments, *rows = self._rows()
        file.write(path, self.spec.fingerprint(), segments, self._next, *rows)

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
        ids: Tensor | None = None, frozen: Frozen | None = None, *, capacity: int | None = None, offload: str | None = None,
    ) -> Self:  # fmt: skip
        """A trace with rows that were written before: kv, by layer, k and v [rows, Hkv, D]; segments of these rows; ids [rows],
        their token ids, -1 where there is none. frozen: quantised rows, which segments count from FROZEN on. Raises ValueError
        where the backend cannot read these, and with `offload`."""
        return cls(model, len(segments), capacity, offload=offload)._with_rows(segments, next_positions, kv, ids, frozen)

    def adopted(self, other: Self) -> Self:
        """The other's view, of a copy of its rows in this trace's store."""
        segments, *rows = other._rows()
        return self._with_rows(segments, other.next_positions, *rows)

    def _with_rows(self, segments, next_positions, kv, ids: Tensor | None, frozen: Frozen | None) -> Self:
        """A view of rows from elsewhere, which are copied into this trace's store as constants; see `of_rows`."""
        quantised, held = 0, Hold(self._store)  # held until the view is there
        if frozen is not None:
            check_reads(self.spec.backend)
            if self._store.offloaded:
                raise ValueError("offload: expected rows as they were written, got quantised ones, which stay on the device")
            quantised = self._store.freeze(frozen.to(self._device), held) - FROZEN
        first, hold = self._write_rows(kv, ids) if kv else (0, None)
        moved = [[s._replace(start=s.start + (first if s.start < FROZEN else quantised)) for s in row] for row in segments]
        return self._view(moved, None, next_positions, torch.zeros(0))

    def _device(self, layer: int) -> torch.device:
        """Where rows from elsewhere go; raises ValueError where that is not known yet."""
        device = self._store.device(layer) or self.spec.device(layer)
        if device.type == "meta":
            raise ValueError(
                f"trace: expected a layer {layer} in memory, where its rows go, got one whose weights are offloaded"
            )
        return device

    def _write_rows(self, kv, ids: Tensor | None) -> tuple[int, Hold]:
        """Copies rows into this trace's store; the first of them there, and who holds them."""
        store, rows = self._store, kv[0][0].shape[0] if kv else 0
        hold = Hold(store)
        with store.allocation():
            first = store.write(store.allocate(rows), rows, self._lineage)
            hold.claimed.append((first, first + rows))
            store.token_ids.write(np.arange(first, first + rows), ids)
        for layer, pair in zip(self.spec.layers, kv):
            pair = [x.detach().to(self._device(layer.index)) for x in pair]
            pool = store.pool(layer.index, *pair)
            with pool.writing(np.arange(first, first + rows)) as kv:
                for mine, x in zip(kv, pair):
                    mine[first : first + rows] = x
        return first, hold

    # ---- rows as tensors, with gradients -----------------------------------------------------------------------------

    def packed_rows(self) -> list[tuple[Tensor, Tensor]]:
        """K and V of all that it sees, by layer: copies [n, Hkv, D] each, sequence by sequence, as they were written (position
        offsets are not applied). Differentiable: their gradient goes to whoever wrote the rows.

        Raises ValueError for an empty trace, and for quantised rows and those that are read with codes.
        """
        if not any(self.lengths):
            raise ValueError("packed_rows: expected a trace that holds tokens, got an empty one")
        if any(s.start >= FROZEN for s in self.segments):
            raise ValueError("packed_rows: expected rows as they were written, got quantised ones or codes")
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

    def _rows(self) -> tuple[list[list[Segment]], list[tuple[Tensor, Tensor]], Tensor, Frozen | None]:
        """What it sees, sequence by sequence, as `of_rows` takes it: segments, kv, ids, frozen. Of rows that are read with
        codes, what these make of them."""
        store, quantised = self._store, apart(self.segments)[1]
        own = [s for s in self.segments if not is_quantised(s)]
        segments, done = [[] for _ in range(self.batch_size)], [0, FROZEN]
        for s in self.segments:
            which = int(is_quantised(s))
            segments[s.sequence].append(s._replace(start=done[which]))
            done[which] += s.length
        kv = [store.read(i, own) for i in range(len(self))] if own else []
        frozen = store.frozen.take(rows_of(quantised)) if quantised else None
        return segments, kv, torch.from_numpy(self._ids(own)), frozen
