"""The figures of one question, as plain data: lanes of agents, blocks of rows, and who attends to whom."""

from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

__all__ = ["Block", "Lane", "Look", "Step", "rounded"]


@dataclass
class Step:
    """One latent step, or one token of the answer.

    text: of the token; of a latent step that which its hidden state is nearest to. p: the probability that the output head gave
    it. nearest: the likeliest tokens and their probabilities. entropy: of all probabilities, in nats. norm: of the hidden state
    behind them, the last one before this step. embedding: the norm of what a latent step puts in the place of a token's
    embedding. gradient: the norm of dL/d(rows). keys, values: norms of its rows, over all layers.
    """

    text: str | None = None
    p: float | None = None
    nearest: list[tuple[str, float]] = field(default_factory=list)
    entropy: float | None = None
    norm: float | None = None
    embedding: float | None = None
    gradient: float | None = None
    keys: float | None = None
    values: float | None = None


@dataclass
class Block:
    """Rows that one agent wrote in one go.

    kind: prompt | latent | text | answer. position: of its first row, as it was written; offset: how many positions later it is
    read, where that is one number. rows: how many. texts: of the rows, "" for latent steps. own: the first row and the one
    after the last that hold the agent's own prompt, without the chat template around it; None: all. steps: of a latent block
    and of an answer, one each. gradient, keys, values: norms of its rows by layer, where they are known.
    """

    agent: int  # of the lanes
    kind: str
    position: int
    rows: int
    texts: list[str]
    steps: list[Step] = field(default_factory=list)
    offset: int = 0
    own: tuple[int, int] | None = None
    gradient: list[float] | None = None
    keys: list[float] | None = None
    values: list[float] | None = None

    @property
    def units(self) -> int:
        """In how many parts its attention is told: step by step, or as one."""
        return len(self.steps) or 1


@dataclass
class Lane:
    """An agent. reads: the numbers of the lanes that it reads. message: what it writes to the others as a text agent, in
    `tokens` tokens; None where nobody asked."""

    name: str
    reads: list[int] = field(default_factory=list)
    message: str | None = None
    tokens: int | None = None


@dataclass
class Look:
    """All that is shown of one question.

    title: the question, or the file. facts: what else to say at the top, as (name, text). layers: of the model that has most;
    of another one the first are its own, and at the others its attention is NaN. attention
    [units, layers, 1 + blocks]: for each unit (`Block.units`, block by block) the mean over its tokens and all heads of the
    attention mass on the first row that it sees, which pretrained models use as a sink, and on the (other) rows of each block;
    each row sums to 1. rows [units, rows]: the same on every single row of all blocks, the mean over layers. None for a file.
    """

    title: str
    facts: list[tuple[str, str]]
    layers: int
    lanes: list[Lane]
    blocks: list[Block]
    attention: Tensor | None = None
    rows: Tensor | None = None

    def first_units(self) -> list[int]:
        """The first unit of each block, and the number of all."""
        firsts = [0]
        for block in self.blocks:
            firsts.append(firsts[-1] + block.units)
        return firsts

    def between_blocks(self, layer: int | None = None) -> Tensor:
        """Who attends to what, [blocks, 1 + blocks]; each reader is the mean of its units. layer: None for the mean of all."""
        firsts = self.first_units()
        mass = self.attention.nanmean(1) if layer is None else self.attention[:, layer]
        return torch.stack([mass[a:b].mean(0) for a, b in zip(firsts, firsts[1:])])

    def between_lanes(self, layer: int | None = None) -> Tensor:
        """Who attends to whom, [lanes, 1 + lanes], while they speak: in their latent steps and their answer, or in their prompt
        if they have neither. Zeros for a lane without blocks."""
        mass, firsts = self.between_blocks(layer), self.first_units()
        out = torch.zeros(len(self.lanes), 1 + len(self.lanes))
        for i in range(len(self.lanes)):
            own = [b for b, block in enumerate(self.blocks) if block.agent == i]
            own = [b for b in own if self.blocks[b].steps] or own
            if not own:
                continue
            weights = torch.tensor([float(firsts[b + 1] - firsts[b]) for b in own])
            mean = (mass[own] * weights[:, None]).sum(0) / weights.sum()
            out[i, 0] = mean[0]
            for b, block in enumerate(self.blocks):
                out[i, 1 + block.agent] += mean[1 + b]
        return out

    def to_dict(self) -> dict:
        """Plain data, for JSON; numbers with four digits."""
        lists = lambda x: None if x is None else x.tolist()  # noqa: E731
        attention = None if self.attention is None else [x[~x[:, 0].isnan()].tolist() for x in self.attention]  # own layers
        data = {name: getattr(self, name) for name in ("title", "facts", "layers")}
        data |= {"lanes": [asdict(x) for x in self.lanes], "blocks": [asdict(x) for x in self.blocks]}
        return rounded({**data, "attention": attention, "rows": lists(self.rows)})


def rounded(data):
    """Plain data, its floats with four digits; what is not finite becomes None, which JSON can say."""
    if isinstance(data, float):
        return float(f"{data:.4g}") if abs(data) < float("inf") else None
    if isinstance(data, dict):
        return {k: rounded(v) for k, v in data.items()}
    return [rounded(x) for x in data] if isinstance(data, (list, tuple)) else data
