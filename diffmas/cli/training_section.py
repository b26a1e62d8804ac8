"""The section `training` of config.yaml: fields of transformers' TrainingArguments."""

import ast
import builtins
import functools
import typing
from importlib.util import find_spec
from pathlib import Path

from diffmas.cli.plain_data import unknown_key, value_of

__all__ = ["training_fields", "training_kinds"]

# Fields that scripts read and transformers' Trainer does not, and what `diffmas train` has for them.
OF_SCRIPTS = {
    "do_eval": "evaluation follows from data.validation and eval_strategy", "do_predict": "use `diffmas evaluate`",
    "do_train": "`diffmas train` trains", "overwrite_output_dir": "use `diffmas train --overwrite`",
    "resume_from_checkpoint": "use `diffmas train --resume`",
}  # fmt: skip


class OwnKind:
    """In the place of transformers' own types, such as SchedulerType."""


class _Names(dict):
    def __missing__(self, name: str):
        return getattr(builtins, name, None) or getattr(typing, name, OwnKind)


@functools.cache
def training_kinds() -> dict[str, type]:
    """What `training` may hold: the types of TrainingArguments' fields, by name.

    Read from transformers' source: its import waits for torch, longer than a misspelt key should.
    """
    source = Path(find_spec("transformers").origin).with_name("training_args.py")
    tree, kinds = ast.parse(source.read_text(encoding="utf-8")), {}
    (of_class,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments")
    for node in of_class.body:
        if not isinstance(node, ast.AnnAssign) or node.target.id in {"output_dir", *OF_SCRIPTS}:
            continue
        options = {key.arg: key.value for key in getattr(node.value, "keywords", ())}
        if "init" not in options:  # a field that says it is none of the constructor's
            kinds[node.target.id] = eval(ast.unparse(node.annotation), {}, _Names())
    return kinds


def training_fields(given: dict) -> dict:
    """The `training` section, checked against TrainingArguments; numbers get the kinds of its fields.

    Raises ValueError naming a key that is unknown or does not fit.
    """
    kinds, checked = training_kinds(), {}
    for key, value in given.items():
        if key == "output_dir":
            raise ValueError("training.output_dir: expected it at the top level as output_dir, got it here")
        if key in OF_SCRIPTS:
            raise ValueError(f"training.{key}: expected none, since it would have no effect, got {value!r}; {OF_SCRIPTS[key]}")
        if key not in kinds:
            raise unknown_key(key, kinds, "training.")
        kind = kinds[key]
        simple = [k for k in (typing.get_args(kind) or (kind,)) if k in (bool, int, float, str, dict, list, type(None))]
        if len(simple) == len(typing.get_args(kind) or (kind,)):  # transformers checks the other kinds
            value = value_of(value, kind, f"training.{key}") if value is not None or type(None) in simple else value
        checked[key] = value
    return checked
