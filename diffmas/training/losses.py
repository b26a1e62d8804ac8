"""What is made of the logits of an answer, apart from the loss that a system computes itself, and a loss that is none."""

import torch.nn.functional as F
from torch import Tensor

from diffmas.agents.system import SystemOutput

__all__ = ["NonFiniteLoss", "as_causal_lm", "token_losses"]


class NonFiniteLoss(FloatingPointError):
    """The loss or its gradients became NaN or infinite; the weights are those of the last good step."""


def token_losses(outputs: SystemOutput) -> Tensor:
    """The negative log-likelihood of each answer token, [B, A], 0 behind shorter answers."""
    logits, labels = outputs["logits"], outputs["labels"]
    wide = logits if logits.dtype.itemsize > 4 else logits.float()
    return F.cross_entropy(wide.transpose(1, 2), labels, reduction="none")


def as_causal_lm(outputs: SystemOutput) -> SystemOutput:
    """Logits [B, 1 + A, V] and labels [B, 1 + A] as a causal LM has them: logits[:, t] predicts labels[:, t + 1]."""
    logits, labels = F.pad(outputs["logits"], (0, 0, 0, 1)), F.pad(outputs["labels"], (1, 0), value=-100)
    return SystemOutput(loss=outputs["loss"], logits=logits, labels=labels, trace=outputs["trace"])
