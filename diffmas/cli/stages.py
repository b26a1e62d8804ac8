"""The stages of a study's case and seed: trainings, methods and an audit. Each leaves a file when it is done, in its directory,
and is not done again while what it rests on is the same."""

import re
import secrets
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from diffmas.cli import build
from diffmas.cli.config import Config
from diffmas.cli.made_with import made_with
from diffmas.cli.methods import TRAINED
from diffmas.json_file import read_json, write_json

__all__ = ["NotDone", "Stages", "slug"]


def slug(name: str) -> str:
    """A name as a file may have it."""
    return re.sub(r"[^A-Za-z0-9.=-]+", "_", name)


class NotDone(Exception):
    """A stage has left nothing, and is not to be done now."""


class Stages:
    """config: its output_dir is where they leave their files. alone: prompts of one agent by name. progress: is told of
    each; None: what is not done stays so, and `NotDone` is raised. trained_by: the stages whose trainings these use, instead
    of their own."""

    def __init__(
        self, config: Config, alone: dict[str, str], device: str, progress: Callable[[str], object] | None,
        trained_by: "Stages | None" = None,
    ):  # fmt: skip
        self.config, self.alone, self.device, self.progress = config, alone, device, progress
        self.trained_by = trained_by
        self.directory = Path(config.output_dir)
        self.made: list[dict] = trained_by.made if trained_by else []  # what each stage was made with
        self._loaded: tuple = (None, None)

    def _once(self, name: str, make: Callable[[], dict], rests_on: str | None = None) -> dict:
        """What the stage left, or else what it makes now. rests_on: the training, by its id, whose adapter it uses."""
        file = self.directory / f"{slug(name)}.json"
        left = read_json(file) if file.is_file() else None
        if left is None or left["rests_on"] != rests_on:
            if self.progress is None:
                raise NotDone(str(file))
            self.directory.mkdir(parents=True, exist_ok=True)
            self.progress(f"{self.directory}: {name}")
            left = {"rests_on": rests_on, "made_with": made_with(), "result": make()}
            write_json(file, left)
        self.made.append(left["made_with"])
        return left["result"]

    # ---- training ----------------------------------------------------------------------------------------------------

    def adapter_of(self, method: str) -> Path:
        """The directory of the adapter that `train` leaves."""
        if self.trained_by is not None:
            return self.trained_by.adapter_of(method)
        return Path(build.trained_as(self.config, method).output_dir) / "adapter"

    def train(self, method: str) -> dict:
        """id, steps, history, and tokens_per_second of an uninterrupted training."""
        if self.trained_by is not None:
            return self.trained_by.train(method)

        def make() -> dict:
            from transformers import set_seed

            from diffmas.cli.train import trainer_of
            from diffmas.training import last_checkpoint

            settings = build.trained_as(self.config, method)
            settings = replace(settings, output_dir=str(Path(settings.output_dir) / "training"))
            resume = Path(settings.output_dir).is_dir() and last_checkpoint(settings.output_dir) is not None
            set_seed(settings.training["seed"])  # the adapter's first weights
            self._loaded = (None, None)
            trainer = trainer_of(settings, method, True, self.progress)
            start = time.perf_counter()
            trainer.train(resume_from_checkpoint=resume or None)
            seconds = time.perf_counter() - start
            trainer.save_model(str(self.adapter_of(method)))
            rate = {} if resume else {"tokens_per_second": _tokens(trainer) / seconds}
            steps = trainer.state.global_step
            return {"id": secrets.token_hex(8), "steps": steps, **rate, "history": trainer.state.log_history}

        return self._once(f"trained {method}", make)

    def gradient_norms(self, method: str) -> list[dict]:
        """See `diffmas.evaluation.gradient_norms`; none of another case's training, or where none were asked for."""
        from diffmas.evaluation.gradient_norms import norms_of_training
        from diffmas.training.gradients import CSV

        file = Path(build.trained_as(self.config, method).output_dir) / "training" / CSV
        if self.trained_by is not None or not file.is_file():
            return []
        return norms_of_training(self.train(method)["history"], file)

    def _system(self, trained: bool):
        """The config's team with its trained adapter, or on the bare model; one of them is in memory at a time."""
        if self._loaded[0] is not trained:
            self._loaded = (None, None)
            adapter = self.adapter_of("diffmas") if trained else None
            others = self.trained_by is not None
            self._loaded = (trained, build.trained_system(self.config, adapter, self.device, others))
        return self._loaded[1]

    # ---- measuring ---------------------------------------------------------------------------------------------------

    def methods(self) -> list[str]:
        """The names of all that is measured, those on the bare model first."""
        chosen = self.config.evaluation.methods
        trained = ["diffmas", *self.alone] if "diffmas" in chosen else []
        return [*(m for m in chosen if m != "diffmas"), *(f"{name}, bare" for name in self.alone), *trained]

    def _method(self, name: str):
        from diffmas import Agent, evaluation

        bare = name.removesuffix(", bare")
        if bare in self.alone:
            system, agent = self._system(name == bare), Agent("alone", self.alone[bare])
            role = system.agents[-1].adapter if system.adapter_scope == "per_role" else True
            return evaluation.single_agent(system, agent, adapter=role if name == bare else False)
        adapters = {name: self.adapter_of(name)} if name in TRAINED and name != "diffmas" else {}
        return build.methods_of(self.config, self._system(name == "diffmas"), [name], adapters)[name]

    def measure(self, name: str) -> dict:
        """A method's `Result.row`, with what that leaves out: scores by question, texts, entropy_curve and entropy_counts. It
        is trained first, if it is one of TRAINED."""
        trains = "diffmas" if name in self.alone else name
        rests_on = self.train(trains)["id"] if trains in TRAINED else None

        def make() -> dict:
            from diffmas import evaluation

            options = self.config.evaluation
            (result,) = evaluation.evaluate(
                {name: self._method(name)}, build.evaluation_rows(self.config), options.samples, build.scorer_of(self.config),
                options.batch_size, baselines=[], **vars(self.config.generation),
            )  # fmt: skip
            more = ("scores", "texts", "entropy_curve", "entropy_counts")
            return {**result.row(), **{name: getattr(result, name) for name in more}}

        return self._once(f"measured {name}", make, rests_on)

    def audit(self, kind: str | None) -> dict:
        """Scores by question, by condition; the agents' own as "change: agent"."""

        def make() -> dict:
            from diffmas import evaluation

            options = self.config.evaluation
            conditions = evaluation.audit(
                self._system(True), build.evaluation_rows(self.config), options.samples, build.scorer_of(self.config),
                options.batch_size, kind, progress=self.progress, **vars(self.config.generation),
            )  # fmt: skip
            evaluation.write_audit(conditions, self.directory / "audit.csv")
            return {c.change if c.agent is None else f"{c.change}: {c.agent}": c.scores for c in conditions}

        return self._once("audited", make, self.train("diffmas")["id"])


def _tokens(trainer) -> float:
    """Tokens and latent steps that a training run forwards, by the mean of its first rows."""
    from diffmas.training.data import question_and_answer

    system, rows = trainer.model, trainer.train_dataset[:64]
    questions, answers = zip(*(question_and_answer(row) for row in rows))
    lengths = [len(system.answer_ids(answer)) for answer in answers]
    turns = system.tokenize(list(questions), lengths)
    count = sum(lengths) + sum(turn.most for row in turns for turn in row)
    step = trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps * trainer.args.world_size
    return count / len(rows) * step * trainer.state.global_step
