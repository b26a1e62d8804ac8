"""The trace: rows of keys and values, the views of them, and the autograd of writing and reading them."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffmas.trace.trace import Trace
    from diffmas.trace.views import Segment

# Imported when first used: torch takes seconds, which what is plain data here need not wait for.
_WHERE = {"Trace": "diffmas.trace.trace", "Segment": "diffmas.trace.views"}


def __getattr__(name: str):
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = ["Segment", "Trace"]
