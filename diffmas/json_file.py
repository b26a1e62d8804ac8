"""JSON files: whole ones, or an error that names them. Nothing is imported for them that takes time."""

import json
import os
from pathlib import Path

__all__ = ["read_json", "write_json"]


def read_json(file: Path):
    """The contents of a JSON file; raises ValueError naming the file if it is missing or damaged."""
    if not file.is_file():
        raise ValueError(f"{file}: expected this file, found none")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: expected whole JSON, got a damaged file ({error})") from error


def write_json(file: Path, data) -> None:
    """Writes JSON in one step: a crash leaves the whole file or none."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, file)
