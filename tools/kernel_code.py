"""What a compiled kernel follows from, in one word: a row of a report shows whether the kernel is still the row's."""

import ast
import functools
import hashlib
import inspect
import textwrap

import triton
import triton.language as tl

__all__ = ["fingerprint", "sources"]


def fingerprint(kernel: triton.JITFunction, *with_what) -> str:
    """Of a kernel, the functions that it calls, the constants of their modules, and what it is compiled with. Neither comments,
    docstrings nor layout are in it; the version of Triton is not either."""
    text = repr((sorted(sources(kernel).items()), with_what))
    return "x" + hashlib.sha256(text.encode()).hexdigest()[:8]  # never a number to a reader of CSV


@functools.cache
def sources(kernel: triton.JITFunction) -> dict[str, str]:
    """By name: the code of the kernel and of all that it calls, and the values of constants that they name."""
    found, left = {}, {kernel.fn.__qualname__: kernel}
    while left:
        name, value = left.popitem()
        if not isinstance(value, triton.JITFunction):
            found[name] = repr(value)
            continue
        found[name] = None  # it may call itself
        tree = ast.parse(textwrap.dedent(inspect.getsource(value.fn)))
        of_module = value.fn.__globals__
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and node.id in of_module and node.id not in found:
                one = of_module[node.id]
                one = one.value if isinstance(one, tl.constexpr) else one
                if isinstance(one, triton.JITFunction | int | float | str):
                    left[node.id] = one
        found[name] = ast.unparse(_without_docstring(tree))
    return found


def _without_docstring(tree: ast.Module) -> ast.Module:
    (function,) = tree.body
    if ast.get_docstring(function) is not None:
        function.body = function.body[1:] or [ast.Pass()]
    return tree
