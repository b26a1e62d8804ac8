"""docs/teams.md: every team on it trains, is saved and loaded, and answers."""

import re
from pathlib import Path

import pytest
import tiny_systems as tiny
import torch
import yaml

from diffmas import MultiAgentSystem
from diffmas.cli.build import other_of
from diffmas.cli.config import Config
from diffmas.cli.plain_data import parsed
from diffmas.training import add_lora, lora_config

PAGE = (Path(__file__).parent.parent / "docs" / "teams.md").read_text()
BLOCKS = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)
QUESTIONS, ANSWERS = ["where is the key", "where is the lamp"], ["in the garden", "the attic"]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: re.findall(r"name: (\w+)", block)[0] + str(block.count("name:")))
def test_a_team_of_the_page(block, tmp_path):
    config = parsed(Config, {"model": "base", **yaml.safe_load(block)})
    base = lambda: tiny.model(num_key_value_heads=2)  # noqa: E731
    model = add_lora(base(), config.agents, config.system.adapter_scope, lora_config(r=2, alpha=4))
    beside = lambda: (tiny.model(1, num_hidden_layers=3, hidden_size=24, head_dim=12), tiny.tokenizer())  # noqa: E731
    others = {name: other_of(one, config, model, loaded=beside()) for name, one in config.others.items()}
    for name, p in (pair for other in others.values() for pair in other.named_parameters()):
        if name.endswith(".gate"):  # of C2C, open
            p.data.fill_(0.5)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_B" in n:
                p.normal_(0, 0.1)
    team = MultiAgentSystem(model, tiny.tokenizer(), config.agents, others=others, **vars(config.system))
    team(QUESTIONS, ANSWERS).loss.backward()
    trained = [p.grad for p in team.parameters() if p.requires_grad]
    assert trained and all(g is not None and g.isfinite().all() for g in trained)
    assert len(block.splitlines()) <= 10
    team.save_pretrained(tmp_path)
    bases = {name: beside()[0] for name in others}
    loaded = MultiAgentSystem.from_pretrained(tmp_path, base(), tiny.tokenizer(), others=bases)
    want = team.generate(QUESTIONS, max_new_tokens=5, temperature=0, seed=0)
    assert loaded.generate(QUESTIONS, max_new_tokens=5, temperature=0, seed=0) == want and loaded.agents == config.agents


def test_the_page_has_its_teams():
    assert len(BLOCKS) == 18
