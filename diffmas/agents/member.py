"""What agents take their turns with: a model and its tokenizer. A team has one, and others beside it (`Other`)."""

import torch
from torch import Tensor, nn

from diffmas.agents import prompts
from diffmas.agents.agent import Agent
from diffmas.agents.projector import Between
from diffmas.agents.realign import Realign
from diffmas.models.adapted import check_adapters
from diffmas.models.parts import causal_lm_of
from diffmas.models.patch import patch_model

__all__ = ["Member", "Other", "default_chat"]


def default_chat(tokenizer, chat_template: bool | None) -> bool:
    """Whether prompts go through the tokenizer's chat template; None: if it has one."""
    return bool(getattr(tokenizer, "chat_template", None)) if chat_template is None else chat_template


class Member(nn.Module):
    """Has model, tokenizer, chat_template and chat_options, and what else takes its turns."""

    def own_state(self) -> dict[str, Tensor]:
        """The weights that are neither the model's nor its adapter's."""
        return {name: x for name, x in self.state_dict().items() if not name.startswith("model.")}

    @property
    def device(self) -> torch.device:
        return next(self.model.get_input_embeddings().parameters()).device

    def pack(self, rows: list[list[int]]) -> Tensor:
        """Token ids of several sequences as one, [1, n], on the model's device."""
        return torch.tensor([t for row in rows for t in row], dtype=torch.long, device=self.device)[None]

    def prompt_ids(self, agent: Agent, fields: dict) -> list[int]:
        """The token ids of an agent's prompt, chat template included."""
        return prompts.prompt_ids(self.tokenizer, agent, fields, self.chat_template, self.chat_options)


class Other(Member):
    """Another model in a team, that of the agents whose `Agent.model` is its name there.

    model: a transformers causal LM or a PEFT model around one; it is patched if it is not yet. Its adapter is trained with the
        team, and saved; without one it is frozen. tokenizer: its own. projector: how the team's model reads its rows, a
        `diffmas.agents.projector.Projector` or `Fuser` from this model to that one. realign, temperature, chat_template,
        chat_options: as for a team (`MultiAgentSystem`).

    reading: how the system's agents have its rows: "rows", of their own, or "fused" with theirs.

        >>> patch_model(small), patch_model(model)
        >>> other = Other(small, small_tokenizer, Projector(small, model, hidden=256))
        >>> expert = Agent("expert", "{question}", latent_steps=8, model="small")
        >>> MultiAgentSystem(model, tokenizer, [expert, solver], others={"small": other})
    """

    def __init__(
        self, model: nn.Module, tokenizer, projector: Between, realign: str = "ridge", *, temperature: float = 1.0,
        chat_template: bool | None = None, chat_options: dict | None = None,
    ):  # fmt: skip
        super().__init__()
        if not hasattr(causal_lm_of(model), "diffmas_patch"):
            patch_model(model)
        if not hasattr(model, "peft_config"):
            model.requires_grad_(False)
        self.model, self.tokenizer, self.projector = model, tokenizer, projector.train(model.training)
        self.chat_template, self.chat_options = default_chat(tokenizer, chat_template), chat_options
        self.realign = Realign(model, realign, temperature=temperature).train(model.training)
        self.training = model.training

    @property
    def reading(self) -> str:
        return "fused" if self.projector.fuses else "rows"

    def check(self, receiver: nn.Module) -> None:
        """Raises ValueError for adapters that do not work here, and for a projector that was made for other models."""
        self.projector.check(self.model, receiver)
        check_adapters(self.model)

    def describe(self) -> dict:
        """All but the model and tokenizer, as plain data."""
        return {
            "projector": {"kind": self.projector.kind, **self.projector.options()}, "realign": self.realign.mode,
            "temperature": self.realign.temperature, "chat_template": self.chat_template, "chat_options": self.chat_options,
        }  # fmt: skip
