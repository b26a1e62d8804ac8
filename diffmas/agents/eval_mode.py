"""Eval mode for as long as somebody needs it, in several threads at once."""

import contextlib
import threading
import weakref

from torch import nn

__all__ = ["evaluating"]

# Modules in eval mode: how many callers want that, and the mode of each submodule before the first of them.
_EVALUATING: weakref.WeakKeyDictionary[nn.Module, tuple[int, list]] = weakref.WeakKeyDictionary()
_EVALUATING_LOCK = threading.Lock()


@contextlib.contextmanager
def evaluating(module: nn.Module):
    """`module` in eval mode. Callers may overlap, in several threads: after the last one every submodule has its mode back."""
    with _EVALUATING_LOCK:
        users, modes = _EVALUATING.get(module) or (0, [(m, m.training) for m in module.modules()])
        _EVALUATING[module] = users + 1, modes
        module.eval()
    try:
        yield
    finally:
        with _EVALUATING_LOCK:
            users, modes = _EVALUATING[module]
            if users > 1:
                _EVALUATING[module] = users - 1, modes
            else:
                del _EVALUATING[module]
                for m, mode in modes:
                    m.training = mode
