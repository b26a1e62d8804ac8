"""What the launchers share."""

import contextlib
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "Launch", "accumulator", "ceil_div", "dot_dtype", "interpreting", "on", "once_per_shape", "power_of_two", "processors",
    "rows_of",
]  # fmt: skip

TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float64: tl.float64}
NOTHING = contextlib.nullcontext()

# Grids, constants and tiles follow from shapes and dtypes: looking them up is faster than computing them, and every layer and
# latent step asks for the same ones. Bounded, because the number of tokens differs from batch to batch.
once_per_shape = functools.lru_cache(maxsize=4096)


class Launch:
    """A kernel's grid and constants for one set of shapes: launch(kernel, pointers, numbers) is
    kernel[grid](*pointers, *numbers, **constants).

    Triton looks at each argument of each launch to find the binary, which takes twice as long as all else that the host does.
    What it found is remembered here for arguments of the same kinds: dtypes, alignments, values of the numbers, device. Of what
    Triton does at a launch, only its launch hooks run from then on.
    """

    __slots__ = ("_ready", "constants", "grid")

    def __init__(self, grid: tuple[int, ...], constants: dict):
        self.grid, self.constants, self._ready = grid, constants, {}

    def __call__(self, kernel, pointers: tuple, numbers: tuple) -> None:
        """pointers: the kernel's first arguments, tensors or, but for the first, None. numbers: those that follow."""
        kinds = [x if x is None else (x.data_ptr() % 16, x.dtype) for x in pointers]
        key = (id(kernel), pointers[0].get_device(), *kinds, *numbers)
        ready = self._ready.get(key)
        if ready is None:
            self._look_up(key, kernel, pointers, numbers)
        else:
            run, constants = ready
            run(*pointers, *numbers, *constants)

    def _look_up(self, key, kernel, pointers, numbers):
        compiled = kernel[self.grid](*pointers, *numbers, **self.constants)
        if compiled is None:  # the interpreter
            return
        if len(self._ready) == 256:  # pools that grow have new strides
            self._ready.clear()
        names = kernel.arg_names[len(pointers) + len(numbers) :]
        run = compiled[(*self.grid, 1, 1)[:3]]
        self._ready[key] = run, tuple(self.constants[name] for name in names)


def on(x: Tensor):
    """Launch on the GPU of `x`. Nothing to do where that one is current, or for the interpreter on a CPU."""
    if x.is_cuda and x.get_device() != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return NOTHING


def interpreting() -> bool:
    """Triton's interpreter runs the kernels: TRITON_INTERPRET was set when they were imported."""
    return triton.knobs.runtime.interpret


def accumulator(dtype: torch.dtype):
    """As `reference.accumulator`, in Triton's terms; float64 is for the interpreter's gradient checks."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def dot_dtype(*operands: torch.dtype):
    """The dtype of products: the widest of the operands'."""
    return TYPES[functools.reduce(torch.promote_types, operands)]


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors; a few without a GPU, so that the interpreter runs splits."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def ceil_div(a: int, b: int) -> int:
    """As triton.cdiv, which takes microseconds on the host."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n and 1."""
    return 1 << max(n - 1, 0).bit_length()


def rows_of(x: Tensor) -> Tensor:
    """`x` with a last stride of 1, as the kernels expect. A gradient that autograd expanded has stride 0."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
