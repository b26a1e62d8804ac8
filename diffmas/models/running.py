"""Which forward pass the modules that are called on this thread belong to."""

import threading

from diffmas.trace.forward_pass import ForwardPass

__all__ = ["forward_pass_here", "running"]


class Running(threading.local):
    """Of this thread: the forward pass whose layer runs."""

    forward_pass: ForwardPass | None = None


_running = Running()


def forward_pass_here() -> ForwardPass | None:
    return _running.forward_pass


class running:  # noqa: N801
    """A context in which the parts of a layer that are called belong to a forward pass."""

    def __init__(self, forward_pass: ForwardPass):
        self.forward_pass = forward_pass

    def __enter__(self):
        self.before, _running.forward_pass = _running.forward_pass, self.forward_pass

    def __exit__(self, *_):
        _running.forward_pass = self.before
