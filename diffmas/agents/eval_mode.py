"""Eval mode for as long as somebody needs it, in several threads at once."""

import contextlib
import threading
import weakref

from torch import nn

__all__ = ["evaluating"]

# Modules in eval mode: how many callers want that, and the mode before. By submodule, since systems share a model.
_EVALUATING: weakref.WeakKeyDictionary[nn.Module, tuple[int, bool]] = weakref.WeakKeyDictionary()
_EVALUATING_LOCK = threading.Lock()


@contextlib.contextmanager
def evaluating(module: nn.Module):
    """`module` in eval mode. Callers may overlap, in several threads: after the last one a submodule has its mode back."""
    modules = list(module.modules())
    with _EVALUATING_LOCK:
        for m in modules:
            users, mode = _EVALUATING.get(m) or (0, m.training)
            _EVALUATING[m] = users + 1, mode
        module.eval()
    try:
        yield
    finally:
        with _EVALUATING_LOCK:
            for m in modules:
                users, mode = _EVALUATING.pop(m)
                if users > 1:
                    _EVALUATING[m] = users - 1, mode
                else:
                    m.training = mode
