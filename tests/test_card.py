"""Every saved team says what it is; what a person wrote into its card stays; a team goes to the hub in one call."""

import json
from dataclasses import replace

import pytest
import tiny_systems as tiny
from huggingface_hub import ModelCard
from test_export import HUB, FakeHub

from diffmas import MultiAgentSystem, patch_model
from diffmas.agents import Other, Projector, hub
from diffmas.agents import card as cards
from diffmas.agents.card import BEGIN, END
from diffmas.agents.facts import add_facts
from diffmas.training.checkpoint import check_manifest, write_manifest

METRIC = {"data": "test.jsonl", "method": "diffmas", "accuracy": 0.5, "low": 0.25, "high": 0.7501, "questions": 8, "samples": 2,
          "seed": 3}  # fmt: skip


def card_of(path) -> ModelCard:
    return ModelCard.load(path / "README.md")


def test_a_saved_team_has_a_card(tmp_path):
    tiny.system(7, realign="norm", sinks=2).save_pretrained(tmp_path / "team")
    card = card_of(tmp_path / "team")
    assert card.data.library_name == "diffmas" and "multi-agent" in card.data.tags
    for text in (
        "# team", "### planner: T = 7", "### solver: answers", "- realign: `norm`", "- sinks: `2`",
        "default (r = 2, alpha = 4)", "MultiAgentSystem.from_pretrained('team')", "Licence of the base model: not known",
    ):  # fmt: skip
        assert text in card.text, text
    assert "[More Information Needed]" not in card.text  # PEFT's own


def test_a_card_says_what_the_agents_do():
    def said(*kinds):
        """Of agents by T and tokens of a message."""
        system = tiny.system(lora=False)
        crew = [replace(system.agents[0], name=f"a{i}", latent_steps=T, max_message_tokens=n) for i, (T, n) in enumerate(kinds)]
        return cards._turns([agent.described() for agent in [*crew, system.agents[-1]]])

    assert said((2, None), (3, None)) == "each agent but the last takes latent steps, and the last one answers"
    assert said((0, 4)) == "each agent but the last writes text, and the last one answers"
    assert said(("n", 4)) == "each agent but the last takes latent steps and writes text, and the last one answers"
    assert said((0, None)) == "each agent but the last hands on its prompt, and the last one answers"
    assert said((2, None), (0, 4)) == "what each does before the last one is said below, and the last one answers"
    assert said() == "one agent, which answers"


def test_facts_come_into_the_card_and_replace_earlier_ones(tmp_path):
    system, team = tiny.system(), tmp_path / "team"
    system.save_pretrained(team)
    add_facts(team, data={"train": "rows.jsonl", "rows": 8}, training={"steps": 4, "seed": 1}, metrics=[METRIC])
    others = [{**METRIC, "data": "other.jsonl"}, {**METRIC, "questions": 2}]
    add_facts(team, metrics=[{**METRIC, "accuracy": 0.75}, *others], made_with={"commit": None})
    text = card_of(team).text
    for line in (
        "- train: rows.jsonl", "- steps: 4", "- seed: 1", "- commit: not known",
        "| test.jsonl | diffmas | 75.0 | [25.0, 75.0] | 8 | 2 | 3 |",
        "| test.jsonl | diffmas | 50.0 | [25.0, 75.0] | 2 | 2 | 3 |",
        "| other.jsonl | diffmas | 50.0 | [25.0, 75.0] | 8 | 2 | 3 |",
    ):  # fmt: skip
        assert line in text, line
    assert text.count("test.jsonl") == 2
    system.save_pretrained(team)  # other weights, for all that is known
    assert "test.jsonl" not in card_of(team).text and not (team / "card.json").exists()
    with pytest.raises(ValueError, match="agents.json"):
        add_facts(tmp_path, metrics=[])


def test_what_a_person_wrote_stays(tmp_path):
    system, team = tiny.system(), tmp_path / "team"
    system.save_pretrained(team)
    file = team / "README.md"
    first = file.read_text()
    file.write_text("---\nlicense: mit\n---\n\nMine before.\n\n" + first[first.index(BEGIN) :] + "\nMine after.\n")
    system.save_pretrained(team)
    add_facts(team, metrics=[METRIC])
    text = file.read_text()
    assert "Mine before." in text and text.endswith("Mine after.\n") and "license: mit" in text and "| 50.0 |" in text
    assert text.count(BEGIN) == text.count(END) == 1 and "Framework versions" not in text
    file.write_text("All mine.\n")
    system.save_pretrained(team)
    add_facts(team, metrics=[METRIC])
    assert file.read_text() == "All mine.\n"


def test_a_card_in_another_encoding_stays(tmp_path):
    file, mine = tmp_path / "README.md", "Größe".encode("latin-1")
    file.write_bytes(mine)
    tiny.system().save_pretrained(tmp_path)
    assert file.read_bytes() == mine and (tmp_path / "agents.json").is_file()
    file.write_bytes(mine + f"\n{BEGIN}\n{END}\n".encode())
    add_facts(tmp_path, metrics=[METRIC])
    assert file.read_bytes().startswith(mine + b"\n") and b"| 50.0 |" in file.read_bytes()


@pytest.mark.parametrize("base", ["runs--1", "a..b"])
def test_a_base_model_of_a_name_that_the_hub_refuses(tmp_path, base):
    system = tiny.system()
    system.model.get_base_model().config._name_or_path = base
    system.save_pretrained(tmp_path)
    assert base in card_of(tmp_path).text and (tmp_path / "agents.json").is_file()


def test_a_team_is_saved_without_its_card(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(cards, "contents", full)
    with pytest.warns(UserWarning, match="README.md: the model card was not written: no space left"):
        tiny.system().save_pretrained(tmp_path)
    assert (tmp_path / "agents.json").is_file() and not (tmp_path / "README.md").exists()


def test_a_card_that_was_put_aside_comes_back(tmp_path):
    """After a save that was cut off, too."""
    system, (file, aside) = tiny.system(), (tmp_path / "README.md", tmp_path / "README.md.kept")
    aside.write_text("Mine.\n")
    file.write_text("library_name: peft\n")
    system.save_pretrained(tmp_path)
    assert file.read_text() == "Mine.\n" and not aside.exists()
    with pytest.raises(ZeroDivisionError), cards.kept(tmp_path):
        assert not file.exists()
        file.write_text("of others")
        raise ZeroDivisionError
    assert file.read_text() == "Mine.\n"


def test_a_checkpoint_stays_whole_when_its_card_is_written_again(tmp_path):
    tiny.system().save_pretrained(tmp_path)
    write_manifest(tmp_path)
    add_facts(tmp_path, metrics=[METRIC])
    assert "adapter_model.safetensors" in check_manifest(tmp_path)
    file = tmp_path / "manifest.json"  # older ones have the card
    file.write_text(json.dumps({**json.loads(file.read_text()), "README.md": "0" * 64}))
    assert "adapter_model.safetensors" in check_manifest(tmp_path)


def test_push_to_the_hub_in_one_call(monkeypatch):
    calls, system = [], tiny.system()
    monkeypatch.setattr(hub, "HfApi", lambda: FakeHub(calls))
    for name, base, says in (
        ("me/team", "", "base: expected a hub name"),
        ("not/a/name", HUB, "repo: expected NAME or OWNER/NAME"),
    ):
        system.model.get_base_model().config._name_or_path = base
        with pytest.raises(ValueError, match=says):
            system.push_to_hub(name)
    assert not calls
    system.model.get_base_model().config._name_or_path = HUB
    assert system.push_to_hub("me/team") == "https://huggingface.co/me/team"
    (created, uploaded) = calls
    assert created == ("create", "me/team", True, True) and uploaded[1] == "me/team"
    assert {"README.md", "agents.json", "adapter_model.safetensors", "tokenizer.json"} <= uploaded[2]


def mixed(small: str, base: str = HUB):
    """A team with an agent of another model."""
    models = tiny.model(), tiny.model(4)
    for model, name in zip(models, (base, small)):
        patch_model(model)
        model.config._name_or_path = name
    crew = tiny.agents()
    crew[1] = replace(crew[1], model="small")
    others = {"small": Other(models[1], tiny.tokenizer(), Projector(models[1], models[0]))}
    return MultiAgentSystem(models[0], tiny.tokenizer(), crew, others=others)


def test_a_card_says_which_agent_has_which_model(tmp_path):
    mixed("someone/small-1b").save_pretrained(tmp_path / "team")
    tiny.system().save_pretrained(tmp_path / "one")
    text, of_one = card_of(tmp_path / "team").text, card_of(tmp_path / "one").text
    assert "### critic: T = 2, of the model small" in text and "what other models (`small`) make" in text
    assert "share one language model" not in text
    assert "share one language model" in of_one and "of the model" not in of_one


def test_other_models_have_to_be_on_the_hub_too(tmp_path, monkeypatch):
    calls, system = [], mixed(str(tmp_path))
    monkeypatch.setattr(hub, "HfApi", lambda: FakeHub(calls))
    system.save_pretrained(tmp_path / "team")
    for push in (system.push_to_hub, lambda repo: hub.push_to_hub(tmp_path / "team", repo)):
        with pytest.raises(ValueError, match="others, 'small': base: expected a hub name to push to me/team"):
            push("me/team")
    assert not calls
    assert mixed("someone/small-1b").push_to_hub("me/team") == "https://huggingface.co/me/team"


def test_an_export_has_the_facts_too(tmp_path):
    from diffmas.serving.export import export

    tiny.system().save_pretrained(tmp_path / "team")
    add_facts(tmp_path / "team", metrics=[METRIC])
    out = export(tmp_path / "team", tmp_path / "out", HUB)
    card = card_of(out)
    assert card.data.base_model == HUB and "| test.jsonl | diffmas | 50.0 |" in card.text and "# out" in card.text
    assert json.loads((out / "card.json").read_text())["metrics"] == [METRIC]
    assert MultiAgentSystem.from_pretrained(out, tiny.model(), tiny.tokenizer()).agents == tiny.agents()
