"""One layer's K/V storage, and the autograd of writing and reading it.

Rows ("slots") are written once and never move, so attention saves nothing of K and V: its backward reads the pool again.
The order this needs is carried by a *token*, a zero-size tensor that threads through the writes and reads of a layer:

    inject(token, q, k, v) -> q_rot, token'         attend(token', q_rot) -> o

Autograd runs the backward of an inject only after the backward of everything that used its token', that is, of all later
readers of its rows. Each attend adds into the gradient pool, each inject takes its own rows out.

A run of latent steps reads the same earlier rows T times, and nobody needs the gradient of those before the run's first step
has been undone. So the backward of a step adds dK and dV of the run's own rows only and keeps (q, o, lse, do); a `flush` that
stands before the run on the token adds those of the earlier rows in one matrix-shaped pass: the gradient pool is read and
written once instead of T times.
"""

import contextlib
import ctypes
import mmap

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from diffmas.ops.register import call

__all__ = ["LatentRun", "Pool", "attend", "inherit", "reposition"]


HUGE_PAGE = 2 << 20  # bytes; a core reads K and V 10 to 20 % faster from huge pages
_libc = ctypes.CDLL(None) if hasattr(mmap, "MADV_HUGEPAGE") else None


def _ask_for_huge_pages(x: Tensor) -> None:
    """For fresh CPU memory of several huge pages; a wish that the system may ignore."""
    size = x.numel() * x.element_size()
    if _libc is None or x.device.type != "cpu" or size < 2 * HUGE_PAGE:
        return
    first = -(-x.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (x.data_ptr() + size) // mmap.PAGESIZE * mmap.PAGESIZE
    _libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_HUGEPAGE)


class Pool:
    """K and V of one layer: `k`, `v` [rows, Hkv, D], stored head-major so that the rows of one head are contiguous.

    Growing moves the storage, never a row's number; nothing outside holds on to the old storage. Gradient pools (float32,
    or float64 for float64 pools) live from the first read of a backward pass to its end; there is one pair per *lineage*:
    what reads a row as a constant must not add to the gradient that the row's writer takes out.
    """

    def __init__(self, rows: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device):
        self.k = self.v = None
        self._shape = (heads, head_dim)
        self._options = dict(dtype=dtype, device=device)
        self._grads: dict[int, tuple[Tensor, Tensor]] = {}
        self._kept: dict[tuple[int, LatentRun], list[tuple[Tensor, ...]]] = {}
        self._grads_of = -1  # the backward pass (autograd graph task) that gradient pools and kept steps belong to
        self.reserve(rows)

    @property
    def rows(self) -> int:
        return 0 if self.k is None else self.k.shape[0]

    def _zeros(self, rows: int, dtype: torch.dtype) -> Tensor:
        # Zero-filled: a kernel that copies whole tiles (a GPU's bulk copies) reads past a segment's end, and 0 * NaN is NaN.
        heads, head_dim = self._shape
        rows_of_heads = torch.empty(heads, rows, head_dim, dtype=dtype, device=self._options["device"])
        _ask_for_huge_pages(rows_of_heads)
        return rows_of_heads.zero_().transpose(0, 1)

    def reserve(self, rows: int) -> None:
        """Makes room for at least `rows` rows; doubles, so that n appends copy O(n) rows in all."""
        if rows <= self.rows:
            return
        rows = max(rows, 2 * self.rows)
        if self._shape[1] % 16:
            rows += -rows % 16  # a head's stride stays a multiple of 16: GPU kernels are compiled for that, or not
        with torch.inference_mode(False), torch.no_grad():  # the pool outlives an inference-mode caller
            for name in ("k", "v"):
                old, new = getattr(self, name), self._zeros(rows, self._options["dtype"])
                if old is not None:
                    new[: old.shape[0]] = old
                setattr(self, name, new)

    def grads(self, lineage: int) -> tuple[Tensor, Tensor]:
        """A lineage's gradient pools of the backward pass that is running: zeros at first, dropped at its end.

        A pass that stops half-way (an error, or torch.autograd.grad for a few inputs) leaves nothing behind for the next.
        """
        self._enter_pass()
        if lineage not in self._grads:
            dtype = torch.float64 if self.k.dtype == torch.float64 else torch.float32
            self._grads[lineage] = (self._zeros(self.rows, dtype), self._zeros(self.rows, dtype))
        return self._grads[lineage]

    def kept(self, lineage: int, run: "LatentRun") -> list[tuple[Tensor, ...]]:
        """(do, q, o, lse) of the run's steps that this backward pass has been through, the last step first."""
        self._enter_pass()
        return self._kept.setdefault((lineage, run), [])

    def _enter_pass(self) -> None:
        task = torch._C._current_graph_task_id()
        if task == -1 or task != self._grads_of:
            self._leave_pass()
            self._grads_of = task
            if task != -1:
                torch.autograd.Variable._execution_engine.queue_callback(self._leave_pass)

    def _leave_pass(self) -> None:
        self._grads, self._kept, self._grads_of = {}, {}, -1


class LatentRun:
    """Consecutive latent steps of one token per sequence. Remembers, for each layer that began the run with gradients,
    whether a flush stands before it on the token; if not, all older rows are constants."""

    def __init__(self):
        self.flushed: dict[Pool, bool] = {}


class Inject(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, token, q_weight, k_weight, pool, lineage, cos, sin, slots, eps, interleaved, backend):
        q_rot = call(
            "inject", q, q, k, v, cos, sin, slots, q_weight, k_weight, eps, interleaved, pool.k, pool.v, backend=backend
        )
        normed = q_weight is not None or k_weight is not None
        ctx.save_for_backward(q_weight, k_weight, *((q, k) if normed else ()))
        ctx.pool, ctx.lineage, ctx.tables, ctx.rest = pool, lineage, (cos, sin, slots), (eps, interleaved, backend)
        ctx.k_shape = k.shape
        return q_rot, token.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, dq_rot, _):
        q_weight, k_weight, *normed = ctx.saved_tensors
        # Without a norm the backward is linear: q and k only tell shape and dtype.
        q, k = normed or (dq_rot, dq_rot.new_empty(ctx.k_shape))
        eps, interleaved, backend = ctx.rest
        dq, dk, dv, dq_weight, dk_weight = call(
            "inject_backward", q, dq_rot, q, k, *ctx.tables, q_weight, k_weight, eps, interleaved,
            *ctx.pool.grads(ctx.lineage), backend=backend,
        )  # fmt: skip
        weights = (None if w is None else dw.to(w.dtype) for w, dw in ((q_weight, dq_weight), (k_weight, dk_weight)))
        return dq, dk, dv, None, *weights, *(None,) * 8


class Attend(torch.autograd.Function):
    """newest [B]: how many tokens at the end of each view learn here, None for all; run: who flushes the rest, if anybody."""

    @staticmethod
    def forward(ctx, q, token, pool, lineage, view, scale, interleaved, backend, newest, run):
        o, lse = call("cross_attention", q, q, pool.k, pool.v, *view, scale, True, interleaved, backend=backend)
        ctx.save_for_backward(q, o, lse)
        ctx.pool, ctx.view, ctx.rest = pool, view, (scale, True, interleaved)
        ctx.lineage, ctx.backend, ctx.newest, ctx.run = lineage, backend, newest, run
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        q, o, lse = ctx.saved_tensors
        pool = ctx.pool
        dq = call(
            "cross_attention_backward", q, do, None, q, o, lse, pool.k, pool.v, *ctx.view, *ctx.rest,
            *pool.grads(ctx.lineage), ctx.newest, True, backend=ctx.backend,
        )  # fmt: skip
        if ctx.run is not None:
            pool.kept(ctx.lineage, ctx.run).append((do, q, o, lse))
        return dq, *(None,) * 9


def _stream(x: Tensor):
    return torch.cuda.current_stream(x.device) if x.is_cuda else None


def _on(stream):
    """For a node that gives nothing but a token. Tokens lie on the CPU, so autograd would run it on the stream of whoever calls
    backward(), and not on that of its forward, where its neighbours run."""
    return contextlib.nullcontext() if stream is None else torch.cuda.stream(stream)


class Flush(torch.autograd.Function):
    """Stands before a latent run: its backward adds dK and dV of the older rows for all steps of the run at once."""

    @staticmethod
    def forward(ctx, token, pool, lineage, run, older, scale, interleaved, backend):
        ctx.pool, ctx.lineage, ctx.run, ctx.older, ctx.stream = pool, lineage, run, older, _stream(pool.k)
        ctx.rest, ctx.backend = (scale, False, interleaved), backend  # every step sees all of the older rows
        return token.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, _):
        pool, kept = ctx.pool, ctx.pool.kept(ctx.lineage, ctx.run)
        if kept:
            with _on(ctx.stream):
                do, q, o, lse = (torch.stack(x, 1).flatten(0, 1) for x in zip(*kept))  # [B * steps, ...], by sequence
                q_indptr = torch.arange(0, q.shape[0] + 1, len(kept), device=q.device)
                call(
                    "cross_attention_backward", q, do, None, q, o, lse, pool.k, pool.v, q_indptr, *ctx.older, *ctx.rest,
                    *pool.grads(ctx.lineage), None, False, backend=ctx.backend,
                )  # fmt: skip
            kept.clear()
        return (None,) * 8


class Reposition(torch.autograd.Function):
    @staticmethod
    def forward(ctx, token, pool, lineage, src, dst, shift, inv_freq, interleaved, backend):
        call("reposition", pool.k, src, dst, shift, inv_freq, interleaved, pool.k, pool.v, backend=backend)
        ctx.pool, ctx.lineage, ctx.rest, ctx.backend = pool, lineage, (src, dst, shift, inv_freq, interleaved), backend
        ctx.stream = _stream(pool.k)
        return token.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, _):
        with _on(ctx.stream):
            grads = ctx.pool.grads(ctx.lineage)
            call("reposition_backward", grads[0], *ctx.rest, *grads, backend=ctx.backend)
        return (None,) * 9


class Inherit(torch.autograd.Function):
    """Hands the gradient that readers of one lineage left in `rows` on to the lineage of the rows' writers."""

    @staticmethod
    def forward(ctx, token, pool, rows, readers, writers):
        ctx.pool, ctx.rest, ctx.stream = pool, (rows, readers, writers), _stream(pool.k)
        return token.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, _):
        rows, readers, writers = ctx.rest
        with _on(ctx.stream):
            for taken, given in zip(ctx.pool.grads(readers), ctx.pool.grads(writers)):
                given[rows] += taken[rows]
        return (None,) * 5


def attend(
    pool: Pool, token: Tensor, q: Tensor, k: Tensor, v: Tensor, slots: Tensor, view: tuple, *, scale: float,
    cos: Tensor | None = None, sin: Tensor | None = None, q_weight: Tensor | None = None,
    k_weight: Tensor | None = None, eps: float = 1e-6, interleaved: bool = False, lineage: int = 0, backend: str = "auto",
    newest: Tensor | None = None, run: LatentRun | None = None, older: tuple | None = None,
    shared: tuple[tuple, tuple] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Writes n new tokens' K/V into the pool and attends from them over their views; differentiable.

    q [n, Hq, D]; k, v [n, Hkv, D]; slots [n]; view: (q_indptr, seg_indptr, seg_start, seg_len, seg_shift, inv_freq) as
    in `diffmas.ops.cross_attention`; the new rows are the newest of each view; lineage: which gradient pools it uses.
    newest [B]: how many tokens at the end of each view were written by this call (and, in a latent run, by the run so
    far); run, and older with its first step: the views before the run, without q_indptr. shared: the same views as two, the
    rows that neighbouring sequences share, in one pass for all of them, and each sequence's rest; where no gradient is wanted.
    -> o [n, Hq, D], the next token.
    """
    tables, kind = (cos, sin, slots), (eps, interleaved)
    if not torch.is_grad_enabled():
        # These rows are constants; readers to come still order themselves behind the earlier writers: the same token.
        q_rot = call("inject", q, q, k, v, *tables, q_weight, k_weight, *kind, pool.k, pool.v, backend=backend)
        read = lambda view, causal: call(
            "cross_attention", q_rot, q_rot, pool.k, pool.v, *view, scale, causal, interleaved, backend=backend
        )
        if shared is None:
            return read(view, True)[0], token
        prefix, rest = shared
        return call("merge_states", q_rot, *read(prefix, False), *read(rest, True), backend=backend)[0], token
    if older is not None:
        run.flushed[pool] = token.requires_grad
        token = Flush.apply(token, pool, lineage, run, older, scale, interleaved, backend)
    in_run = run is not None and pool in run.flushed
    if not in_run and token.requires_grad:
        newest = None  # older rows learn, and at once
    if not in_run or not run.flushed[pool]:
        run = None
    q_rot, token = Inject.apply(q, k, v, token, q_weight, k_weight, pool, lineage, *tables, *kind, backend)
    return Attend.apply(q_rot, token, pool, lineage, view, scale, interleaved, backend, newest, run), token


def reposition(
    pool: Pool, token: Tensor, src, dst, shift, inv_freq, interleaved=False, lineage: int = 0, backend="auto"
) -> Tensor:
    """Copies rows `src` to `dst` with their keys rotated by `shift`; differentiable through the token it returns."""
    after = Reposition.apply(token, pool, lineage, src, dst, shift, inv_freq, interleaved, backend)
    return after if torch.is_grad_enabled() else token


def inherit(pool: Pool, token: Tensor, rows: Tensor, readers: int, writers: int) -> Tensor:
    """The token for readers of lineage `readers` of the distinct `rows` that were written in lineage `writers`."""
    return Inherit.apply(token, pool, rows, readers, writers)
