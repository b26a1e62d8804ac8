"""The trace: rows of keys and values, the views of them, and the autograd of writing and reading them."""

from diffmas.trace.trace import Trace
from diffmas.trace.views import Segment

__all__ = ["Segment", "Trace"]
