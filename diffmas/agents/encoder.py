"""A side door for models that take no turns: what they make of a text, as latent rows of the system's model."""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from diffmas.agents.member import Member, default_chat

__all__ = ["Encoder", "encoder_of"]


def encoder_of(model: nn.Module) -> nn.Module:
    """The part of a transformers model that ends in hidden states."""
    return model.get_encoder() if getattr(model.config, "is_encoder_decoder", False) else model.base_model


class Encoder(Member):
    """A frozen model that encodes the prompts of agents: of those whose `Agent.model` is its name among a system's others.

    Its last hidden states, one for each token, are mapped to the size of the system's input embeddings, and run through the
    system's model in the place of the prompt: as latent rows, behind what the agent reads, before its latent steps.

    model: any transformers model with last hidden states, such as BERT or a causal LM (of which only the body is used: the
        states are then soft tokens); of one with a decoder, its encoder. tokenizer: its own. receiver: the system's model.
        hidden: of an MLP with a GELU in the place of a linear map. chat_template, chat_options: as for a team. Raises
        ValueError for a hidden that does not fit.

        >>> encoder = Encoder(AutoModel.from_pretrained("BAAI/bge-small-en-v1.5"), its_tokenizer, model)
        >>> reader = Agent("reader", "{document}", model="bge")
        >>> MultiAgentSystem(model, tokenizer, [reader, solver], others={"bge": encoder})
    """

    reading = "embeddings"

    def __init__(
        self, model: nn.Module, tokenizer, receiver: nn.Module, hidden: int | None = None, *, chat_template: bool | None = None,
        chat_options: dict | None = None,
    ):  # fmt: skip
        super().__init__()
        if hidden is not None and (type(hidden) is not int or hidden < 1):
            raise ValueError(f"hidden: expected an integer >= 1 or None, got {hidden!r}")
        self.model, self.tokenizer = encoder_of(model).requires_grad_(False).eval(), tokenizer
        self.chat_template, self.chat_options = default_chat(tokenizer, chat_template), chat_options
        self.hidden, embeddings = hidden, receiver.get_input_embeddings()
        sizes = [model.config.get_text_config().hidden_size, *([hidden] if hidden else []), embeddings.weight.shape[-1]]
        first, *rest = (nn.Linear(a, b) for a, b in pairwise(sizes))
        self.map = nn.Sequential(first, *(x for layer in rest for x in (nn.GELU(), layer)))
        self._dtype = lambda: embeddings.weight.dtype
        self.training = receiver.training

    def train(self, mode: bool = True) -> "Encoder":
        """As a module's, but for the frozen model, whose dropout would only be noise: it stays in eval mode."""
        super().train(mode)
        self.model.eval()
        return self

    def check(self, receiver: nn.Module) -> None:
        """Raises ValueError unless it maps to the input embeddings of the system's model."""
        width, mine = receiver.get_input_embeddings().weight.shape[-1], self.map[-1].out_features
        if width != mine:
            raise ValueError(f"encoder: expected one that maps to {width} values, as the system's embeddings have, got {mine}")

    def forward(self, rows: list[list[int]]) -> Tensor:
        """rows: token ids of several texts. -> what stands for their tokens, packed, [n, hidden size of the receiver]."""
        ids = pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows if row], batch_first=True).to(self.device)
        mask = torch.zeros_like(ids)
        for b, row in enumerate(row for row in rows if row):
            mask[b, : len(row)] = 1
        with torch.no_grad():
            states = self.model(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]
        return self.map(states.to(self.map[0].weight)).to(self._dtype())

    def describe(self) -> dict:
        """All but the models and the tokenizer, as plain data."""
        projector = {"kind": "encoder", "hidden": self.hidden}
        return {"projector": projector, "chat_template": self.chat_template, "chat_options": self.chat_options}
