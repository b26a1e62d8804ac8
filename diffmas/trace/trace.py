"""The trace: the K/V memory that the agents of a batch of episodes share, append-only, as a transformers Cache.

Storage and view are two things. A store (diffmas.trace.store) owns the rows of every layer; a `Trace` owns, per sequence, the
ordered list of *segments* that it sees. Forks, joins and `keep` make new views over the same rows and copy nothing. A trace
changes in one place, `commit` (diffmas.trace.appending), which makes the tokens of a forward pass part of it; and where
transformers asks a cache to change in place, it becomes another view of its store (`_become`).
"""

import numpy as np
import torch
from torch import Tensor

from diffmas.trace.appending import AdapterOf, Appending
from diffmas.trace.autograd import inherit
from diffmas.trace.copying import Copying
from diffmas.trace.pool import DeferredKVGrad
from diffmas.trace.reading_codes import ReadingCodes
from diffmas.trace.spec import check_offload, spec_of
from diffmas.trace.store import Extent, Hold, Store, ranges_in
from diffmas.trace.viewing import Viewing
from diffmas.trace.views import JOINS, KINDS, Segment, Size, joined, length_of, reindexed, rows_of, seen_in

__all__ = ["Trace"]


class Trace(Appending, Copying, ReadingCodes, Viewing):
    """The shared K/V memory of `batch_size` episodes over all layers of a patched model.

    model: a model that `diffmas.patch_model` was called on, or its `ModelSpec`. capacity: tokens per sequence to make room for
    at once; the trace grows beyond it by itself. Pass it as `past_key_values` (`cache` since transformers 5.24) to the model's
    forward and generate. Padded tokens never enter it: the sequences of a batch may differ in length, and one that is padding
    alone appends nothing (its hidden states are zeros). An attention_mask tells padding from new tokens, and hides no rows:
    what a sequence sees is its view (`keep`, `reading`).

    offload: "cpu" keeps the rows, and their gradients in backward, in pinned host memory; on the device are those of the layer
    that runs and of the next one. For traces that are longer than a GPU's memory; what it costs is the bus: each forward brings
    what it sees of each layer, backward the gradients there and back, too. None: as `patch_model` was told.

    Raises ValueError for a model that is not patched, a batch_size or capacity that is not positive, another offload.

        >>> model = patch_model(model)
        >>> trace = Trace(model, batch_size=1)
        >>> output = model(input_ids=torch.tensor([[3, 4, 5]]), past_key_values=trace)
        >>> left, right = trace.fork(2)
        >>> output = model(input_ids=torch.tensor([[6]]), past_key_values=left)
        >>> trace.lengths, left.lengths, Trace.join([left, right]).lengths
        ([3], [4], [4])
    """

    def __init__(self, model, batch_size: int = 1, capacity: int | None = None, *, offload: str | None = None):
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        if capacity is not None and capacity < 1:
            raise ValueError(f"capacity: expected at least 1 token per sequence, got {capacity}")
        check_offload(offload)
        self.spec = spec_of(model)
        self._store = Store(len(self.spec.layers), batch_size * (capacity or 0), (offload or self.spec.offload) == "cpu")
        self._see([[] for _ in range(batch_size)], torch.zeros(0))
        # Who writes next, recorded with every segment: one for all sequences, or a list with one for each.
        self.agent: str | list[str] | None = None
        # Which adapter each sequence's new tokens go through, where several have rows of their own; None: all the active one.
        self.adapter: AdapterOf | None = None

    def _see(self, segments, order, extents=None, next_positions=None, lineage: int = 0) -> None:
        """All that a view is, in one place; the store asks it which rows it needs."""
        self._segments: list[list[Segment]] = segments
        self._order: Tensor = order  # the order token of the last forward pass (diffmas.trace.autograd)
        self._extents: list[Extent | None] = extents or [None] * len(segments)
        self._next: list[int] = next_positions or [0] * len(segments)  # the position of each sequence's next token
        self._lineage = lineage
        self._deferred: tuple[DeferredKVGrad | None, int] = (None, 0)  # the run that the last forward was a step of, its steps
        self.generation = None  # of the generate that it was given to (diffmas.models.generate), while that runs
        self._codings = self._store.codings_of([s for row in segments for s in row])  # alive as long as somebody reads them
        self._store.add_holder(self)

    def held(self) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """The rows it needs: what it sees, and the room of the extents that it can go on in."""
        room = []
        for row, extent in zip(self._segments, self._extents):
            if extent is not None and row and row[-1].end == extent.filled:
                room.append((extent.filled, extent.end))
        return ranges_in(self._segments), room

    # ---- what it holds -----------------------------------------------------------------------------------------------

    @property
    def batch_size(self) -> int:
        return len(self._segments)

    @property
    def lengths(self) -> list[int]:
        """Tokens per sequence."""
        return [length_of(row) for row in self._segments]

    @property
    def segments(self) -> list[Segment]:
        """The table of segments, sequence by sequence in the order they are read."""
        return [s for row in self._segments for s in row]

    @property
    def next_positions(self) -> list[int]:
        """The position each sequence's next token gets."""
        return list(self._next)

    def positions(self, sequence: int) -> Tensor:
        """The positions that a sequence's tokens are read at, in order; [length] int64."""
        parts = [torch.arange(s.position + s.offset, s.next_position) for s in self._segments[sequence]]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)

    def token_ids(self, sequence: int) -> Tensor:
        """The token ids of a sequence's rows, in order, -1 for rows that no token was written to (latent steps, embeddings);
        [length] int64."""
        return torch.from_numpy(self._ids(self._segments[sequence]))

    def _ids(self, segments: list[Segment]) -> np.ndarray:
        ids = self._store.ids(segments)
        kinds = np.repeat([KINDS.index(s.kind) for s in segments], [s.length for s in segments])
        ids[kinds == KINDS.index("latent")] = -1  # whatever these rows held before
        return ids

    def keys_values(self, layer: int, sequence: int) -> tuple[Tensor, Tensor]:
        """A copy of one sequence's K and V rows as they were written (position offsets are not applied), where they are kept;
        [length, Hkv, D] each. Quantised rows: what they stand for."""
        if self._store.pools[layer] is None and self._store.frozen is None:
            raise ValueError("keys_values: expected a trace that holds tokens, got an empty one")
        return self._store.read(layer, self._segments[sequence])

    @property
    def rows(self) -> int:
        """Rows of each layer that this trace, its forks, and the forward passes and graphs over them need, spare room
        included, quantised rows not."""
        return self._store.rows_held

    @property
    def sizes(self) -> dict[str | None, Size]:
        """Of the rows that it sees, each of them once, by who wrote them."""
        found = {}
        for agent in dict.fromkeys(s.agent for s in self.segments):
            own = [s for s in self.segments if s.agent == agent]
            total = sum(self._bytes_in(layer, own) for layer in range(len(self)))
            found[agent] = Size(len(np.unique(rows_of(own))), total)
        return found

    def _bytes_in(self, layer: int, segments: list[Segment]) -> int:
        """Of the K and V of a layer's heads that see them."""
        count = self._store.heads(layer) if any(s.heads is not None for s in segments) else 1
        return sum(self._store.bytes_of(layer, *seen_in([segments], layer, head)) for head in range(count)) // count

    def memory(self) -> int:
        """Bytes that the rows of all layers occupy, spare room and forks included."""
        frozen = self._store.frozen
        return sum(p.bytes for p in self._store.pools if p) + (frozen.bytes if frozen else 0) + self._store.code_bytes()

    def __repr__(self):
        return f"Trace(batch_size={self.batch_size}, lengths={self.lengths}, layers={len(self)})"

    def __len__(self):
        return len(self.spec.layers)

    # ---- views: nothing is copied; forks and parts: viewing.py -------------------------------------------------------

    def _view(self, segments, extents=None, next_positions=None, order=None, lineage: int | None = None) -> "Trace":
        view = object.__new__(type(self))
        view.spec, view._store, view.agent, view.adapter = self.spec, self._store, self.agent, self.adapter
        view._see(
            [[s._replace(sequence=b) for s in row] for b, row in enumerate(segments)],
            self._order if order is None else order, None if extents is None else list(extents),
            list(self._next if next_positions is None else next_positions), self._lineage if lineage is None else lineage,
        )  # fmt: skip
        return view

    def _become(self, other: "Trace") -> None:
        """In place, the other view of the same store."""
        generation = self.generation
        self._see(other._segments, other._order, other._extents, other._next, other._lineage)
        self.generation, self.adapter = generation, other.adapter

    def reading(self, segments: list[list[Segment]], beside: "Trace | None" = None) -> "Trace":
        """A view in which sequence b sees segments[b], in that order: rows of any sequences of this trace, at the positions
        that the segments' offsets give them. The next positions stay. beside: a trace with the same storage, such as one that
        this one was selected from; its rows may be seen too.

        Raises ValueError unless there is a list for each sequence, of rows that these traces see, none of them twice in one.
        """
        if len(segments) != self.batch_size:
            raise ValueError(f"segments: expected a list for each of {self.batch_size} sequences, got {len(segments)}")
        if beside is not None and beside._store is not self._store:
            raise ValueError("beside: expected a trace with the same storage, got one with another")
        seen = rows_of(self.segments if beside is None else self.segments + beside.segments)
        for b, row in enumerate(segments):
            rows = rows_of(row)
            if not np.isin(rows, seen).all():
                raise ValueError(f"segments[{b}]: expected rows that this trace sees, got others")
            if len(np.unique(rows)) < len(rows):
                raise ValueError(f"segments[{b}]: expected every row once, got one twice")
        if beside is None:
            return self._view(segments)
        lineage, order = self._ordered_after([self, beside])
        return self._view(segments, order=order, lineage=lineage)

    # ---- several branches ---------------------------------------------------------------------------------------------

    @staticmethod
    def join(traces: list["Trace"], positions: str | list[str] = "shift") -> "Trace":
        """One trace that sees, per sequence, all that the given traces see, in their order; common segments once.

        The traces must be forks of one trace, and share only what all of them begin with. Agents that write independently take
        forks of an empty one: `a, b = Trace(model, batch_size).fork(2)`. Traces of another origin, such as loaded ones, must be
        constants (`detach`): their rows are copied, and have nothing in common with the others. `positions` of what each wrote
        after the common part: keep: as written (branches overlap). shift: each branch is moved, as a block, behind the one
        before it. reindex: all tokens are renumbered 0, 1, 2, ... same_branch: all branches are moved to start where the common
        part ends. Or a list, with one for each trace; reindex then renumbers its tokens from where those before it end. A
        segment read at a position offset is served by rotating the queries that read it: no key is rewritten."""
        if not traces:
            raise ValueError("traces: expected at least one, got an empty list")
        each = [positions] * len(traces) if isinstance(positions, str) else list(positions)
        if len(each) != len(traces) or not set(each) <= set(JOINS):
            raise ValueError(f"positions: expected one of {JOINS}, or one for each of {len(traces)} traces, got {positions!r}")
        home = next((t for t in traces if t._order.requires_grad), traces[0])  # nobody can copy what has a gradient
        for t in traces:
            if t.spec is not home.spec:
                raise ValueError("traces: expected traces of one patched model, got one of another model or patch")
            if t.batch_size != home.batch_size:
                raise ValueError(f"traces: expected batch size {home.batch_size} in all, got {t.batch_size}")
            if t._store is not home._store and t._order.requires_grad:
                raise ValueError(
                    "traces: expected forks of one trace, got traces of different origin with gradients; let the agents write "
                    "on forks of one empty trace: a, b = Trace(model, batch_size).fork(2)"
                )
        traces = [t if t._store is home._store else home.adopted(t) for t in traces]
        first = traces[0]
        rows, nexts = [], []
        for b in range(first.batch_size):
            row, end = joined([t._segments[b] for t in traces], each, [t._next[b] for t in traces])
            rows.append(row)
            nexts.append(end)
        lineage, order = first._ordered_after(traces)
        if positions == "reindex":
            rows, nexts = reindexed(rows)
        return first._view(rows, None, nexts, order, lineage)

    @staticmethod
    def stack(traces: list["Trace"]) -> "Trace":
        """One trace with the sequences of all given ones, one after the other, so that they go on in one forward; `select`
        takes them apart again. Raises ValueError unless they are forks of one trace, all of them detached or none."""
        if not traces:
            raise ValueError("traces: expected at least one, got an empty list")
        first = traces[0]
        if any(t._store is not first._store or t._lineage != first._lineage for t in traces):
            raise ValueError("traces: expected forks of one trace, all of them detached or none, got others")
        lineage, order = first._ordered_after(traces)
        flat = lambda lists: [x for xs in lists for x in xs]  # noqa: E731
        segments, extents = flat(t._segments for t in traces), flat(t._extents for t in traces)
        return first._view(segments, extents, flat(t._next for t in traces), order, lineage)

    @torch.enable_grad()  # a view, like fork and keep: that it was made under no_grad detaches nothing
    def _ordered_after(self, traces: list["Trace"]) -> tuple[int, Tensor]:
        """The lineage and the order token of a reader of all branches, who waits for the writers of each."""
        store, lineages = self._store, {t._lineage for t in traces}
        if len(lineages) == 1:
            return self._lineage, torch.cat([t._order.flatten() for t in traces])
        # Some branch is detached from rows that another gives a gradient: the gradient of each row goes to the lineage that
        # wrote it, if a branch that sees the row needs it.
        writers = sorted(frozenset.union(*(store.needs_grad[x] for x in lineages)))
        lineage = store.new_lineage(writers)
        orders = []
        for writer in writers:
            branches = [t for t in traces if writer in store.needs_grad[t._lineage]]
            rows = np.unique(rows_of([s for t in branches for s in t.segments]))
            rows = torch.from_numpy(store.written_by(rows, writer))
            order = torch.cat([t._order.flatten() for t in branches])
            codings = [c for c in store.codings_of([s for t in branches for s in t.segments]) if c.lineage == writer]
            if len(rows) or codings:
                hold, pools = Hold(store, [t.segments for t in branches]), [p for p in store.pools if p]
                order = inherit(order, [(p, rows.to(p.device)) for p in pools], codings, lineage, writer, hold)
            orders.append(order)
        return lineage, torch.cat(orders)
