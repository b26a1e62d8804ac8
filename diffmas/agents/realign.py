"""Realign: the map from a model's last hidden state to its input-embedding space, applied at every latent step.

A latent step feeds the hidden state h of the last position, after the final norm, back as an input embedding. But h is in
the space that the output embedding reads, not in the one that the input embedding writes (LatentMAS, arXiv 2511.20639;
DiffMAS, arXiv 2604.21794).
"""

import torch
from torch import Tensor, nn

__all__ = ["REALIGN", "Realign"]

REALIGN = ("none", "norm", "ridge", "soft_token", "learned")


class Realign(nn.Module):
    """Maps h [n, hidden] to input embeddings [n, hidden], on the input embedding's device.

    mode:
        none: h as it is.
        norm: h, rescaled to the mean norm of the input embeddings.
        ridge: h W with W = (E_out' E_out + ridge I)^-1 E_out' E_in (LatentMAS), rescaled likewise. W is close to the
            identity for tied embeddings.
        soft_token: softmax(h E_out' / temperature) E_in, the expected token embedding.
        learned: ridge, but W is a parameter that is trained and saved with the adapter.
    ridge: relative to the mean of the diagonal of E_out' E_out.

    Raises ValueError for an unknown mode, and for a model without an output embedding where one is needed.
    """

    def __init__(self, model: nn.Module, mode: str = "ridge", ridge: float = 1e-3, temperature: float = 1.0):
        super().__init__()
        if mode not in REALIGN:
            raise ValueError(f"realign: expected one of {REALIGN}, got {mode!r}")
        if temperature <= 0:
            raise ValueError(f"temperature: expected a positive number, got {temperature}")
        self.mode, self.ridge, self.temperature = mode, ridge, temperature
        # Tuples hide the model from nn.Module: its weights are not this module's.
        self._embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
        if mode in ("ridge", "soft_token", "learned") and self._embeddings[1] is None:
            raise ValueError(f"realign: {mode!r} needs a model with an output embedding")
        e_in = self._embeddings[0].weight
        with torch.no_grad():
            norm = e_in.float().norm(dim=-1).mean().to(e_in.device)
            self.register_buffer("mean_norm", norm, persistent=False)
            if mode in ("ridge", "learned"):
                W = self._solve().to(e_in.device)
                if mode == "learned":
                    self.weight = nn.Parameter(W)
                else:
                    self.register_buffer("weight", W, persistent=False)

    def _solve(self) -> Tensor:
        """W [hidden, hidden], float32; solved in float64."""
        e_in = self._embeddings[0].weight.double()
        e_out = self._embeddings[1].weight.to(e_in)
        gram = e_out.T @ e_out
        gram.diagonal().add_(self.ridge * gram.diagonal().mean())
        return torch.linalg.solve(gram, e_out.T @ e_in).float()

    def forward(self, h: Tensor) -> Tensor:
        e_in, e_out = self._embeddings
        if self.mode == "soft_token":
            h = h.to(e_out.weight.device)
            p = torch.softmax(h @ e_out.weight.T.to(h.dtype) / self.temperature, dim=-1)
            return p.to(e_in.weight.device) @ e_in.weight.to(h.dtype)
        h = h.to(e_in.weight.device)
        if self.mode == "none":
            return h
        # In float32, autocast or not: one small product, and its rounding enters every later latent step.
        with torch.autocast(h.device.type, enabled=False):
            x = h if h.dtype == torch.float64 else h.float()
            if self.mode != "norm":
                x = x @ self.weight.to(x.dtype)
            return (x * (self.mean_norm.to(x.dtype) / x.norm(dim=-1, keepdim=True).clamp_min(1e-12))).to(h.dtype)
