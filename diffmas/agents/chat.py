"""The tokenizer's chat template: an agent's messages as text, and which options a template takes."""

import re
from dataclasses import replace

import jinja2
from jinja2 import meta

__all__ = ["chat_text", "check_chat", "template_options"]

# What transformers and we give a template ourselves.
GIVEN = {"messages", "add_generation_prompt", "continue_final_message", "raise_exception", "strftime_now"}
MARK = re.compile(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}")  # transformers' own tag, which jinja2 does not know


def template_options(tokenizer) -> set[str]:
    """The names that the tokenizer's chat template reads and only its caller can give, such as enable_thinking."""
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    source = MARK.sub("", tokenizer.get_chat_template())
    read = meta.find_undeclared_variables(environment.parse(source))
    return read - GIVEN - environment.globals.keys() - tokenizer.special_tokens_map.keys()


def chat_text(tokenizer, agent, prompt: str, options: dict) -> str:
    """An agent's system message and prompt through the chat template, up to where its answer begins.

    Raises ValueError naming the agent where the template refuses them, as some do with a system message.
    """
    messages = [{"role": "system", "content": agent.system}] if agent.system else []
    messages.append({"role": "user", "content": prompt})
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **options)
    except jinja2.TemplateError as error:
        what = "its system message; put it into the prompt" if agent.system else "its prompt"
        raise ValueError(f"agent {agent.name!r}: the chat template refuses {what} ({error})") from error


def check_chat(tokenizer, chat_template: bool, options: dict, agents) -> None:
    """Raises ValueError for a chat template that is not there, options that it does not read, and agents that it refuses."""
    if not chat_template:
        if options:
            raise ValueError(f"chat_options: expected none without a chat template, got {sorted(options)}")
        return
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "chat_template: expected a tokenizer that has one, got one without; set tokenizer.chat_template, or take "
            "chat_template=False for prompts as they are"
        )
    try:
        known = template_options(tokenizer)
    except jinja2.TemplateError as error:
        raise ValueError(f"chat_template: expected a whole Jinja template, got a damaged one ({error})") from error
    if unknown := sorted(options.keys() - known):
        options = f"some of {sorted(known)}, which the chat template reads" if known else "none, the chat template reads none"
        raise ValueError(f"chat_options: expected {options}, got {unknown[0]!r}")
    for agent in agents:
        text = chat_text(tokenizer, agent, "x", options)
        if agent.system and chat_text(tokenizer, replace(agent, system=None), "x", options) == text:
            raise ValueError(f"agent {agent.name!r}: the chat template leaves its system message out; put it into the prompt")
