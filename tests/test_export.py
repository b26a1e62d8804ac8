"""A team to give away: the directory loads, says what it is, and goes to the hub; nothing is lost on the way."""

import json

import pytest
import tiny_systems as tiny
import torch
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from diffmas import MultiAgentSystem
from diffmas.agents import card as cards
from diffmas.agents import hub
from diffmas.agents.hub import check_push
from diffmas.cli import main as cli
from diffmas.serving.export import export

HUB = "someone/base-1b"


@pytest.fixture
def base(tmp_path):
    return tiny.save_base(tmp_path / "base")


def saved(base, path, template: bool = False, **options):
    """A trained team on disk, and its system."""
    system = tiny.system(**options)
    system.model.get_base_model().config._name_or_path = str(base)
    if template:
        system.tokenizer.chat_template = "{% for m in messages %}key {{ m.content }}{% endfor %}"
        system.chat_template = True
    if system.realign.mode == "learned":
        with torch.no_grad():
            system.realign.weight += 0.1
    system.save_pretrained(path)
    return system


@pytest.mark.parametrize(
    "options",
    [{}, {"adapter_scope": "per_role"}, {"realign": "learned", "template": True, "trace_content": "latent_only"}],
    ids=["shared", "per_role", "learned"],
)
def test_an_export_is_the_team(tmp_path, base, options):
    system = saved(base, tmp_path / "team", **options)
    (tmp_path / "team" / "checkpoint-2").mkdir()  # what training leaves behind
    (tmp_path / "team" / "gradients.csv").write_text("x")
    out = export(tmp_path / "team", tmp_path / "given" / "out")
    want = system.generate(["where is the key"], 6, temperature=0)
    again = MultiAgentSystem.from_pretrained(out)
    assert again.generate(["where is the key"], 6, temperature=0) == want and again.describe() == system.describe()
    again.load_weights(tmp_path / "team")  # of one tokenizer and chat template
    roles = {"planner", "critic", "solver"} if options.get("adapter_scope") else set()
    adapter = set() if roles else {"adapter_config.json", "adapter_model.safetensors"}
    names = {p.name for p in out.iterdir()} - {"chat_template.jinja", "special_tokens_map.json", "realign.safetensors"}
    assert names == {"README.md", "agents.json", "tokenizer.json", "tokenizer_config.json", *adapter, *roles}
    assert {p.name for p in out.parent.iterdir()} == {"out"}


def test_another_place_of_the_base_model(tmp_path, base):
    saved(base, tmp_path / "team")
    out = export(tmp_path / "team", tmp_path / "out", HUB)
    for name in ("README.md", "agents.json", "adapter_config.json", "tokenizer_config.json"):
        assert str(tmp_path) not in (out / name).read_text(), name
    assert json.loads((out / "agents.json").read_text())["base_model"] == HUB
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == HUB
    assert MultiAgentSystem.from_pretrained(out, base).agents == tiny.agents()
    with pytest.raises(ValueError, match="expected agents of this base model"):
        MultiAgentSystem.from_pretrained(out, tiny.model(seed=5))


def test_the_card_says_what_it_is(tmp_path, base, monkeypatch):
    fence = "say ``` {question} and {place}"
    crew = [*tiny.agents(7)[:2], tiny.agents()[2].__class__("solver", fence, system="be brief")]
    MultiAgentSystem(tiny.model(), tiny.tokenizer(), crew, sinks=2).save_pretrained(tmp_path / "team")
    read = lambda: ModelCard.load(export(tmp_path / "team", tmp_path / "out", HUB, overwrite=True) / "README.md")  # noqa: E731
    card = read()
    assert card.data.base_model == HUB and card.data.library_name == "diffmas" and card.data.license is None
    for text in (
        "### planner: T = 7", "### solver: answers", "be brief", f"````text\n{fence}\n````", "- realign: `ridge`",
        "- sinks: `2`", "MultiAgentSystem.from_pretrained('out')", '"question": "...", "place": "..."', "not known",
        "Adapters: none",
    ):  # fmt: skip
        assert text in card.text, text
    known = tmp_path / "cached.md"
    known.write_text("---\nlicense: other\nlicense_name: house\nlicense_link: LICENSE\n---\nA base model.\n")
    monkeypatch.setattr(cards, "try_to_load_from_cache", lambda repo, name: str(known) if repo == HUB else None)
    card = read()
    assert (card.data.license, card.data.license_name) == ("other", "house") and "base model: house" in card.text


def test_the_licence_beside_a_base_model(tmp_path, base):
    saved(base, tmp_path / "team")
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    card = ModelCard.load(export(tmp_path / "team", tmp_path / "out") / "README.md")
    assert card.data.license == "mit" and card.data.base_model is None
    (base / "README.md").write_text("---\n- no\n: card\n---\n")
    assert cards.licence_of(str(base)) == {}


def test_what_is_refused_leaves_everything_as_it_was(tmp_path, base):
    team = tmp_path / "team"
    saved(base, team)
    other = tmp_path / "mine"
    other.mkdir()
    (other / "README.md").write_text("mine")
    for out in (other, team, team / "out", tmp_path):
        for overwrite in (False, True):
            with pytest.raises(ValueError, match="out: expected"):
                export(team, out, overwrite=overwrite)
    assert (other / "README.md").read_text() == "mine"
    first = export(team, tmp_path / "out")
    with pytest.raises(ValueError, match="out: expected a new directory"):
        export(team, first)
    before = {p.name: p.read_bytes() for p in first.iterdir()}
    weights = (team / "adapter_model.safetensors").read_bytes()
    for name, damaged in (("adapter_model.safetensors", weights[:99]), ("adapter_config.json", b"{"), ("agents.json", b"{")):
        whole = (team / name).read_bytes()
        (team / name).write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{name}: expected"):
            export(team, first, overwrite=True)
        (team / name).write_bytes(whole)
    assert {p.name: p.read_bytes() for p in first.iterdir()} == before
    export(team, first, HUB, overwrite=True)
    assert HUB in (first / "agents.json").read_text()


class FakeHub:
    """What of HfApi is called, on a directory."""

    def __init__(self, calls):
        self.calls = calls

    def create_repo(self, repo_id, *, private, exist_ok):
        self.calls.append(("create", repo_id, private, exist_ok))
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        from pathlib import Path

        self.calls.append(("upload", repo_id, {p.name for p in Path(folder_path).iterdir()}))


def call(*arguments, code=0):
    result = CliRunner().invoke(cli.app, ["export", *map(str, arguments)])
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def test_push_to_the_hub(tmp_path, base, monkeypatch):
    import inspect

    from huggingface_hub import HfApi

    calls = []
    monkeypatch.setattr(hub, "HfApi", lambda: FakeHub(calls))
    saved(base, tmp_path / "team")
    out = tmp_path / "out"
    for arguments, says in (
        (["--push-to-hub", "me/team"], "base: expected a hub name"),
        (["--push-to-hub", "not/a/name", "--base", HUB], "repo: expected NAME or OWNER/NAME"),
    ):
        assert says in call(tmp_path / "team", out, *arguments, code=1) and not out.exists() and not calls
    said = call(tmp_path / "team", out, "--push-to-hub", "me/team", "--base", HUB, "--no-private")
    assert "https://huggingface.co/me/team" in said and str(out) in said
    assert calls[0] == ("create", "me/team", False, True)
    assert calls[1] == ("upload", "me/team", {p.name for p in out.iterdir()})
    for name in ("create_repo", "upload_folder"):  # the real one takes what the fake one is given
        taken = inspect.signature(getattr(HfApi, name)).parameters
        assert set(inspect.signature(getattr(FakeHub, name)).parameters) <= set(taken)
    with pytest.raises(ValueError, match="base: expected a hub name"):
        check_push("me/team", str(base))
