"""Dataclasses from plain data, as YAML gives it; what does not fit is refused by name."""

import contextlib
import difflib
import types
import typing
from dataclasses import MISSING, fields, is_dataclass

__all__ = ["parsed", "unknown_key", "value_of"]

MANY = 40  # names that nobody reads in an error


def unknown_key(key: str, known, where: str) -> ValueError:
    """The error that tells of a key which is none of the known ones. where: what stands before it in its name."""
    close = difflib.get_close_matches(str(key), known, n=1)
    hint = f"{close[0]!r}, or another of" if close else "one of"  # first, since there may be many
    names = sorted(known) if len(known) <= MANY else f"the {len(known)} that `diffmas schema` has"
    return ValueError(f"{where}{key}: expected {hint} {names}, got an unknown key")


def _describe(kind) -> str:
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return " or ".join(_describe(k) for k in typing.get_args(kind))
    if is_dataclass(kind):
        return "a mapping"
    return "null" if kind is type(None) else str(kind) if typing.get_args(kind) else kind.__name__


def value_of(value, kind, where: str):
    """`value` as `kind`; a number written as 5e-5 is a string in YAML 1.1. Raises ValueError that starts with `where`."""
    origin = typing.get_origin(kind)
    options = typing.get_args(kind) if origin in (typing.Union, types.UnionType) else (kind,)
    for option in options:
        base = typing.get_origin(option) or option
        if is_dataclass(base) and isinstance(value, dict):
            return parsed(base, value, where + ".")
        if base is list and isinstance(value, list):
            item = typing.get_args(option)
            return [value_of(v, item[0], f"{where}[{i}]") for i, v in enumerate(value)] if item else value
        if base is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
            with contextlib.suppress(ValueError):
                return float(value)
        elif isinstance(base, type) and isinstance(value, base) and isinstance(value, bool) == (base is bool):
            return value
    raise ValueError(f"{where}: expected {_describe(kind)}, got {value!r}")


def parsed(cls, data: dict, where: str = ""):
    """A dataclass from plain data; raises ValueError that starts with `where` and names the key that does not fit."""
    kinds, known = typing.get_type_hints(cls), {f.name: f for f in fields(cls)}
    if not isinstance(data, dict):
        raise ValueError(f"{where or 'config'}: expected a mapping, got {type(data).__name__}")
    for key in data:
        if key not in known:
            raise unknown_key(key, known, where)
    for name, f in known.items():
        if name not in data and f.default is MISSING and f.default_factory is MISSING:
            raise ValueError(f"{where}{name}: expected a value, got none")
    return cls(**{key: value_of(value, kinds[key], where + key) for key, value in data.items()})
