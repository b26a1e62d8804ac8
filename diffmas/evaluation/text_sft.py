"""Text agents that are trained on their own right answers: what a trained latent team has to be compared with.

The text team answers the training questions, samples times. Where the last answer is right, every turn of that sample, prompt
and text, becomes a row (rejection sampling, as in STaR, arXiv 2203.14465). One LoRA that all agents share is trained on the
rows as plain supervised fine-tuning, and the team answers with it as before:

    rows = right_turns(TextAgents(system), train_rows, samples=4, max_new_tokens=512, seed=0)
    team = Writers(system.model, system.tokenizer, system.agents)
    Trainer(team, args, train_dataset=rows).train()
    evaluate({"text": TextAgents(system), "text, trained": TextAgents(system, adapter=True)}, test_rows)
"""

from diffmas.agents.system import Agent, MultiAgentSystem
from diffmas.evaluation.baselines import TextAgents
from diffmas.evaluation.scorer import Scorer
from diffmas.training.data import question_and_answer

__all__ = ["WRITER", "Writers", "right_turns"]

WRITER = Agent("writer", "{prompt}")  # the one agent of `Writers`, and of the directories that they are saved to


def right_turns(
    team: TextAgents, rows: list[dict], samples: int = 1, scorer: Scorer | None = None, batch_size: int | None = None,
    **generation,
) -> list[dict]:  # fmt: skip
    """The turns of a text team that led to right answers: {"agent", "prompt", "answer"}, in the order of questions, samples
    and agents. The prompt is without chat template; the answer is what the agent wrote.

    rows, samples, scorer, batch_size, generation: as `evaluate` takes them. A sample counts only if every agent ended its text
    by itself: one that was cut off would be taught to end there. Raises ValueError if no sample is left, since nothing can be
    learned then.
    """
    questions, golds = map(list, zip(*(question_and_answer(row, f"rows[{i}]") for i, row in enumerate(rows))))
    scorer = scorer or Scorer()
    turns, answers = team.write(questions, samples, batch_size, **generation)
    right, ended, kept = 0, 0, []
    for i, correct in enumerate(verdict for samples in scorer.verdicts(answers.texts, golds, rows) for verdict in samples):
        whole = all(turn.lengths[i] < turn.most for turn in turns)
        right, ended = right + correct, ended + whole
        if whole and correct:
            kept += [{"agent": t.agent.name, "prompt": t.prompts[i], "answer": t.texts[i]} for t in turns]
    if not kept:
        raise ValueError(
            f"rows: expected a right answer at least, got {right} right and {ended} that ended by themselves of "
            f"{len(rows) * samples}, none of them both; more samples, tokens or an easier task may help"
        )
    return kept


class Writers(MultiAgentSystem):
    """Agents that are trained to write: a row of `right_turns` is one agent's prompt, as it gets it, and what it is to write.

    model, tokenizer, agents, chat_template, chat_options: as in `MultiAgentSystem`, the agents of the text team.

        >>> writers = Writers(model, tokenizer, system.agents)
        >>> writers([{"agent": "planner", "prompt": "plan : where is the key"}], ["in the garden"]).loss.backward()
    """

    def __init__(self, model, tokenizer, agents: list[Agent], chat_template: bool | None = None, chat_options=None):
        super().__init__(
            model, tokenizer, [WRITER], realign="none", chat_template=chat_template, chat_options=chat_options
        )  # fmt: skip
        self.roles = {agent.name: Agent(agent.name, "{prompt}", system=agent.system) for agent in agents}

    def own_options(self) -> dict:
        return {"roles": [agent.described() for agent in self.roles.values()]}

    @classmethod
    def of_description(cls, model, tokenizer, description: dict) -> "Writers":
        if not description["own_options"]:
            raise ValueError("own_options: expected the roles, got none")
        roles = [Agent(**agent) for agent in description["own_options"]["roles"]]
        return cls(model, tokenizer, roles, description["chat_template"], description["chat_options"])

    def prompt_ids(self, agent: Agent, fields: dict) -> list[int]:
        """The token ids of the prompt, with the system message of the agent that the row names."""
        role = fields.get("agent")
        if role not in self.roles:
            raise ValueError(f"agent: expected one of {sorted(self.roles)}, got {role!r}")
        return super().prompt_ids(self.roles[role], fields)
