"""A trace on disk: one safetensors file with the rows that the trace sees, their segments, and a checksum.

Knows segments and rows, and no traces: `Trace.save` and `Trace.load` convert.
"""

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffmas.ops.quantize import pack, unpack
from diffmas.trace.frozen import Frozen
from diffmas.trace.views import FROZEN, Segment

__all__ = ["read", "write"]

FORMAT = "diffmas-trace-2"  # the first one's fingerprints were of a sample of the weights
QUANTIZED = "diffmas-trace-3"  # the same with quantised rows
PARTS = ("k", "v", "k_scale", "v_scale")


def _checksum(header: dict, tensors: dict) -> str:
    """The hash of the tensors, and of all of the header but the checksum itself."""
    digest = hashlib.sha256(json.dumps({**header, "checksum": None}, sort_keys=True).encode())
    for name in sorted(tensors):
        x = tensors[name].contiguous()
        digest.update(f"{name}{x.dtype}{tuple(x.shape)}".encode())
        digest.update(x.view(torch.uint8).numpy() if x.numel() else b"")
    return digest.hexdigest()


def write(
    path, fingerprint: dict, segments: list[list[Segment]], next_positions: list[int], kv: list[tuple[Tensor, Tensor]],
    ids: Tensor, frozen: Frozen | None = None,
) -> None:  # fmt: skip
    """Writes a trace's segments by sequence, the position of each sequence's next token, and its rows.

    kv: by layer, k and v [rows, Hkv, D], in the order of the segments. ids [rows]: their token ids, -1 where there is none.
    frozen: quantised rows, those of segments from FROZEN on.
    fingerprint: of the model, as plain data. The file is written beside its place first: a crash leaves the old file or the new
    one.
    """
    flat = [s for row in segments for s in row]
    positions = torch.cat([torch.arange(s.position + s.offset, s.next_position) for s in flat])
    tensors = {"positions": positions, "ids": ids}
    for i, pair in enumerate(kv):
        for name, x in zip("kv", pair):
            tensors[f"{i}.{name}"] = x.detach().cpu().contiguous()
    header = {
        "format": FORMAT,
        **fingerprint,
        "batch_size": len(segments),
        "segments": [[s.sequence, s.agent, s.kind, s.length, s.offset, *_seen_by(s)] for s in flat],
        "next": next_positions,
    }
    if frozen is not None:
        header |= {
            "format": QUANTIZED,
            "quantized": [s.start >= FROZEN for s in flat],
            "head_dim": frozen.layers[0][0].shape[2],
        }
        header |= {"bits": frozen.bits, "dtype": str(frozen.dtype).removeprefix("torch.")}
        tensors |= _packed(frozen)
    header["checksum"] = _checksum(header, tensors)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, metadata={"diffmas": json.dumps(header)})
    os.replace(partial, path)


def _packed(frozen: Frozen) -> dict[str, Tensor]:
    tensors = {"quantized.ids": torch.from_numpy(frozen.ids)}
    for i, layer in enumerate(frozen.layers):
        for name, x in zip(PARTS, layer):
            packed = frozen.bits == "int4" and x.dim() == 3
            tensors[f"{i}.quantized.{name}"] = (pack(x) if packed else x).cpu().contiguous()
    return tensors


def _unpacked(header: dict, tensors: dict) -> Frozen:
    ids, layers = tensors["quantized.ids"].numpy(), []
    while f"{len(layers)}.quantized.k" in tensors:
        layer = [tensors[f"{len(layers)}.quantized.{name}"] for name in PARTS]
        if header["bits"] == "int4":
            layer[:2] = (unpack(x, header["head_dim"]) for x in layer[:2])
        layers.append(tuple(layer))
    return Frozen(header["bits"], getattr(torch, header["dtype"]), layers, ids)


def read(path, fingerprint: dict) -> tuple[list[list[Segment]], list[int], list[tuple[Tensor, Tensor]], Tensor, Frozen | None]:
    """The segments (of rows 0, 1, 2, ..., of quantised ones from FROZEN on), next positions, rows, token ids and quantised rows
    of a file that `write` wrote.

    Raises ValueError for a file that is missing, damaged, or of another fingerprint.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"path: expected a trace file, got {path}, which is no file")
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get("diffmas", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        raise ValueError(f"{path}: expected a whole trace file, got a damaged one ({error})") from error
    found = header.get("format") if isinstance(header, dict) else None
    if found not in (FORMAT, QUANTIZED):
        raise ValueError(f"{path}: expected a trace file of format {FORMAT}, got {found}")
    if header.get("checksum") != _checksum(header, tensors):
        raise ValueError(f"{path}: expected the checksum {header.get('checksum')}, got another: the file is damaged")
    for what, mine in fingerprint.items():
        if header[what] != mine:
            raise ValueError(f"{path}: expected a trace of this {what} ({mine}), got one of another ({header[what]})")
    positions, ids = tensors.pop("positions"), tensors.pop("ids")
    frozen = _unpacked(header, tensors) if found == QUANTIZED else None
    kv = [(tensors[f"{i}.k"], tensors[f"{i}.v"]) for i in range(len(tensors)) if f"{i}.k" in tensors]
    return _segments(header, positions), header["next"], kv, ids, frozen


def _seen_by(s: Segment) -> list:
    """Its layers and heads, as far as not all see it."""
    return [s.layers, s.heads] if s.heads else [s.layers] if s.layers else []


def _segments(header: dict, positions: Tensor) -> list[list[Segment]]:
    """The segments by sequence. positions [rows]: where the rows are read; each run of consecutive ones is a segment."""
    rows, done, at = [[] for _ in range(header["batch_size"])], 0, [0, FROZEN]  # the next row; and of quantised ones
    quantized = header.get("quantized") or [False] * len(header["segments"])
    for (sequence, agent, kind, length, offset, *seen_by), which in zip(header["segments"], quantized):
        layers, heads = (*seen_by, None, None)[:2]
        layers, heads = layers and tuple(layers), heads and tuple(tuple(x) if isinstance(x, list) else x for x in heads)
        where = positions[done : done + length]
        gaps = (where.diff() != 1).nonzero()[:, 0] + 1
        for first, last in zip([0, *gaps.tolist()], [*gaps.tolist(), length]):
            position = int(where[first]) - offset
            start = at[which] + first
            rows[sequence].append(Segment(sequence, agent, kind, start, last - first, position, offset, layers, heads))
        at[which] += length
        done += length
    return rows
