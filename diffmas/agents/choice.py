"""Rows of an agent that a reader has learned to choose: `Select(by="learned")`.

The logit of a row is w . v: v its values, in every layer all heads together and of length 1, as similarity takes them; w a
vector of the edge, trained with the team and zero at first, where the last rows are the best ones. A reader has the rows of
the highest logits, as a view.

With `of="question"` a logit is w . v + (A q) . (B v): q the values of the reader's prompt where it has read nothing, summed
over its tokens as similarity takes them, in every layer of length 1; A and B matrices of the edge, [RANK, all values], as
attention has them for queries and keys. A is zero at first, B drawn. For q the prompt runs once more, without gradients: the
choice is learned, and not how to ask.

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
from diffmas.agents.selection import QUESTION, Score, lookup
from diffmas.trace import Segment, Trace
from diffmas.trace.views import by_sequence, packed, places, rows_of

__all__ = ["RANK", "Choices"]

RANK = 16  # of A and B; whole matrices would have sum(sizes)^2 weights


class Choices(nn.Module):
    """What the edges of a team have learned; weights (w), of_questions (A) and of_rows (B): float32, by the numbers of reader
    and writer. Without an edge that learns it has none. graph: of the team. model: whose rows are chosen, patched."""

    def __init__(self, graph, model: nn.Module):
        super().__init__()
        edges = [(i, j) for i in range(len(graph.reads)) for j in graph.learned(i)]
        self.sizes = [heads * D for heads, D in row_shapes(model)] if edges else []
        device = next(model.get_input_embeddings().parameters()).device
        asking = [_name(i, j) for i, j in edges if graph.learned(i)[j].of == QUESTION]
        size = sum(self.sizes)
        zeros = lambda *shape: nn.Parameter(torch.zeros(*shape, device=device))
        self.weights = nn.ParameterDict({_name(i, j): zeros(size) for i, j in edges})
        self.of_questions = nn.ParameterDict({name: zeros(RANK, size) for name in asking})  # A
        self.of_rows = nn.ParameterDict({name: zeros(RANK, size) for name in asking})  # B
        for b in self.of_rows.values():
            nn.init.normal_(b, std=size**-0.5)

    def asked(self, values: list[list[Tensor]]) -> Tensor:
        """q of each question, [B, sum(sizes)]. values: as `scores.question_values` gives them."""
        device = next(iter(self.weights.values())).device
        return torch.stack([torch.cat([F.normalize(x, dim=-1).to(device) for x in of_layers]) for of_layers in values])

    def scores(self, i: int, j: int, unit: Trace, temperature: float, asked: Tensor | None = None) -> list[Score]:
        """How good reader i finds the rows of agent j, `unit`, of each sequence. temperature: of the noise, in train mode and
        where gradients are recorded. asked: q of the questions, where the choice depends on them."""
        noise = temperature if self.training and torch.is_grad_enabled() else 0.0
        with torch.no_grad():
            found, weights = [], self._weights(_name(i, j), asked)
            for b, row in enumerate(by_sequence(unit)):
                values = [unit.keys_values(layer, b)[1] for layer in range(len(unit))] if row else []
                w = weights if weights.dim() == 1 else weights[b]
                good = self._logits(w, values).double().cpu() if row else torch.zeros(0, dtype=torch.float64)
                if noise:
                    good = good - noise * torch.empty_like(good).exponential_().log()
                found.append(lookup(rows_of(row), good.double().cpu().numpy()))
        return found

    def gated(
        self, i: int, trace: Trace, chosen_from: dict[int, list[np.ndarray]], asked: Tensor | None = None
    ) -> Trace:  # fmt: skip
        """What reader i reads, where w learns from the rows that were chosen. chosen_from: by agent, of each sequence, the rows
        that they were chosen from. asked: as in `scores`."""
        rows = by_sequence(trace)
        owners = [_owners(rows_of(row), {j: of[b] for j, of in chosen_from.items()}) for b, row in enumerate(rows)]
        cut = [places(row, np.flatnonzero(own >= 0)) for row, own in zip(rows, owners)]
        chosen = trace.reading(cut)
        if not any(chosen.lengths):
            return trace
        packed_rows, owner = chosen.packed_rows(), np.concatenate([own[own >= 0] for own in owners])
        sequence = np.repeat(np.arange(len(rows)), chosen.lengths)
        gate = torch.ones(len(owner), dtype=_wide(packed_rows[0][1]).dtype, device=packed_rows[0][1].device)
        for j in chosen_from:
            at = torch.from_numpy(np.flatnonzero(owner == j))
            weights = self._weights(_name(i, j), asked)
            if weights.dim() == 2:
                weights = weights[torch.from_numpy(sequence[owner == j]).to(weights.device)]
            g = self._logits(weights, [v[at.to(v.device)] for _, v in packed_rows]).sigmoid().to(gate)
            gate = gate.index_copy(0, at.to(gate.device), 1 + (g - g.detach()))
        copies = [(k, (_wide(v) * gate.to(v.device)[:, None, None]).to(v.dtype)) for k, v in packed_rows]
        others = [places(row, np.flatnonzero(own < 0)) for row, own in zip(rows, owners)]
        longer = trace.reading(others).extended(packed(cut), copies)
        in_order = [_in_order(row, len(kept), own) for row, kept, own in zip(by_sequence(longer), others, owners)]
        return longer.reading(in_order)

    def _weights(self, name: str, asked: Tensor | None) -> Tensor:
        """What the values are multiplied with: w, [sum(sizes)], or of each sequence w + (A q) B, [B, sum(sizes)]."""
        w = self.weights[name]
        if name not in self.of_rows:
            return w
        return w + (asked.to(w) @ self.of_questions[name].T) @ self.of_rows[name]

    def _logits(self, weights: Tensor, values: list[Tensor]) -> Tensor:
        """weights: of all rows, or of each, [n, sum(sizes)]. values: by layer, [n, Hkv, D]. -> [n]"""
        total = 0.0
        for w, v in zip(weights.split(self.sizes, -1), values):
            v = F.normalize(_wide(v).flatten(1), dim=-1)
            total = total + (v @ w.to(v) if w.dim() == 1 else (v * w.to(v)).sum(-1)).to(weights.device)
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
