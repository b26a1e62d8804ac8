"""Mathematics in texts, by the package math-verify, which is optional."""

import functools
import threading

__all__ = ["equal", "last_expression"]


def _patience() -> int | None:
    """Seconds that math-verify may take, which it counts by a signal, and signals reach only the main thread."""
    return 30 if threading.current_thread() is threading.main_thread() else None


@functools.lru_cache(maxsize=4096)
def _parsed(latex: str) -> list:
    from math_verify import parse

    return parse(f"${latex}$", parsing_timeout=_patience())  # nothing for what is no mathematics


def equal(given: str, gold: str) -> bool:
    """Whether two expressions, LaTeX or plain, are equal as mathematics.

    >>> equal("0.5", r"\\frac{1}{2}"), equal("18.00", "18"), equal("x+1", "x-1")
    (True, True, False)
    """
    from math_verify import verify

    return bool(verify(_parsed(gold), _parsed(given), timeout_seconds=_patience()))


def last_expression(text: str) -> str | None:
    """The expression in a text that math-verify takes for its final answer; None if there is none."""
    from math_verify import parse

    found = parse(text, parsing_timeout=_patience())
    return str(found[-1]).rstrip(" .,;:") if found else None  # the end of a sentence is none of an expression's: 1/2.
