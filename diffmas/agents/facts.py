"""What a team's directory knows of its training and results: card.json, from which its model card is written again."""

from pathlib import Path

from diffmas.agents import card
from diffmas.agents.file import read_agents
from diffmas.json_file import write_json

__all__ = ["add_facts"]

SAME = ("data", "method", "questions", "samples", "seed", "temperature", "top_p")


def add_facts(path, **facts) -> None:
    """Adds to card.json of a team's directory and writes its card again; a fact takes the place of an earlier one.

    data, training, made_with: {name: value}. metrics: [{"data", "method", "accuracy", "low", "high", "questions", "samples",
    "seed", ...}]; one takes the place of an earlier one that is the same in SAME. They are of the weights that are there:
    whoever saves a system into the directory again starts without. Raises ValueError for a directory without a team.
    """
    path = Path(path)
    described, known = read_agents(path), card.read_facts(path)
    if "metrics" in facts:
        metrics = {tuple(m.get(key) for key in SAME): m for m in [*known.get("metrics", []), *facts["metrics"]]}
        facts["metrics"] = list(metrics.values())
    write_json(path / card.FACTS, {**known, **facts})
    card.write(path, described)
