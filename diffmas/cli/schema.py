"""The JSON schema of config.yaml, from its dataclasses, for editors."""

import inspect
import types
import typing
from dataclasses import MISSING, fields, is_dataclass

from diffmas.agents.options import CHOICES
from diffmas.cli.config import DTYPES, Config, OtherModel
from diffmas.cli.methods import METHODS
from diffmas.cli.training_section import training_kinds
from diffmas.evaluation.scorer import MATCHERS
from diffmas.evaluation.tasks import TASKS
from diffmas.evaluation.tasks.task import PARTS
from diffmas.training.settings import RECIPES

__all__ = ["schema"]

# Texts that have to be one of some, by field; "task", "part" and "match" may be none.
ONE_OF = {**CHOICES, "dtype": DTYPES, "recipe": tuple(RECIPES), "methods": METHODS}
ONE_OF |= {"task": (*TASKS, None), "part": (*PARTS, None), "match": (*MATCHERS, None)}

NAMES = {str: "string", int: "integer", float: "number", bool: "boolean", list: "array", dict: "object", type(None): "null"}


def schema() -> dict:
    """Of `diffmas.cli.config.Config`, the fields of transformers' TrainingArguments included; JSON Schema 2020-12."""
    root = _of(Config)
    root["properties"]["training"] = _object({name: _of(kind) for name, kind in training_kinds().items()})
    root["properties"]["others"] = {"type": "object", "additionalProperties": _of(OtherModel)}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "diffmas config.yaml", **root}


def _of(kind) -> dict:
    if is_dataclass(kind):
        kinds = typing.get_type_hints(kind)
        known = {f.name: _field(f, kinds[f.name]) for f in fields(kind)}
        required = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
        return {"description": inspect.getdoc(kind), **_object(known, required)}
    origin, inside = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        some = [_of(k) for k in inside]
        return {} if {} in some else {"anyOf": some}
    if origin is list and inside:
        return {"type": "array", "items": _of(inside[0])}
    # YAML 1.1 reads 5e-5 as a string; what is none of NAMES, as a function, no file can hold.
    return {"type": ["number", "string"]} if origin is float else {"type": NAMES[origin]} if origin in NAMES else {}


def _field(field, kind) -> dict:
    """With what it may be, and what it is where nobody says."""
    found = _of(kind)
    if field.name in ONE_OF:
        some = {"enum": list(ONE_OF[field.name])}
        found = {**found, "items": some} if found.get("type") == "array" else some
    return found if field.default is MISSING else {**found, "default": field.default}


def _object(properties: dict, required: list[str] = ()) -> dict:
    return {"type": "object", "properties": properties, "additionalProperties": False, "required": list(required)}
