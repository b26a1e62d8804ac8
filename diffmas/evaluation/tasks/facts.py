"""A task that is made here: who took which thing where, with the facts split between three readers.

Every fact is a triple (name, thing, place). Names differ within an example; things and places are drawn independently
with replacement, so that no answer can be found by elimination. A question asks for the thing or the place of one name, which
one reader knows: whoever answers without having heard from the readers is right once in 16 times.
"""

import random
import re
from dataclasses import dataclass
from itertools import islice

from diffmas.agents.agent import Agent
from diffmas.evaluation.scorer import Scorer

__all__ = [
    "ALL_FACTS_PROMPT", "FACTS", "FACTS_PER_READER", "NAMES", "NOTES_PROMPT", "PLACES", "READERS", "READER_PROMPT",
    "SOLVER_PROMPT", "THINGS", "VERBS", "Facts", "ask", "make_facts", "make_row", "make_rows", "notes", "sentence",
]  # fmt: skip

NAMES = "Anna Ben Clara David Emma Felix Grace Henry Iris Jonas Karin Leo Maria Nils Olga Peter".split()
THINGS = "key lamp ring book coin map cup rope drum hat knife letter mirror basket candle whistle".split()
PLACES = "kitchen cellar garden attic garage library stable bedroom hall tower bakery harbor school chapel office barn".split()
VERBS = "took carried brought moved".split()

# Words that training on those above has not seen.
OTHER_NAMES = "Adam Bella Carl Diana Erik Fiona George Hannah Ivan Julia Kevin Laura Martin Nora Oscar Paula".split()
OTHER_THINGS = "bottle bag box glass chair stone flag clock bell ball shoe brush pencil camera guitar umbrella".split()
OTHER_PLACES = (
    "river market church forest island hotel museum theater station castle beach mill farm bank valley temple".split()
)
MOMENTS = ("early on Monday morning", "late on Friday evening", "shortly after lunch", "while it was raining outside")
MANNERS = (
    "without telling anyone",
    "as fast as possible",
    "after a long talk with the neighbors",
    "for the second time this week",
)

READERS = 3  # agents that hold facts
FACTS_PER_READER = 1

READER_PROMPT = "Facts: {facts} Write notes."
SOLVER_PROMPT = "Question: {question}"
NOTES_PROMPT = "Notes: {notes} Question: {question}"  # a solver that is given text notes
ALL_FACTS_PROMPT = "Facts: {facts} Question: {question}"  # everything in one context: the recall check


def make_facts(rng: random.Random, count: int, unseen: bool = False) -> list[dict]:
    """`count` facts about different people. unseen: of the other words."""
    names, things, places = (OTHER_NAMES, OTHER_THINGS, OTHER_PLACES) if unseen else (NAMES, THINGS, PLACES)
    return [
        {"name": name, "thing": rng.choice(things), "place": rng.choice(places), "verb": rng.choice(VERBS)}
        for name in rng.sample(names, count)
    ]


def sentence(fact: dict) -> str:
    return "{name} {verb} the {thing} to the {place}.".format(**fact)


def long_sentence(rng: random.Random, fact: dict) -> str:
    """The same in 20 to 30 tokens."""
    told = {**fact, "moment": rng.choice(MOMENTS), "manner": rng.choice(MANNERS)}
    return "As far as I know, {name} {verb} the {thing} to the {place} {moment}, and did so {manner}.".format(**told)


def notes(facts: list[dict]) -> str:
    """The short form of facts that a text agent is trained to write, four tokens a fact."""
    return " ".join("{name} {thing} {place}.".format(**fact) for fact in facts)


def ask(rng: random.Random, fact: dict) -> tuple[str, str]:
    """A question about one fact, and its one-word answer."""
    if rng.random() < 0.5:
        return f"Where did {fact['name']} go?", fact["place"]
    return f"What did {fact['name']} take?", fact["thing"]


def make_row(
    rng: random.Random, facts_per_reader: int = FACTS_PER_READER, long: bool = False, unseen: bool = False,
    form: str = "{value}",
) -> dict:  # fmt: skip
    """A row whose answer one reader knows: facts1, facts2, ... (one text per reader), facts (all), question, answer.
    form: of the answer; {value} is the word that is asked for, {name}, {verb}, {thing} and {place} what the fact says."""
    facts = make_facts(rng, READERS * facts_per_reader, unseen)
    asked = rng.choice(facts)
    question, value = ask(rng, asked)
    told = [long_sentence(rng, fact) if long else sentence(fact) for fact in facts]
    parts = [told[i * facts_per_reader : (i + 1) * facts_per_reader] for i in range(READERS)]
    texts = {f"facts{i}": " ".join(part) for i, part in enumerate(parts, start=1)}
    return {**texts, "facts": " ".join(told), "question": question, "answer": form.format(**asked, value=value)}


def make_rows(count: int, seed: int, *how) -> list[dict]:
    """`count` rows of `make_row(rng, *how)`, the same for the same seed."""
    rng = random.Random(seed)
    return [make_row(rng, *how) for _ in range(count)]


# What a pretrained model reads. The first tokens, which stay as its attention sinks, say nothing of the facts; the last make it
# repeat them, which stand there twice, so that soft tokens spell them before any training. The answer repeats what was told, in
# its words, and ends with what is asked for: the solver learns to look up, and a reader that says its fact helps from the first
# step on. Readers would say other words, too: one whose solver wanted "Answer:" ended up saying nothing else (docs/log.md).
REAL_READER = "Repeat each line. {facts} Repeated: {facts} Again:"
REAL_SOLVER = "{question}"
REAL_SOLVER_OF_NOTES = "{messages}\n{question}"
REAL_ANSWER = "{name} {verb} the {thing} to the {place}. Answer: {value}"


@dataclass(frozen=True)
class Facts:
    """The task with its rows as a `Task` has them. facts_per_reader; long: facts of 20 to 30 tokens; unseen: the test part's
    names, things and places are others than the training's."""

    name: str
    facts_per_reader: int = 1
    long: bool = False
    unseen: bool = False
    kind, hub, licence, gated = "facts", "made here", "-", False
    config, split = None, None
    questions, latent_steps, max_new_tokens = 400, 8, 20

    # Rows and seed of each part: the validation rows and questions that are asked are none of the training's.
    splits = {"train": (20_000, 1), "validation": (200, 2), "test": (400, 3)}

    def rows(self, part: str = "test", path=None, limit: int | None = None) -> list[dict]:
        """The rows of a part, the same each time. Raises ValueError for another part, or a path: nothing of it is published."""
        if path is not None:
            raise ValueError(f"{self.name}: expected no file, since its rows are made, got {path}")
        if part not in self.splits:
            raise ValueError(f"part: expected one of {tuple(self.splits)}, got {part!r}")
        count, seed = self.splits[part]
        rng = random.Random(seed)
        rows = (
            make_row(rng, self.facts_per_reader, self.long, self.unseen and part == "test", REAL_ANSWER) for _ in range(count)
        )
        return list(islice(rows, limit))

    def agents(self, way: str = "latent", latent_steps: int | None = None) -> list[Agent]:
        """The readers and the solver, or the solver alone. way: latent | text | single. latent_steps: T."""
        if way not in ("latent", "text", "single"):
            raise ValueError(f"way: expected one of ('latent', 'text', 'single'), got {way!r}")
        T = 0 if way == "text" else self.latent_steps if latent_steps is None else latent_steps
        readers = [
            Agent(f"reader{i}", REAL_READER.format(facts=f"{{facts{i}}}"), T) for i in range(1, READERS + 1)
        ]  # fmt: skip
        solver = Agent("solver", REAL_SOLVER_OF_NOTES if way == "text" else REAL_SOLVER)
        return [solver] if way == "single" else [*readers, solver]

    def scorer(self) -> Scorer:
        """The first thing or place behind the last "Answer:", or in all of a text that has none: a model that was not trained
        says more than one word."""
        return Scorer(_value_said, "exact")


VALUES = {*THINGS, *PLACES, *OTHER_THINGS, *OTHER_PLACES}


def _value_said(text: str) -> str | None:
    said = text.lower().rpartition("answer:")[2]
    return next((word for word in re.findall(r"[a-z]+", said) if word in VALUES), None)


FACTS = (
    Facts("facts"), Facts("facts_two", facts_per_reader=2), Facts("facts_long", long=True), Facts("facts_unseen", unseen=True),
)  # fmt: skip
