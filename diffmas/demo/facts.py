"""The demo's task: who took which thing where, with the facts split between three readers.

Every fact is a triple (name, thing, place). Names differ within an example; things and places are drawn independently
with replacement, so that no answer can be found by elimination. A question asks for the thing or the place of one name.
"""

import random

NAMES = "Anna Ben Clara David Emma Felix Grace Henry Iris Jonas Karin Leo Maria Nils Olga Peter".split()
THINGS = "key lamp ring book coin map cup rope drum hat knife letter mirror basket candle whistle".split()
PLACES = "kitchen cellar garden attic garage library stable bedroom hall tower bakery harbor school chapel office barn".split()
VERBS = "took carried brought moved".split()

READERS = 3  # agents that hold facts
FACTS_PER_READER = 1

READER_PROMPT = "Facts: {facts} Write notes."
SOLVER_PROMPT = "Question: {question}"
NOTES_PROMPT = "Notes: {notes} Question: {question}"  # a solver that is given text notes
ALL_FACTS_PROMPT = "Facts: {facts} Question: {question}"  # everything in one context: the recall check


def make_facts(rng: random.Random, count: int) -> list[dict]:
    """`count` facts about different people."""
    return [
        {"name": name, "thing": rng.choice(THINGS), "place": rng.choice(PLACES), "verb": rng.choice(VERBS)}
        for name in rng.sample(NAMES, count)
    ]


def sentence(fact: dict) -> str:
    return "{name} {verb} the {thing} to the {place}.".format(**fact)


def notes(facts: list[dict]) -> str:
    """The short form of facts that a text agent is trained to write, four tokens a fact."""
    return " ".join("{name} {thing} {place}.".format(**fact) for fact in facts)


def ask(rng: random.Random, fact: dict) -> tuple[str, str]:
    """A question about one fact, and its one-word answer."""
    if rng.random() < 0.5:
        return f"Where did {fact['name']} go?", fact["place"]
    return f"What did {fact['name']} take?", fact["thing"]


def make_row(rng: random.Random, facts_per_reader: int = FACTS_PER_READER) -> dict:
    """A row whose answer one reader knows: facts1, facts2, ... (one text per reader), facts (all), question, answer."""
    facts = make_facts(rng, READERS * facts_per_reader)
    question, answer = ask(rng, rng.choice(facts))
    parts = [facts[i * facts_per_reader : (i + 1) * facts_per_reader] for i in range(READERS)]
    texts = {f"facts{i}": " ".join(map(sentence, part)) for i, part in enumerate(parts, start=1)}
    return {**texts, "facts": " ".join(map(sentence, facts)), "question": question, "answer": answer}


def make_rows(count: int, seed: int, facts_per_reader: int = FACTS_PER_READER) -> list[dict]:
    """`count` rows of `make_row`, the same for the same seed."""
    rng = random.Random(seed)
    return [make_row(rng, facts_per_reader) for _ in range(count)]
