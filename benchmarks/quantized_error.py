"""What a context in fewer bits does to a model's next tokens, beside its full rows and dense attention over the same numbers.

    python -m diffmas.benchmarks.quantized_error --model DIR_OR_HUB_NAME --text docs/design.md \
        --out benchmarks/results/quantized_error.csv

The text is cut into contexts of `--context` tokens, each with `--next` tokens behind it, whose logits are compared. "Dense" is
Hugging Face's own model over a DynamicCache of the numbers that the quantised rows stand for.
"""

import argparse
import csv
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from diffmas import Trace, patch_model, unpatch_model
from diffmas.cli.made_with import made_with
from diffmas.json_file import write_json
from diffmas.models.load import load_model
from diffmas.ops.quantize import FORMATS

__all__ = ["measure"]


@torch.no_grad()
def measure(model: nn.Module, context: Tensor, following: Tensor) -> list[dict]:
    """A row for full rows and one for each format: MB of the contexts in memory and in a file, rms and largest difference of
    the logits from those of full rows, KL divergence from them (nats a token), share of the same first choices, loss, largest
    difference from dense attention. model: from Hugging Face, not patched. context [B, N], following [B, n] token ids."""
    patch_model(model)
    trace = Trace(model, len(context))
    model(input_ids=context, past_key_values=trace)
    full = _logits(model, following, trace.fork(1)[0])
    traces = {str(model.dtype).removeprefix("torch."): trace} | {name: trace.quantize(name) for name in FORMATS}
    found = {name: _logits(model, following, rows.fork(1)[0]) for name, rows in traces.items()}
    caches = {name: _dense(rows) for name, rows in traces.items()}
    unpatch_model(model)
    target, rows = following[:, 1:].flatten(), []
    for name, logits in found.items():
        off, dense = logits - full, _logits(model, following, caches[name])
        p, q = (x.log_softmax(-1) for x in (full, logits))
        rows.append({
            "rows": name, "mb": sum(size.bytes for size in traces[name].sizes.values()) / 1e6,
            "file_mb": _file_bytes(traces[name]) / 1e6,
            "rms": off.square().mean().sqrt().item(), "largest": off.abs().max().item(),
            "kl": F.kl_div(q, p, log_target=True, reduction="sum").item() / following.numel(),
            "same_first": (logits.argmax(-1) == full.argmax(-1)).double().mean().item(),
            "loss": F.cross_entropy(logits[:, :-1].flatten(0, 1), target).item(),
            "off_dense": (logits - dense).abs().max().item(), "std": full.std().item(),
        })  # fmt: skip
    return rows


def _logits(model: nn.Module, ids: Tensor, past) -> Tensor:
    return model(input_ids=ids, past_key_values=past).logits.double()


def _dense(trace: Trace) -> DynamicCache:
    """The rows that a trace stands for, of contexts that are equally long."""
    cache = DynamicCache()
    for layer in range(len(trace)):
        k, v = (torch.stack(x).transpose(1, 2) for x in zip(*(trace.keys_values(layer, b) for b in range(trace.batch_size))))
        cache.update(k, v, layer)
    return cache


def _file_bytes(trace: Trace) -> int:
    with tempfile.TemporaryDirectory() as directory:
        trace.save(path := Path(directory) / "trace.safetensors")
        return path.stat().st_size


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--contexts", type=int, default=2)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--next", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    model, tokenizer = load_model(given.model, dtype=given.dtype)
    ids = tokenizer(given.text.read_text(), add_special_tokens=False, return_tensors="pt").input_ids[0]
    length = given.context + given.next
    if len(ids) < given.contexts * length:
        parser.error(f"--text: expected {given.contexts} x {length} tokens, got {len(ids)} in {given.text}")
    cut = ids[: given.contexts * length].view(given.contexts, length)
    rows = measure(model, cut[:, : given.context], cut[:, given.context :])
    print(
        " ".join(rows[0]),
        *(" ".join(f"{x:.4g}" if isinstance(x, float) else x for x in row.values()) for row in rows),
        sep="\n",
    )
    if given.out:
        with open(given.out, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        write_json(Path(f"{given.out}.made_with.json"), made_with() | {"text": given.text.name, "dtype": given.dtype})


if __name__ == "__main__":
    main()
