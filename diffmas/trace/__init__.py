"""The trace: rows of keys and values, the views of them, and the autograd of writing and reading them."""

from typing import TYPE_CHECKING

from diffmas.lazy import importing

if TYPE_CHECKING:
    from diffmas.trace.trace import Trace
    from diffmas.trace.views import Segment

_WHERE = {"Trace": "diffmas.trace.trace", "Segment": "diffmas.trace.views"}
__getattr__, __dir__ = importing(__name__, _WHERE)

__all__ = ["Segment", "Trace"]
