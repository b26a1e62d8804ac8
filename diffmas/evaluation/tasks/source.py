"""Where records come from: a file in a published form, or the Hugging Face hub by the package datasets."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

__all__ = ["from_file", "from_hub"]


def from_file(path) -> Iterator[tuple[str, dict]]:
    """(where, record) of a file of JSON lines or a JSON list, as it is or compressed (.gz); where: file and line, or number.

    Raises ValueError naming file and line of what is no record; FileNotFoundError if there is no file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a file of JSON lines or a JSON list, found none")
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            text = file.read()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected text in UTF-8 (.gz: compressed), got {error}") from error
    if text.lstrip().startswith("["):
        try:
            records = [(f"{path}, record {i}", record) for i, record in enumerate(json.loads(text), start=1)]
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{error.lineno}: expected a JSON list, got {error.msg}") from error
    else:
        records = _lines(path, text)
    for where, record in records:
        if not isinstance(record, dict):
            raise ValueError(f"{where}: expected an object, got {type(record).__name__}")
        yield where, record


def _lines(path: Path, text: str) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield f"{path}:{number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}:{number}: expected one JSON object per line, got {line.strip()[:60]!r} ({error})"
                ) from error


def from_hub(hub: str, config: str | None, split: str, gated: bool = False) -> Iterator[tuple[str, dict]]:
    """(where, record) of a split on the hub, from datasets' cache once it is there.

    Raises ValueError that says what to do: without the package datasets, for a gated set without access, and for a set that
    can neither be downloaded nor is in the cache.
    """
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"{hub}: loading from the hub needs the package datasets: pip install datasets") from error
    try:
        records = datasets.load_dataset(hub, config, split=split)
    except Exception as error:
        kind = type(error).__name__
        if gated and ("Gated" in str(error) or "gated" in str(error) or kind in ("GatedRepoError", "DatasetNotFoundError")):
            raise ValueError(
                f"{hub}: this set is gated: ask for access at https://huggingface.co/datasets/{hub}, then run `hf auth login` "
                "(or set HF_TOKEN)"
            ) from error
        first = str(error).strip().splitlines()[:1]
        raise ValueError(
            f"{hub}: expected the set on the hub or in datasets' cache, or a file of it by --path or evaluation.data, got "
            f"{kind}: {''.join(first)}"
        ) from error
    for number, record in enumerate(records, start=1):
        yield f"{hub} ({split}), record {number}", record
