"""The trace: rows of keys and values, the views of them, and the autograd of writing and reading them."""

from diffmas.trace.plan import Segment
from diffmas.trace.trace import Trace

__all__ = ["Segment", "Trace"]
