"""Python's cycle collector and a training step."""

import contextlib
import gc

__all__ = ["no_collections"]


@contextlib.contextmanager
def no_collections():
    """Inside, Python's cycle collector waits. A graph of many latent steps is so many objects that it would look at all of
    Python's memory once or twice a step, and a graph is freed without it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
