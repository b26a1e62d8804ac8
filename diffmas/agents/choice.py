"""Rows of an agent that a reader has learned to choose: `Select(by="learned")`.

The logit of a row is w . v: v its values, in every layer all heads together and of length 1, as similarity takes them; w a
vector of the edge, trained with the team and zero at first, where the last rows are the best ones. A reader has the rows of
the highest logits, as a view.

In training the choice is hard, too, and w learns from what was chosen (straight-through, arXiv 1308.3432): the reader has a
copy of these rows, of the same numbers, whose gradient is the rows' as ever, and that of a gate sigmoid(logit) as if it had
multiplied their values. Not their keys: a key that is half as long does not say half as much. The rows that were not chosen
teach nothing; so that each is tried, Gumbel noise is added to the logits in train mode, which draws rows with the odds of
softmax(logits / temperature), without replacement (Gumbel top-k, arXiv 1903.06059).
"""

from itertools import accumulate

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffmas.agents.projector import row_shapes
from diffmas.agents.selection import Score, lookup
from diffmas.trace import Segment, Trace
from diffmas.trace.views import by_sequence, packed, places, rows_of

__all__ = ["Choices"]


class Choices(nn.Module):
    """What the edges of a team have learned; weights: float32, by the numbers of reader and writer. Without an edge that learns
    it has none. graph: of the team. model: whose rows are chosen, patched."""

    def __init__(self, graph, model: nn.Module):
        super().__init__()
        edges = [(i, j) for i in range(len(graph.reads)) for j in graph.learned(i)]
        self.sizes = [heads * D for heads, D in row_shapes(model)] if edges else []
        device = next(model.get_input_embeddings().parameters()).device
        self.weights = nn.ParameterDict({
            _name(i, j): nn.Parameter(torch.zeros(sum(self.sizes), device=device)) for i, j in edges
        })  # fmt: skip

    def scores(self, i: int, j: int, unit: Trace, temperature: float) -> list[Score]:
        """How good reader i finds the rows of agent j, `unit`, of each sequence. temperature: of the noise, in train mode and
        where gradients are recorded."""
        noise = temperature if self.training and torch.is_grad_enabled() else 0.0
        with torch.no_grad():
            found = []
            for b, row in enumerate(by_sequence(unit)):
                values = [unit.keys_values(layer, b)[1] for layer in range(len(unit))] if row else []
                good = self._logits(_name(i, j), values).double().cpu() if row else torch.zeros(0, dtype=torch.float64)
                if noise:
                    good = good - noise * torch.empty_like(good).exponential_().log()
                found.append(lookup(rows_of(row), good))
        return found

    def gated(self, i: int, trace: Trace, chosen_from: dict[int, list[np.ndarray]]) -> Trace:
        """What reader i reads, where w learns from the rows that were chosen. chosen_from: by agent, of each sequence, the rows
        that they were chosen from."""
        rows = by_sequence(trace)
        owners = [_owners(rows_of(row), {j: of[b] for j, of in chosen_from.items()}) for b, row in enumerate(rows)]
        cut = [places(row, np.flatnonzero(own >= 0)) for row, own in zip(rows, owners)]
        chosen = trace.reading(cut)
        if not any(chosen.lengths):
            return trace
        packed_rows, owner = chosen.packed_rows(), np.concatenate([own[own >= 0] for own in owners])
        gate = torch.ones(len(owner), dtype=_wide(packed_rows[0][1]).dtype, device=packed_rows[0][1].device)
        for j in chosen_from:
            at = torch.from_numpy(np.flatnonzero(owner == j))
            g = self._logits(_name(i, j), [v[at.to(v.device)] for _, v in packed_rows]).sigmoid().to(gate)
            gate = gate.index_copy(0, at.to(gate.device), 1 + (g - g.detach()))
        copies = [(k, (_wide(v) * gate.to(v.device)[:, None, None]).to(v.dtype)) for k, v in packed_rows]
        others = [places(row, np.flatnonzero(own < 0)) for row, own in zip(rows, owners)]
        longer = trace.reading(others).extended(packed(cut), copies)
        in_order = [_in_order(row, len(kept), own) for row, kept, own in zip(by_sequence(longer), others, owners)]
        return longer.reading(in_order)

    def _logits(self, name: str, values: list[Tensor]) -> Tensor:
        """values: by layer, [n, Hkv, D]. -> [n]"""
        weight, total = self.weights[name], 0.0
        for w, v in zip(weight.split(self.sizes), values):
            v = F.normalize(_wide(v).flatten(1), dim=-1)
            total = total + (v @ w.to(v)).to(weight.device)
        return total


def _name(i: int, j: int) -> str:
    return f"{i}_reads_{j}"


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _owners(rows: np.ndarray, chosen_from: dict[int, np.ndarray]) -> np.ndarray:
    """Of each row the agent that it was chosen from, -1 for those that were not chosen."""
    owners = np.full(len(rows), -1)
    for j, mine in chosen_from.items():
        owners[(owners < 0) & np.isin(rows, mine)] = j
    return owners


def _in_order(row: list[Segment], others: int, owners: np.ndarray) -> list[Segment]:
    """A view whose first segments are of what was not chosen, and the rest of what was, as it was before."""
    placed = []
    for pieces, index in ((row[:others], np.flatnonzero(owners < 0)), (row[others:], np.flatnonzero(owners >= 0))):
        firsts = accumulate((s.length for s in pieces), initial=0)
        placed += [(int(index[first]), s) for first, s in zip(firsts, pieces)]
    return [s for _, s in sorted(placed)]
