"""Which token of one tokenizer stands where a token of another does: in a prompt that two models read, for rows that are fused.

Of equal prompts of equal tokenizers, each token has itself. Else a token has the one that covers most of its characters (of
several the last, which has read the others), in the prompt without what chat templates put around it; and none where that is
none. C2C encodes each of the reader's tokens anew, where here both models read the text as their own tokenizers cut it.
"""

from diffmas.agents.chat import chat_text

__all__ = ["aligned", "check_tokenizers", "partners"]

Span = tuple[int, int]


def same(a, b) -> bool:
    """Whether two tokenizers have one vocabulary."""
    return a is b or a.get_vocab() == b.get_vocab()


def check_tokenizers(a, b) -> None:
    """Raises ValueError for two whose tokens cannot be aligned."""
    if not same(a, b) and not (a.is_fast and b.is_fast):
        raise ValueError(
            "tokenizer: expected one of the system's vocabulary, or two fast tokenizers, whose tokens know their place in the "
            f"text, got {type(b).__name__} beside {type(a).__name__}"
        )


def spans(member, agent, fields: dict, count: int) -> list[Span]:
    """The characters of the agent's rendered prompt that each of its first `count` tokens stands for, none of those around it.

    Raises ValueError where the chat template changes the prompt: it may only strip white space around it.
    """
    text = prompt = agent.render(fields)
    if member.chat_template:
        text = chat_text(member.tokenizer, agent, prompt, member.chat_options or {})
    elif agent.system:
        text = f"{agent.system}\n\n{prompt}"
    special = {"add_special_tokens": False} if member.chat_template else {}
    found = member.tokenizer(text, return_offsets_mapping=True, **special)["offset_mapping"][:count]
    kept = prompt if prompt in text else prompt.strip()
    at, first = text.rfind(kept), prompt.find(kept)
    if at < 0:
        raise ValueError(f"agent {agent.name!r}: chat_template: expected it to keep the prompt {prompt!r}, got {text!r}")
    within = lambda x: first + min(max(x - at, 0), len(kept))  # noqa: E731
    return [(within(a), within(b)) for a, b in found]


def aligned(own: list[Span], theirs: list[Span]) -> list[int]:
    """For each of `own` the number of the one of `theirs` that has most of its characters, or -1."""
    found = []
    for a, b in own:
        shared = [min(b, d) - max(a, c) for c, d in theirs]
        most = max(shared, default=0)
        found.append(len(shared) - 1 - shared[::-1].index(most) if most > 0 else -1)
    return found


def partners(system, agent, sharer, fields: dict) -> list[int]:
    """For each token of an agent's prompt the number of the sharer's token whose row it is fused with, or -1 for none.

    Raises ValueError for prompts that are not the same text.
    """
    member, other = system.member(agent), system.member(sharer)
    text, theirs = (a.render(fields) for a in (agent, sharer))
    if text != theirs:
        raise ValueError(
            f"agent {agent.name!r}: expected the prompt of {sharer.name!r}, whose rows its own are fused with, {theirs!r}, got "
            f"{text!r}"
        )
    ids, their_ids = (system.prompt_ids(a, fields) for a in (agent, sharer))
    if same(member.tokenizer, other.tokenizer) and ids == their_ids[: len(ids)]:
        return list(range(len(ids)))
    return aligned(spans(member, agent, fields, len(ids)), spans(other, sharer, fields, len(their_ids)))
