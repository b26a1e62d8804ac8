"""A trace on disk: one safetensors file with the rows that the trace sees, who wrote them, and a checksum."""

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from diffmas.trace.spec import spec_of
from diffmas.trace.trace import Trace
from diffmas.trace.views import Segment

__all__ = ["load", "save"]

FORMAT = "diffmas-trace-1"


def _checksum(header: dict, tensors: dict) -> str:
    """Of the tensors and of all of the header but the checksum itself."""
    digest = hashlib.sha256(json.dumps({**header, "checksum": None}, sort_keys=True).encode())
    for name in sorted(tensors):
        x = tensors[name].contiguous()
        digest.update(f"{name}{x.dtype}{tuple(x.shape)}".encode())
        digest.update(x.view(torch.uint8).numpy() if x.numel() else b"")
    return digest.hexdigest()


def save(trace: Trace, path) -> None:
    """Writes to a temporary file first: a crash leaves the old file, never half a new one."""
    if not any(trace.lengths):
        raise ValueError("trace: expected one that holds tokens, got an empty one")
    tensors = {"positions": torch.cat([trace.positions(b) for b in range(trace.batch_size)])}
    for i in range(len(trace)):
        rows = [trace.keys_values(i, b) for b in range(trace.batch_size)]
        for name, column in zip("kv", zip(*rows)):
            tensors[f"{i}.{name}"] = torch.cat(column).detach().cpu().contiguous()
    header = {
        "format": FORMAT,
        **trace.spec.fingerprint(),
        "batch_size": trace.batch_size,
        "segments": [[s.sequence, s.agent, s.kind, s.length, s.offset] for s in trace.segments],
        "next": trace.next_positions,
    }
    header["checksum"] = _checksum(header, tensors)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, metadata={"diffmas": json.dumps(header)})
    os.replace(partial, path)


def load(path, model) -> Trace:
    """A trace of `model` from a file; raises ValueError for a file that is damaged or of another model or adapter."""
    spec, path = spec_of(model), Path(path)
    if not path.is_file():
        raise ValueError(f"path: expected a trace file, got {path}, which does not exist")
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get("diffmas", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        raise ValueError(f"{path}: expected a whole trace file, got a damaged one ({error})") from error
    found = header.get("format") if isinstance(header, dict) else None
    if found != FORMAT:
        raise ValueError(f"{path}: expected a trace file of format {FORMAT}, got {found}")
    if header.get("checksum") != _checksum(header, tensors):
        raise ValueError(f"{path}: expected the checksum {header.get('checksum')}, got another: the file is damaged")
    for what, mine in spec.fingerprint().items():
        if header[what] != mine:
            raise ValueError(f"{path}: expected a trace of this {what} ({mine}), got one of another ({header[what]})")
    kv = [(tensors[f"{layer.index}.k"], tensors[f"{layer.index}.v"]) for layer in spec.layers]
    return Trace.of_rows(spec, _segments(header, tensors["positions"]), header["next"], kv)


def _segments(header: dict, positions: torch.Tensor) -> list[list[Segment]]:
    """positions: that rows are read at. A segment whose positions are not consecutive becomes several."""
    rows, at = [[] for _ in range(header["batch_size"])], 0
    for sequence, agent, kind, length, offset in header["segments"]:
        where = positions[at : at + length]
        gaps = (where.diff() != 1).nonzero()[:, 0] + 1
        for first, last in zip([0, *gaps.tolist()], [*gaps.tolist(), length]):
            position = int(where[first]) - offset
            rows[sequence].append(Segment(sequence, agent, kind, at + first, last - first, position, offset))
        at += length
    return rows
