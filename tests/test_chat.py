"""Chat templates: what they are given, and what is said where they do not fit."""

import json

import pytest
import tiny_systems as tiny
import yaml
from tokenizers.processors import TemplateProcessing

from diffmas import Agent, MultiAgentSystem
from diffmas.agents.chat import template_options
from diffmas.agents.options import Options
from diffmas.evaluation import latent_mas, single_agent

# With what published templates have: defaults that are set where nothing came, tags of transformers, loop control, namespaces.
TEMPLATE = """{%- set ns = namespace(found=false) %}{{- bos_token }}
{%- if place is not defined %}{%- set place = "kitchen" %}{%- endif %}
{%- for message in messages %}
{%- if message.role == "tool" %}{%- continue %}{%- endif %}
{%- if loop.first and tools %}{{- tools | length }}{%- endif %}
{%- generation %}{{- message.content + " " }}{%- endgeneration %}{%- set ns.found = true %}
{%- endfor %}
{%- if add_generation_prompt %}{{- "answer : in the " + place + " " }}{%- endif %}
{%- if enable_thinking is defined and enable_thinking is false %}{{- "notes" }}{%- endif %}"""
REFUSES_SYSTEM = """{% if messages[0].role == "system" %}{{ raise_exception("System role not supported") }}{% endif %}x"""
LEAVES_SYSTEM_OUT = """{% for m in messages %}{% if m.role == "user" %}{{ m.content }}{% endif %}{% endfor %}"""
CREW = [Agent("planner", "plan {question}", 1), Agent("solver", "{question}", system="where is")]


def tokenizer(template=TEMPLATE):
    tok = tiny.tokenizer()
    tok.add_special_tokens({"bos_token": "<end>"})
    tok.chat_template = template
    return tok


def system(template=TEMPLATE, agents=CREW, **options):
    return MultiAgentSystem(tiny.model(), tokenizer(template), agents, **options)


def prompt(system, i: int = -1) -> str:
    return system.tokenizer.decode(system.prompt_ids(system.agents[i], {"question": "the key"}))


def test_which_options_a_template_reads():
    assert template_options(tokenizer()) == {"place", "tools", "enable_thinking"}


def test_options_reach_the_template():
    assert prompt(system()) == "<end> where is the key answer : in the kitchen"
    s = system(chat_options={"enable_thinking": False, "place": "cellar"})
    assert prompt(s) == "<end> where is the key answer : in the cellar notes"
    assert prompt(s, 0) == "<end> plan the key answer : in the cellar notes"
    for method in (single_agent(s), latent_mas(s)):
        assert prompt(method.system).endswith("in the cellar notes")


def test_special_tokens_of_the_template_are_not_doubled():
    s = system()
    s.tokenizer.add_bos_token = True
    assert s.prompt_ids(s.agents[-1], {"question": "the key"}).count(s.tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("template", ["$A <end>", "<end> $A <end>", "<end> $A", "$A"])
def test_a_prompt_goes_on_and_an_answer_ends_once(template):
    """Whatever the tokenizer puts around every text, and whatever the text itself ends in."""
    tok = tiny.tokenizer()
    tok.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=[("<end>", tok.eos_token_id)])
    s = MultiAgentSystem(tiny.model(), tok, [Agent("solver", "{question}")])
    begin = "<end> " if template.startswith("<end>") else ""
    for text in ("the key", "the key <end>", "key"):
        assert tok.decode(s.prompt_ids(s.agents[0], {"question": text})) == begin + text
    for answer in ("in the attic", "in the attic <end>"):
        assert tok.decode(s.answer_ids(answer)) == "in the attic <end>"


def test_options_are_saved_and_loaded(tmp_path):
    s = system(chat_options={"enable_thinking": False})
    s.save_pretrained(tmp_path)
    load = lambda: MultiAgentSystem.from_pretrained(tmp_path, tiny.model(), tokenizer())  # noqa: E731
    assert load().chat_options == {"enable_thinking": False} and prompt(load()) == prompt(s)
    file = tmp_path / "agents.json"
    described = json.loads(file.read_text())
    del described["chat_options"]  # as files were before there were options
    file.write_text(json.dumps(described))
    assert load().chat_options is None and prompt(load()) == prompt(system())
    s.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="agents.json: chat_options: expected none, the .* reads none, got 'enable_thinking'"):
        MultiAgentSystem.from_pretrained(tmp_path, tiny.model(), tokenizer(LEAVES_SYSTEM_OUT))


def test_options_in_a_config(tmp_path):
    from diffmas.cli import config

    path = tmp_path / "config.yaml"
    crew = [{"name": "solver", "prompt": "{question}"}]
    write = lambda **given: path.write_text(yaml.safe_dump({"model": "x", "agents": crew, "system": given}))  # noqa: E731
    write(chat_options={"enable_thinking": False})
    assert config.load(path).system == Options(chat_options={"enable_thinking": False})
    write(chat_options="thinking")
    with pytest.raises(ValueError, match="system.chat_options: expected .*dict.*, got 'thinking'"):
        config.load(path)


@pytest.mark.parametrize("name", ["thinking", "messages", "bos_token", "tokenize", "namespace"])
def test_an_option_that_the_template_does_not_read_is_refused(name):
    message = rf"chat_options: expected some of \['enable_thinking', 'place', 'tools'\], .* got '{name}'"
    with pytest.raises(ValueError, match=message):
        system(chat_options={name: False})


def test_bad_chat_arguments():
    plain = tiny.tokenizer()
    with pytest.raises(ValueError, match="chat_template: expected a tokenizer that has one.* chat_template=False"):
        MultiAgentSystem(tiny.model(), plain, CREW, chat_template=True)
    for off in (dict(), dict(chat_template=False)):
        with pytest.raises(ValueError, match=r"chat_options: expected none without a chat template, got \['place'\]"):
            MultiAgentSystem(tiny.model(), plain if not off else tokenizer(), CREW, chat_options={"place": "attic"}, **off)
    with pytest.raises(ValueError, match="chat_template: expected a whole Jinja template, got a damaged one"):
        system("{% for m in messages %}{{ m.content")
    for value in ({"place": object()}, {"place": (1, 2)}, {1: 2}, "place"):
        with pytest.raises(ValueError, match="chat_options: expected a dict of what JSON can hold, got"):
            system(chat_options=value)


def test_a_system_message_that_the_template_does_not_take():
    with pytest.raises(ValueError, match="agent 'solver': the chat template refuses its system message; .*System role not"):
        system(REFUSES_SYSTEM)
    with pytest.raises(ValueError, match="agent 'solver': the chat template leaves its system message out; put it into"):
        system(LEAVES_SYSTEM_OUT)
    assert prompt(system(LEAVES_SYSTEM_OUT, CREW[:1])) == "plan the key"
    with pytest.raises(ValueError, match=r"agent 'planner': the chat template refuses its prompt \(no\)"):
        system("{{ raise_exception('no') }}")
    late = system(
        "{% if messages[0].content == 'the key' %}{{ raise_exception('no') }}{% endif %}x", CREW[:1] + tiny.agents()[-1:]
    )
    assert late.prompt_ids(late.agents[0], {"question": "the key"})
    with pytest.raises(ValueError, match=r"questions\[1\], agent 'alone': the chat template refuses its prompt"):
        alone = MultiAgentSystem(late.model, late.tokenizer, [Agent("alone", "{question}")])
        alone(["the ring", "the key"], ["in the attic", "in the attic"])
