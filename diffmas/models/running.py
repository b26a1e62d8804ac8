"""Which forward pass the modules that are called on this thread belong to."""

import threading

from diffmas.trace.forward_pass import ForwardPass

__all__ = ["forward_pass_here", "rows_here", "running"]


class Running(threading.local):
    """Of this thread: the forward pass whose layer runs, for the kernels of its parts; and the one whose rows go through, also
    where these run as they are."""

    forward_pass: ForwardPass | None = None
    rows: ForwardPass | None = None


_running = Running()


def forward_pass_here() -> ForwardPass | None:
    return _running.forward_pass


def rows_here() -> ForwardPass | None:
    return _running.rows


class running:  # noqa: N801
    """A context in which the parts of a layer that are called belong to a forward pass. kernels: whether theirs may serve."""

    def __init__(self, forward_pass: ForwardPass | None, kernels: bool = True):
        self.forward_pass, self.kernels = forward_pass, kernels

    def __enter__(self):
        self.before = _running.forward_pass, _running.rows
        _running.rows = self.forward_pass
        if self.kernels:
            _running.forward_pass = self.forward_pass

    def __exit__(self, *_):
        _running.forward_pass, _running.rows = self.before
