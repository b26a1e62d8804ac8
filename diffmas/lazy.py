"""Names that a package imports when they are first used: torch and transformers take seconds, which `diffmas --help`, and what
is plain data in a package, need not wait for."""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module

__all__ = ["importing"]


def importing(package: str, where: dict[str, str], submodules: Sequence[str] = ()) -> tuple[Callable, Callable]:
    """`__getattr__` and `__dir__` of a package. where: the module of each name. submodules: of the package, by their names."""

    def __getattr__(name: str):
        if name in where:
            return getattr(import_module(where[name]), name)
        if name in submodules:
            return import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*vars(sys.modules[package]), *where, *submodules})

    return __getattr__, __dir__
