"""What transformers sees of a trace: a left-padded cache of its longest sequence. The body's hook works on the ragged one."""

import inspect

from torch import Tensor, stack, zeros
from torch.nn.functional import pad
from transformers.cache_utils import Cache

from diffmas.trace.views import FROZEN

__all__ = ["CacheFace", "LayerView", "cache_argument", "cache_name"]

NAMES = ("cache", "past_key_values")  # of a model's argument: since transformers 5.24, which prefers it, and before


def cache_name(given: dict, kind: type) -> str | None:
    """The name under which a cache of that kind is among the arguments `given`, if there is one."""
    return next((name for name in NAMES if isinstance(given.get(name), kind)), None)


def cache_argument(model) -> str:
    """What this transformers calls a model's cache."""
    return next(name for name in NAMES if name in inspect.signature(type(model).forward).parameters)


class CacheFace(Cache):
    """The transformers Cache interface, of 4.56 to 5.x, in terms of a Trace."""

    is_compileable = False
    is_croppable = True
    offloading, layer_class_to_replicate = False, None

    @property
    def layers(self) -> list["LayerView"]:
        """The layers as transformers shows those of a cache; to look at alone."""
        return [LayerView(self, i) for i in range(len(self))]

    @property
    def max_batch_size(self) -> int:
        return self.batch_size

    @property
    def is_initialized(self) -> bool:
        return any(self._segments)

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * len(self)

    @property
    def is_linear(self) -> list[bool]:
        return [False] * len(self)

    @property
    def is_dummy(self) -> list[bool]:
        return [False] * len(self)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return max(self.lengths) if self.generation is None else self.generation.columns(self.lengths)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.get_seq_length()

    def get_mask_sizes(self, query_length, layer_idx: int = 0) -> tuple[int, int]:
        new = query_length if isinstance(query_length, int) else len(query_length)  # a cache_position before 5.3
        return self.get_seq_length() + new, 0

    def get_max_length(self, layer_idx: int = 0) -> int:
        return -1

    get_max_cache_shape = get_max_length

    def update(self, *args, **kwargs):
        raise ValueError("this model is not patched: call diffmas.patch_model(model) before passing it a Trace")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._become(self.select(indices.tolist()))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._become(self.select([b for b in range(self.batch_size) for _ in range(repeats)]))

    def crop(self, length: int) -> None:
        """Forgets the newest tokens: -length of each sequence, or (length > 0) all beyond the longest's first `length`."""
        length = int(length)  # assisted decoding passes a tensor
        self.drop_newest([-length if length <= 0 else max(0, self.get_seq_length() - length)] * self.batch_size)

    def reset(self) -> None:
        empty = [[] for _ in self._segments]
        self._become(self._view(empty, None, [0] * self.batch_size, zeros(0)))

    def activate_past_recording(self, *args, **kwargs) -> None:
        """Assisted decoding asks for it before it crops; nothing to record, rows stay where they are."""


class LayerView:
    """One layer of a trace as a layer of transformers' caches; read-only.

    keys, values [B, Hkv, longest, D]: copies, with zeros on the left of shorter sequences; None for an empty trace. Raises
    ValueError for keys that are read at other positions than they were written at: `repack` the trace first, before it is
    quantised.
    """

    __slots__ = ("_index", "_trace")

    def __init__(self, trace: CacheFace, index: int):
        self._trace, self._index = trace, index

    @property
    def is_initialized(self) -> bool:
        return self._trace.is_initialized

    def get_seq_length(self) -> int:
        return max(self._trace.lengths)

    @property
    def keys(self) -> Tensor | None:
        if any(s.offset and s.start >= FROZEN for s in self._trace.segments):
            raise ValueError(
                "keys: expected a trace that is read where it was written, got coded or quantised rows at position offsets, "
                "whose keys cannot be moved: `keys_values` has them as they were written; or `repack` the trace before it is "
                "quantised"
            )
        if any(s.offset for s in self._trace.segments):
            raise ValueError("keys: expected a trace that is read where it was written, got position offsets; repack it first")
        return self._padded(0)

    @property
    def values(self) -> Tensor | None:
        return self._padded(1)

    def _padded(self, which: int) -> Tensor | None:
        if not self.is_initialized:
            return None
        rows = [self._trace.keys_values(self._index, b)[which] for b in range(self._trace.batch_size)]
        longest = max(map(len, rows))
        return stack([pad(x, (0, 0, 0, 0, longest - len(x), 0)) for x in rows]).transpose(1, 2)
