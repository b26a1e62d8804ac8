"""A team as a directory, and as plain data."""

import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Self

import torch
from torch import nn

from diffmas.agents import file, hub, other_file
from diffmas.agents.agent import Agent
from diffmas.agents.member import Member
from diffmas.agents.options import Options
from diffmas.models.local import gathers, reshard
from diffmas.models.parts import causal_lm_of

__all__ = ["Saving"]


class Saving(Member):
    """What a `MultiAgentSystem` does with files."""

    def own_options(self) -> dict:
        """Of a subclass: what its constructor takes beyond `MultiAgentSystem`'s, as plain data, to be saved and given back."""
        return {}

    @classmethod
    def class_name(cls) -> str:
        """The full name of the class, as agents.json has it."""
        own = next(c for c in cls.__mro__ if not gathers(c))  # FSDP2 puts a class of its own in its place
        return f"{own.__module__}.{own.__qualname__}"

    def describe(self) -> dict:
        """The class, the agents and the fields of `diffmas.agents.options.Options`, as plain data."""
        return {
            "class": self.class_name(), "own_options": self.own_options(),
            "agents": [agent.described() for agent in self.agents], "realign": self.realign.mode,
            "grad_scope": self.grad_scope, "last_k": self.last_k, "trace_content": self.trace_content,
            "adapter_scope": self.adapter_scope, "no_latents": self.no_latents, "positions": self.positions,
            "chat_template": self.chat_template, "temperature": self.realign.temperature, "sinks": self.sinks,
            "chat_options": self.chat_options, "latent_grad_clip": self.latent_grad_clip,
            "others": {name: other.describe() for name, other in self.others.items()},
        }  # fmt: skip

    @property
    def _learned_map(self) -> nn.Parameter | None:
        return self.realign.weight if self.realign.mode == "learned" else None

    def save_pretrained(self, path) -> None:
        """Writes a directory with the PEFT adapters (if there are any), a learned realignment, what the edges of the team have
        learned (`Select`, by learned), the tokenizer with its chat template, a model card (`diffmas.agents.card`), and
        `agents.json`; and in `others` the same of other models, with their projectors.

        Raises ValueError, before anything is written, for an agent whose latent_steps are a function.
        """
        reshard(self)
        file.check_description(self.describe())
        other_file.save(path, self.others)
        file.save(path, self.model, self.tokenizer, self.describe(), self._learned_map, self.choices.state_dict())

    def push_to_hub(self, repo: str, private: bool = True) -> str:
        """Saves the system and uploads it into a model repository of the Hugging Face hub, owner/name; returns its address.

        private: whether a repository that is made for it is. Raises ValueError, before anything is uploaded, for a name that is
        none, and where the base model has no name on the hub (`diffmas export --base` gives it one), or that of another model.
        """
        bases = {name: causal_lm_of(other.model).config._name_or_path for name, other in self.others.items()}
        hub.check_push(repo, causal_lm_of(self.model).config._name_or_path, bases)
        with tempfile.TemporaryDirectory() as directory:
            self.save_pretrained(path := Path(directory) / repo.rpartition("/")[2])
            return hub.push_to_hub(path, repo, private)

    def load_weights(self, path) -> None:
        """Copies adapters and learned realignment of a directory that `save_pretrained` wrote into this system, in place.

        Raises ValueError, before anything is changed, for a directory of another base model or tokenizer, other agents or
        options, or damaged weights.
        """
        reshard(self)
        file.check_description(self.describe())
        copy_others = other_file.read_weights(path, self.others)
        file.load_weights(path, self.model, self.tokenizer, self.describe(), self._learned_map, self.choices.state_dict())
        copy_others()

    @classmethod
    def of_description(cls, model, tokenizer, description: dict, **others) -> Self:
        """The system of a description, as `describe` gives it, on a model. others: others=..., of a team that has some."""
        options = {option.name: description[option.name] for option in fields(Options)} | (description["own_options"] or {})
        return cls(model, tokenizer, [Agent(**agent) for agent in description["agents"]], **options, **others)

    @classmethod
    def from_pretrained(
        cls, path, model=None, tokenizer=None, *, trainable: bool = False, others: dict | None = None, **model_options
    ) -> Self:
        """A system from a directory that `save_pretrained` wrote.

        model: a loaded base model, a directory, GGUF file or hub name, or None for the one that agents.json names. tokenizer:
        by default the one that was saved. trainable: whether its adapters are. others: by name, the base models of others, as
        `model` is the system's. model_options: of `diffmas.models.load.load_model`. Raises ValueError naming the file that is
        missing, damaged, or of another model, and for a system of another class.

            >>> system.save_pretrained(directory)
            >>> MultiAgentSystem.from_pretrained(directory, base_model, tokenizer).agents == system.agents
            True
        """
        described, model, tokenizer = file.load_model(path, cls.class_name(), model, tokenizer, trainable, **model_options)
        beside = other_file.load(path, described["others"], model, others or {}, trainable, **model_options)
        try:
            system = cls.of_description(model, tokenizer, described, **beside)
        except ValueError as error:
            raise ValueError(f"{Path(path) / file.AGENTS_FILE}: {error}") from error
        if (learned_map := system._learned_map) is not None:
            with torch.no_grad():
                learned_map.copy_(file.read_map(path, learned_map.shape))
        system.choices.load_state_dict(file.read_choices(path, system.choices.state_dict()))
        return system
