"""A task: where its questions are, how they become rows, who answers them, and how answers are judged."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

from diffmas.agents.agent import Agent
from diffmas.evaluation import sandbox
from diffmas.evaluation.scorer import Scorer
from diffmas.evaluation.tasks import final, prompts
from diffmas.evaluation.tasks.forms import FieldMissing
from diffmas.evaluation.tasks.source import from_file, from_hub

__all__ = ["PARTS", "Task"]

PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class Task:
    """A set of questions as it is published, and what to do with it.

    name: as in `diffmas tasks`. kind: math | options | code. questions: how many the test part has. hub, config: of the data
    set on the Hugging Face hub. splits: its split for each part, of PARTS, that it has. form: record -> row. licence: of the
    questions. gated: whether the hub asks for an account. number: whether an answer without a box ends in a plain number.
    latent_steps: T by default. max_new_tokens: of an answer by default.
    """

    name: str
    kind: str
    questions: int
    hub: str
    splits: dict[str, str]
    form: Callable[[dict], dict]
    licence: str
    config: str | None = None
    gated: bool = False
    number: bool = False
    latent_steps: int = 10
    max_new_tokens: int = 512

    @property
    def split(self) -> str:
        """Of the test part."""
        return self.splits["test"]

    def rows(self, part: str = "test", path=None, limit: int | None = None) -> list[dict]:
        """The rows of a part (`diffmas.training.data`), ready for `Trainer` and `evaluate`.

        path: a file in a published form instead of the hub (JSON lines, a JSON list, .gz of either), whatever its part. limit:
        only so many rows, from the first. Raises ValueError naming file, line and field of a record that does not fit; for a
        part that the set lacks, a gated set without access, and without the package datasets; FileNotFoundError for no file.

            >>> (row,) = task("gsm8k").rows(path=published, limit=1)
            >>> row["answer"]
            '2*3=6 pens.\\nThe answer is \\\\boxed{6}.'
        """
        if part not in PARTS:
            raise ValueError(f"part: expected one of {PARTS}, got {part!r}")
        if path is None and part not in self.splits:
            raise ValueError(f"{self.name}: expected one of the parts {sorted(self.splits)}, which are published, got {part!r}")
        records = from_file(path) if path is not None else from_hub(self.hub, self.config, self.splits[part], self.gated)
        rows = [self.row(record, where) for where, record in islice(records, limit)]
        if not rows:
            raise ValueError(f"{path or self.hub}: expected at least one record, got an empty data set")
        return rows

    def row(self, record: dict, where: str = "record") -> dict:
        """A published record as a row. Raises ValueError that starts with `where` and names the field that is missing."""
        try:
            return self.form(record)
        except FieldMissing as error:
            raise ValueError(f"{where}: {self.name}: {error}") from error

    def agents(self, way: str = "latent", latent_steps: int | None = None) -> list[Agent]:
        """Planner, critic, refiner and solver, or the solver alone. way: latent | text | single. latent_steps: T."""
        return prompts.agents(self.kind, self.latent_steps if latent_steps is None else latent_steps, way)

    def scorer(self) -> Scorer:
        """Judges answers by meaning; it needs the rows.

        Raises ValueError where math-verify is needed and not installed, and PermissionError where programs would run as root.
        """
        if self.kind == "options":
            return Scorer(final.letter, final.same_letter)
        if self.kind == "code":
            sandbox.run("")  # what cannot run is said before anything is computed
            return Scorer(final.code, final.passes, final.same_code)
        return Scorer(final.boxed_or_number if self.number else final.boxed_or_mathematics, "math")
