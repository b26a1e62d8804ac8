"""The host's time for one token's attention on a GPU that need not be there: inject and cross_attention through their
launchers, of which everything runs but the driver's launch.

    python -m tools.triton_host        # CPU microseconds a layer: ours, and with Triton's own look-up at every launch

Not under TRITON_INTERPRET=1, where kernels cannot be compiled.
"""

import time

import torch
import triton
from triton.backends.compiler import GPUTarget

from diffmas.kernels import blocks, cross_attention, inject, launch

__all__ = ["OneToken"]


class _Driver:
    """Of an H200, as far as a launch asks."""

    get_current_device = get_current_stream = lambda self, *_: 0
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)
    get_active_torch_device = lambda self: torch.device("cpu")


class _Binary:
    """What a kernel is compiled to: a launch is counted."""

    packed_metadata = function = None

    def __init__(self, launches: list):
        self.run = lambda *args: launches.append(args)

    def launch_metadata(self, *args):
        return None

    def __getitem__(self, grid):
        def runner(*args):
            driver = triton.runtime.driver.active
            self.run(*grid, driver.get_current_stream(driver.get_current_device()), *args)

        return runner


class OneToken:
    """A layer of one token that splits its view of 4096 rows: 16 heads over 8 of K/V, D = 128, bfloat16, norms and RoPE.

    Puts itself in the place of this process's Triton driver and compiler. launches: the arguments of each so far; looked_up:
    how often Triton was asked for a binary.
    """

    def __init__(self):
        self.launches, self.looked_up = [], 0
        blocks.architecture = lambda device: 90
        cross_attention.processors = inject.processors = lambda device: 132
        triton.runtime.driver.set_active(_Driver())
        binary, run = _Binary(self.launches), triton.runtime.jit.JITFunction.run

        def compile(kernel, key, signature, device, *_):
            return kernel.device_caches[device][0].setdefault(key, binary)

        def look_up(kernel, *args, **kwargs):
            self.looked_up += 1
            return run(kernel, *args, **kwargs)

        triton.runtime.jit.JITFunction._do_compile = compile
        triton.runtime.jit.JITFunction.run = look_up
        rand = lambda *shape: torch.zeros(shape, dtype=torch.bfloat16)
        index = lambda *x: torch.tensor(x)
        self.pools = rand(2, 8, 32768, 128).transpose(1, 2).unbind()
        self.q, self.k, self.table, self.weight = rand(1, 16, 128), rand(1, 8, 128), rand(1, 128), rand(128)
        self.view = index(0, 1), index(0, 1), index(0), index(4096), None, None, 0.088, True, False
        self.slot = index(3)
        # Once for all layers, and not counted.
        self.work = cross_attention.attention_work("fwd", self.q, self.pools[0], *self.view)
        self.launches.clear()
        self.looked_up = 0

    def layer(self) -> None:
        rope = self.table, self.table, self.slot, self.weight, self.weight, 1e-6, False
        q_rot = inject.inject(self.q, self.k, self.k, *rope, *self.pools)
        cross_attention.cross_attention(q_rot, *self.pools, *self.view, self.work)


def _least(one: OneToken, seconds: float = 5.0) -> float:
    """The least CPU time of a layer, in microseconds: other work may be on the machine, which takes turns and caches."""
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.process_time()
        for _ in range(50):
            one.layer()
        best = min(best, (time.process_time() - start) / 50)
        one.launches.clear()  # or each launch finds new memory for its arguments, which a driver does not keep
    return best * 1e6


def main() -> None:
    if launch.interpreting():
        raise SystemExit("kernels cannot be compiled under TRITON_INTERPRET=1")
    torch.set_num_threads(1)
    one = OneToken()
    one.layer()
    launches, ours = len(one.launches), _least(one)
    launch.Launch.__call__ = lambda self, kernel, pointers, numbers: kernel[self.grid](*pointers, *numbers, **self.constants)
    plain = _least(one)
    print(
        f"{launches} launches, CPU time: {ours:.1f} us; Triton looks up each binary: {plain:.1f} us; ratio {plain / ours:.2f}"
    )


if __name__ == "__main__":
    main()
