"""Checkpoints of a run: which are whole, which is the newest, and which may go.

A checkpoint is a directory `checkpoint-N`: the PEFT adapter, tokenizer and agents.json as `MultiAgentSystem.save_pretrained`
writes them; transformers' optimizer.pt, scheduler.pt, rng_state*.pth and trainer_state.json; and, written last, manifest.json
with the SHA-256 of each of these files. A checkpoint without a manifest, or with a byte that differs, is not whole.
"""

import hashlib
import logging
import re
import shutil
from pathlib import Path

from diffmas.agents.card import CARD, FACTS
from diffmas.agents.file import AGENTS_FILE
from diffmas.json_file import read_json, write_json

__all__ = [
    "check_checkpoint", "check_engine_of", "check_manifest", "checkpoints", "last_checkpoint", "remove_oldest",
    "write_manifest",
]  # fmt: skip

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"  # {file: SHA-256}
IN_PROGRESS = "checkpoint-is-incomplete.txt"  # transformers has it beside the others until enable_jit_checkpoint's are written
NOT_OF_IT = (MANIFEST, IN_PROGRESS, CARD, FACTS)  # a card may be written again, when there are results
RESUME_FILES = ("trainer_state.json", AGENTS_FILE, "optimizer.pt", "scheduler.pt")
# What the optimizer's state is written as, by who has it.
OPTIMIZER = {
    "one process or DDP": r"optimizer\.pt", "FSDP": r"optimizer\.bin|optimizer_\d+/.*", "DeepSpeed": r"global_step\d+/.*",
    "tensor parallelism": r"optimizer_tp\.pt",
}  # fmt: skip


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as data:
        while block := data.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_manifest(path: Path) -> None:
    """Marks a directory as whole, with the files that are in it now."""
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.name not in NOT_OF_IT)
    write_json(path / MANIFEST, {file.relative_to(path).as_posix(): _sha256(file) for file in files})


def check_manifest(path) -> dict[str, str]:
    """The manifest of a checkpoint, {file: SHA-256}; raises ValueError naming a file that is missing or damaged."""
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path}: expected the directory of a checkpoint, found none")
    manifest = read_json(path / MANIFEST)
    if not isinstance(manifest, dict):
        raise ValueError(f"{path / MANIFEST}: expected an object of file names, got {type(manifest).__name__}")
    for name, expected in manifest.items():
        file = path / name
        if file.name in NOT_OF_IT:  # older manifests have the card
            continue
        if not file.is_file():
            raise ValueError(f"{file}: expected this file of a checkpoint, found none")
        if _sha256(file) != expected:
            raise ValueError(
                f"{file}: expected a whole file, got a damaged one of {file.stat().st_size} bytes (its SHA-256 is not that of "
                f"{MANIFEST})"
            )
    return manifest


def check_checkpoint(path) -> Path:
    """The path of a checkpoint that training can resume from; raises ValueError naming a file that is missing or damaged."""
    path = Path(path)
    manifest = check_manifest(path)
    optimizer = any(re.fullmatch("|".join(OPTIMIZER.values()), name) for name in manifest)
    missing = [name for name in RESUME_FILES if name not in manifest and not (name == "optimizer.pt" and optimizer)]
    if not any(name.startswith("rng_state") for name in manifest):
        missing.append("rng_state.pth")
    if missing:
        raise ValueError(f"{path}: expected a checkpoint to resume from, {MANIFEST} has no {', '.join(missing)}")
    return path


def check_engine_of(path, engine: str) -> None:
    """Raises ValueError for a checkpoint whose optimizer's state is of another engine than this one of OPTIMIZER."""
    manifest = check_manifest(path)
    found = [name for name, files in OPTIMIZER.items() if any(re.fullmatch(files, file) for file in manifest)]
    if found and found[0] != engine:
        raise ValueError(
            f"{path}: expected a checkpoint of a run with {engine}, got one with {found[0]}; its adapter, which "
            "MultiAgentSystem.from_pretrained loads, fits to any"
        )


def checkpoints(output_dir) -> list[Path]:
    """The checkpoints of a run in the order of their steps, whole or not."""
    paths = (p for p in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name))
    return sorted(paths, key=lambda p: int(p.name.split("-")[1]))


def last_checkpoint(output_dir) -> Path | None:
    """The newest checkpoint of a run that is whole, None if there is none; damaged ones are skipped with a warning."""
    for path in reversed(checkpoints(output_dir)):
        try:
            return check_checkpoint(path)
        except ValueError as error:
            logger.warning("skipping a damaged checkpoint: %s", error)
    return None


def remove_oldest(output_dir, limit: int | None, keep: set[str]) -> None:
    """Removes a run's oldest checkpoints until `limit` are left. keep: names that stay in any case; no limit: None or 0."""
    found = sorted(checkpoints(output_dir), key=lambda p: p.stat().st_mtime)
    surplus = len(found) - limit if limit and limit > 0 else 0
    for path in [p for p in found if p.name not in keep][: max(surplus, 0)]:
        shutil.rmtree(path, ignore_errors=True)
