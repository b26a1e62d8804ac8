"""CUDA graphs without a GPU: the torch ops that work consists of are recorded, and run again on the same memory.

As on a GPU, recorded work has not run: what it wrote to is as it was, what it made is NaN until a replay, and who waits for the
device is an error. A replay runs no Python of the work's, and its writes are seen by nobody who counts versions.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "unique_consecutive", "masked_select", "bincount")


class Recorder(TorchDispatchMode):
    """ops: function, arguments, the tensors that it returned and are not its arguments' memory."""

    def __init__(self):
        super().__init__()
        self.ops, self._before = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.overloadpacket.__name__ in WAITS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        schema = func._schema
        given = [*args, *([None] * (len(schema.arguments) - len(args)))]
        for i, argument in enumerate(schema.arguments):
            x = kwargs.get(argument.name, given[i])
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._before += [(y.data, y.detach().clone()) for y in (x if isinstance(x, list) else [x])]
        out = func(*args, **kwargs)
        # By memory, too: in inference mode there are ops that return their argument or a tensor of its own, as the case may be.
        memory = {x.untyped_storage().data_ptr() for x in _tensors((*args, *kwargs.values()))}
        is_new = lambda x, how: how.alias_info is None or x.untyped_storage().data_ptr() not in memory
        returned = zip([out] if len(schema.returns) == 1 else out or (), schema.returns)
        made = [y.data for x, how in returned for y in _tensors(x) if is_new(y, how)]
        self.ops.append((func, args, kwargs, made))
        return out

    def undo(self):
        with torch.no_grad():
            for x, before in reversed(self._before):
                x.copy_(before)
            for *_, made in self.ops:
                for x in made:
                    if x.is_floating_point():
                        x.fill_(torch.nan)


class FakeGraph:
    """replays: how often it ran."""

    def __init__(self, work, *_):
        recorder, self.replays = Recorder(), 0
        try:
            with recorder:
                work()
        finally:
            recorder.undo()
        self.ops = recorder.ops

    def replay(self):
        self.replays += 1
        quiet = lambda x: x.data if isinstance(x, torch.Tensor) else x  # noqa: E731
        with torch.no_grad(), _disable_current_modes(), torch.autocast("cpu", enabled=False):
            for func, args, kwargs, made in self.ops:
                args = [list(map(quiet, x)) if isinstance(x, (list, tuple)) else quiet(x) for x in args]
                new = _tensors(func(*args, **kwargs))
                if made:
                    for x, y in zip(made, new, strict=True):
                        x.copy_(y)


def _tensors(out) -> list[torch.Tensor]:
    if isinstance(out, (list, tuple)):
        return [y for x in out for y in _tensors(x)]
    return [out] if isinstance(out, torch.Tensor) else []
