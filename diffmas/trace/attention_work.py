"""What attention's programs work on, found in a pass's tables once for all layers (`attention_work` of a backend)."""

from torch import Tensor

from diffmas.ops.backends import implementation
from diffmas.ops.fused import with_heads

__all__ = ["AttentionWork"]


class AttentionWork:
    """Of one forward pass. rows: how many all sequences together see, by the name of the view.

    Tables that can move do so unseen, on the device, when a graph is replayed. What was found then holds for one way through
    the layers, down in the forward and up in the backward; the first layer of the next way finds it anew. So it does in a
    capture, and the graph finds it again whenever it is replayed.
    """

    def __init__(self, rows: dict[str, int]):
        self._rows, self._moving, self._found = rows, False, {}

    def can_move(self, rows: int) -> None:
        """From now on the tables may move, to views of so many rows more."""
        self._rows, self._moving = {name: n + rows for name, n in self._rows.items()}, True
        self._found.clear()

    def of(
        self, kernel: str, layer: int, n: int, name: str, q: Tensor, view: tuple, causal: bool, *, k_pool: Tensor, scale: float,
        backend: str,
    ) -> dict[str, Tensor]:  # fmt: skip
        """The argument `work` of `cross_attention` (kernel "fwd") or its backward ("dq") in a layer, where its backend has one.
        q: [n, Hq, D], or flat; view: as `Tables` has it by that name."""
        if type(q) is not Tensor:
            return {}
        key = kernel, name, view[4] is None, q.shape, q.dtype, k_pool.shape, k_pool.dtype, backend
        work, last = self._found.get(key, (None, None))
        if last is None or (self._moving and (layer <= last if kernel == "fwd" else layer >= last)):
            heads = with_heads(q, n, k_pool.shape[2])
            find = implementation("attention_work", heads, backend)
            work = find(kernel, heads, k_pool, *view, scale, causal, False, self._rows[name])
        self._found[key] = work, layer
        return {} if work is None else {"work": work}
