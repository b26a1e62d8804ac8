"""The checks of the ops' public entry points: shapes, dtypes, devices, index ranges, memory that is written.

Every refusal is a ValueError that names the argument, what was expected and what came. Values are looked at on the CPU only,
where it needs no device sync.
"""

import numpy as np
import torch
from torch import Tensor

from diffmas.ops import reference
from diffmas.ops.quantize import PAYLOADS

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FLOAT_MAX = torch.finfo(torch.float32).max
MAX_HEAD_DIM = 512


def refuse(argument: str, expected: str, got) -> None:
    raise ValueError(f"{argument}: expected {expected}, got {got}")


def expect(condition: bool, argument: str, expected: str, got) -> None:
    if not condition:
        refuse(argument, expected, got)


def check_shape(name: str, x: Tensor, shape: tuple) -> None:
    """`shape` holds sizes, or names for sizes that are free."""
    if x.shape != shape:
        fits = x.dim() == len(shape) and all(isinstance(want, str) or want == have for want, have in zip(shape, x.shape))
        expect(fits, name, f"shape [{', '.join(map(str, shape))}]", f"{list(x.shape)}")


def check_floats(like: Tensor, **tensors: Tensor | None) -> None:
    device, dtype = like.device, like.dtype
    for name, x in tensors.items():
        if x is None:
            continue
        expect(x.dtype in (*FLOATS, torch.float64), name, "a floating-point tensor of 16, 32 or 64 bits", x.dtype)
        if x.device != device:
            refuse(name, f"a tensor on {device}", x.device)
        if (x.dtype == torch.float64) != (dtype == torch.float64) and name not in ("inv_freq", "cos", "sin"):
            refuse(name, f"a dtype that goes with {dtype}", x.dtype)
        if x.dim() and x.shape[-1] > 1 and x.stride(-1) != 1:
            refuse(name, "a last stride of 1", x.stride())


def values_of(x: Tensor) -> np.ndarray | None:
    """The values of an index, where looking at them needs no device sync: on the CPU."""
    return x.numpy() if x.device.type == "cpu" else None


def check_index(name: str, x: Tensor, like: Tensor, low: int | None = None, high: int | None = None) -> Tensor:
    """`x` as the kernels read it, contiguous int64."""
    if x.dtype not in (torch.int64, torch.int32) or x.dim() != 1:
        refuse(name, "a 1-D int64 or int32 tensor", f"{x.dtype} {list(x.shape)}")
    if x.device != like.device:
        refuse(name, f"a tensor on {like.device}", x.device)
    values = values_of(x)
    if values is not None and values.size:
        expect(low is None or values.min() >= low, name, f"values >= {low}", values.min())
        expect(high is None or values.max() < high, name, f"values < {high}", values.max())
    return x.long().contiguous()


def check_indptr(name: str, x: Tensor, like: Tensor, end: int) -> Tensor:
    x = check_index(name, x, like)
    expect(x.numel() >= 1, name, "at least one entry", 0)
    values = values_of(x)
    if values is not None and not (values[0] == 0 and values[-1] == end and (values[1:] >= values[:-1]).all()):
        refuse(name, f"values that rise from 0 to {end}", values)
    return x


def check_distinct(name: str, x: Tensor) -> None:
    """Two tokens in one row would make the result depend on their order."""
    values = values_of(x)
    if values is None or values.size < 2:
        return
    used = np.sort(values[values >= 0])
    again = used[1:] == used[:-1]
    if again.any():
        refuse(name, "distinct rows", f"repeated ones, {used[1:][again][0]} first")


def check_segments(seg_indptr: Tensor, seg_start: Tensor, seg_len: Tensor, rows: int) -> None:
    """Inside the pool, none empty, disjoint within a sequence: a row read twice would get its gradient twice at once."""
    indptr, start, length = map(values_of, (seg_indptr, seg_start, seg_len))
    if start is None or not start.size:
        return
    expect(length.min() >= 1, "seg_len", "lengths >= 1", length.min())
    if (start > rows - length).any():
        refuse("seg_start + seg_len", f"rows up to {rows}", (start + length).max())
    if start.size > 1:
        sequence = np.repeat(np.arange(indptr.size - 1), np.diff(indptr))
        order = np.lexsort((start, sequence))
        sequence, start, end = sequence[order], start[order], (start + length)[order]
        shared = (start[1:] < end[:-1]) & (sequence[1:] == sequence[:-1])
        if shared.any():
            refuse("seg_start", "disjoint segments within a sequence", f"row {start[1:][shared][0]} in two")


class Box:
    """Where a [rows, heads, D] tensor lies: sizes and strides with the wider one first, addresses in bytes."""

    def __init__(self, x: Tensor):
        strides = x.stride()
        self.sizes, self.strides = x.shape[:2], strides[:2]
        if strides[1] > strides[0]:
            self.sizes, self.strides = self.sizes[::-1], self.strides[::-1]
        self.d, self.element, self.empty = x.shape[2], x.element_size(), not x.numel()
        self.inner = (self.sizes[1] - 1) * self.strides[1] + self.d
        self.begin = x.data_ptr()
        self.end = self.begin + ((self.sizes[0] - 1) * self.strides[0] + self.inner) * self.element

    @property
    def overlaps_itself(self) -> bool:
        (rows, heads), (wide, narrow) = self.sizes, self.strides
        return not self.empty and ((heads > 1 and narrow < self.d) or (rows > 1 and wide < self.inner))

    def overlaps(self, other: "Box") -> bool:
        """Exact for one layout (K and V interleaved in one allocation); another layout inside the range counts as shared."""
        if self.empty or other.empty or self.begin >= other.end or other.begin >= self.end:
            return False
        delta, part = divmod(other.begin - self.begin, self.element)
        if self.strides != other.strides or self.element != other.element or part:
            return True
        rests = [delta]
        for stride, a, b in zip(self.strides, self.sizes, other.sizes):
            if stride and max(a, b) > 1:  # up to two steps of this stride come near
                rests = [r - step * stride for r in rests for step in (r // stride, r // stride + 1) if abs(step) < max(a, b)]
        return any(abs(r) < max(self.d, other.d) for r in rests)


def check_written(k_pool: Tensor, v_pool: Tensor, **read: Tensor | None) -> None:
    """No element of the pools may be written twice, or be read under another name."""
    if k_pool.device.type == "meta":
        return
    boxes = {"k_pool": Box(k_pool), "v_pool": Box(v_pool)}
    for name, box in boxes.items():
        expect(
            not box.overlaps_itself, name, "rows and heads that do not overlap", f"strides {box.strides[0]}, {box.strides[1]}"
        )
    expect(not boxes["k_pool"].overlaps(boxes["v_pool"]), "k_pool", "memory of its own", "a tensor that overlaps v_pool")
    for other, x in read.items():
        if x is None:
            continue
        there = Box(x if x.dim() == 3 else x.unsqueeze(1) if x.dim() == 2 else x[None, None])
        for name, box in boxes.items():
            if box.overlaps(there):
                refuse(name, "memory of its own", f"a tensor that overlaps {other}")


def check_query(q: Tensor) -> tuple[int, int, int]:
    check_shape("q", q, ("n", "Hq", "D"))
    expect(q.shape[1] > 0 and q.shape[2] > 0, "q", "at least one head of at least one dimension", list(q.shape))
    expect(q.shape[2] <= MAX_HEAD_DIM, "q", f"a head size up to {MAX_HEAD_DIM}", q.shape[2])
    return tuple(q.shape)


def check_pools(k_pool: Tensor, v_pool: Tensor, heads: int | str, D: int | str) -> None:
    check_shape("k_pool", k_pool, ("R", heads, D))
    check_shape("v_pool", v_pool, tuple(k_pool.shape))
    if k_pool.dtype != v_pool.dtype:
        refuse("v_pool", f"the dtype of k_pool, {k_pool.dtype}", v_pool.dtype)


def check_quantized(q: Tensor, k_pool: Tensor, v_pool: Tensor, k_scale: Tensor | None, v_scale: Tensor | None) -> None:
    """Pools of 8 bits, checked by `check_pools` before, and their scales."""
    expect(k_scale is not None and v_scale is not None, "k_scale, v_scale", "both of them", "only one")
    expect(k_pool.dtype in PAYLOADS, "k_pool", f"one of {[str(x) for x in PAYLOADS]} where there are scales", k_pool.dtype)
    for name, x in (("k_pool", k_pool), ("v_pool", v_pool), ("k_scale", k_scale), ("v_scale", v_scale)):
        expect(x.device == q.device, name, f"a tensor on {q.device}", x.device)
    for name, x in (("k_pool", k_pool), ("v_pool", v_pool)):
        expect(x.shape[-1] == 1 or x.stride(-1) == 1, name, "a last stride of 1", x.stride())
    for name, x in (("k_scale", k_scale), ("v_scale", v_scale)):
        check_shape(name, x, tuple(k_pool.shape[:2]))
        expect(x.dtype == torch.float32, name, "float32", x.dtype)


def narrowed(x: Tensor | None, like: Tensor) -> Tensor | None:
    """Rotary tables are float64 for the float64 ops only."""
    return x.float() if x is not None and x.dtype == torch.float64 and like.dtype != torch.float64 else x


def frequencies_of(x: Tensor | None, like: Tensor) -> Tensor | None:
    """As the kernels read them: contiguous, in the accumulation dtype."""
    return None if x is None else x.to(reference.accumulator(like.dtype)).contiguous()
