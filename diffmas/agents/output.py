"""What a system's forward returns."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import ModelOutput

from diffmas.trace import Trace

__all__ = ["SystemOutput", "output_of"]


@dataclass
class SystemOutput(ModelOutput):
    """The result of `MultiAgentSystem.forward`.

    loss: mean (or sum / num_items_in_batch) negative log-likelihood of the answer tokens, in nats. logits [B, A, V]:
    logits[b, t] predicts labels[b, t]. labels [B, A] int64, -100 behind shorter answers. trace: with the rows of all agents.
    Without answers, loss and labels are None, and A is 1: the logits of the answer's first token.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    labels: Tensor | None = None
    trace: Trace | None = None


def output_of(logits: Tensor, labels: Tensor, counts: list[int], num_items_in_batch, trace: Trace) -> SystemOutput:
    """Loss, logits and labels of answers of counts[b] tokens; logits [sum(counts), V], labels [sum(counts)]: packed."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    total = F.cross_entropy(wide, labels, reduction="sum")
    loss = total / (len(labels) if num_items_in_batch is None else num_items_in_batch)
    return SystemOutput(loss=loss, logits=_padded(logits, counts, 0.0), labels=_padded(labels, counts, -100), trace=trace)


def _padded(packed: Tensor, counts: list[int], fill) -> Tensor:
    """[sum(counts), ...] -> [B, max(counts), ...]."""
    if len(set(counts)) == 1:
        return packed.unflatten(0, (len(counts), counts[0]))
    return nn.utils.rnn.pad_sequence(packed.split(counts), batch_first=True, padding_value=fill)
