"""C2C (Cache-to-Cache, arXiv 2510.03215) as a baseline: one agent answers, and another model has read its prompt, too."""

from dataclasses import replace

from diffmas.agents import file, other_file
from diffmas.agents.agent import Agent
from diffmas.agents.member import Other
from diffmas.agents.system import MultiAgentSystem
from diffmas.evaluation.baselines import Latent, with_agents

__all__ = ["C2C", "c2c", "load_c2c"]

SHARER, RECEIVER = "sharer", "receiver"


class C2C(MultiAgentSystem):
    """The last of some agents, whose prompt's rows are fused with those of another model (`diffmas.agents.projector.Fuser`).

    Both models read the whole prompt. The rows of all its tokens but the last are fused; the last one, and the answer, go on
    behind them. agents: the last one is asked. others: one other model, whose projector fuses. Other arguments: of
    `MultiAgentSystem`. Raises ValueError for others that are not one that fuses.
    """

    def __init__(self, model, tokenizer, agents: list[Agent], *, others: dict[str, Other], **options):
        if len(others) != 1 or not all(other.reading == "fused" for other in others.values()):
            raise ValueError(f"others: expected one model whose projector fuses, got {sorted(others)}")
        asked = replace(agents[-1], reads=[RECEIVER], role=agents[-1].adapter)
        sharer = Agent(SHARER, asked.prompt, system=asked.system, model=next(iter(others)), reads=[])
        receiver = Agent(RECEIVER, asked.prompt, system=asked.system, role=asked.adapter, reads=[SHARER])
        super().__init__(model, tokenizer, [sharer, receiver, asked], others=others, **options)

    @classmethod
    def class_name(cls) -> str:
        return super().class_name().replace(__name__, "diffmas.evaluation.c2c")  # as it was saved before this file's name

    def prompt_ids(self, agent: Agent, fields: dict) -> list[int]:
        """Of the sharer all tokens, of the receiver all but the last, of who answers the last."""
        ids = super().prompt_ids(agent, fields)
        return {SHARER: ids, RECEIVER: ids[:-1]}.get(agent.name, ids[-1:])


def c2c(system: MultiAgentSystem, other: Other, agent: Agent | None = None, adapter: bool | str = False) -> Latent:
    """One agent, by default the system's last, as `C2C` with another model. adapter: as in `diffmas.evaluation.Latent`."""
    return Latent(with_agents(system, [agent or system.agents[-1]], C2C, others={SHARER: other}), adapter)


def load_c2c(path, system: MultiAgentSystem, agent: Agent | None = None, other=None, **model_options) -> Latent:
    """`c2c` with the other model and the projector of a directory of `C2C.save_pretrained`, for the system's base model.

    other: the other model, or its directory or hub name, by default as the directory names it. model_options: of
    `diffmas.models.load.load_model`, for the other one. Raises ValueError for a directory of another class, of other base
    models or of another prompt.
    """
    described = file.read_agents(path)
    file.check_class(path, described, C2C.class_name())
    file.check_base(described, system.model, path)
    given = {} if other is None else dict.fromkeys(described["others"], other)  # a C2C has one
    others = other_file.load(path, described["others"], system.model, given, False, **model_options)["others"]
    method = c2c(system, *others.values(), agent).system
    file.check_same(path, described, {"agents": method.describe()["agents"]})
    return Latent(method.eval(), adapter=False)
