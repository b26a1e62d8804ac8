"""Studies: an experiment as one YAML file, over cases and seeds, that goes on after a kill and gives the same table.

    about: Three readers tell a solver what only they know, by latent vectors alone.
    seeds: [0, 1, 2]
    methods: [single, latent_mas, diffmas]   # some of config.METHODS; those that are trained get an adapter for each seed
    alone: {all facts as text: "Facts: {facts} Question: {question}"}   # one agent with this prompt, bare and with the adapter
    audit: latent                            # rows of this kind are a message; all: everything that is handed on
    versions: {torch: 2.13.0}                # those it was made with; others are told
    config: {...}                            # keys of config.yaml
    cases: {one fact: {}, two facts: {task: facts_two}}   # what each changes in `config`; with methods of its own, if any

Every stage (a training, an evaluation, an audit) leaves a file when it is done, which the next run finds. The seed is that of
the adapter's first weights, of the order of the rows, and of sampling.
"""

import copy
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import yaml

from diffmas.agents.file import read_json, write_json
from diffmas.cli import build
from diffmas.cli.config import TRAINED, Config
from diffmas.cli.config import parsed as checked
from diffmas.evaluation.pooled import Pooled, pool

__all__ = ["Recipe", "changes_of", "named", "run", "write_made"]

PACKAGES = ("torch", "transformers", "peft", "diffmas")


@dataclass
class Recipe:
    """The keys of a study's file; see above."""

    about: str
    config: dict
    methods: list[str]
    seeds: list[int] = field(default_factory=lambda: [0])
    alone: dict = field(default_factory=dict)
    audit: str | None = None
    versions: dict = field(default_factory=dict)
    cases: dict = field(default_factory=dict)

    def __post_init__(self):
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds: expected distinct seeds, at least one, got {self.seeds}")
        if self.audit not in (None, "all", "latent", "prompt", "text"):
            raise ValueError(f"audit: expected all, latent, prompt, text or none, got {self.audit!r}")
        self.cases = self.cases or {"all": {}}


def named(name: str) -> Path:
    """The file of a study: a path, or the name of one that comes with diffmas. Raises ValueError for another name."""
    from diffmas.benchmarks import machine

    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        return path
    directory = Path(machine.__file__).parent / "studies"
    known = {p.stem: p for p in sorted(directory.glob("*.yaml"))}
    if name not in known:
        raise ValueError(f"study: expected a YAML file or one of {sorted(known)}, got {name!r}")
    return known[name]


def read(path: Path) -> Recipe:
    """Raises ValueError with the file, the key, what was expected and what was found; FileNotFoundError if there is none."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a study's file, found none")
    try:
        return checked(Recipe, yaml.safe_load(path.read_text(encoding="utf-8")) or {})
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: expected YAML, got {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def changes_of(given: list[str]) -> dict:
    """["a.b=1"] -> {"a": {"b": 1}}; values as YAML has them. Raises ValueError for one without "="."""
    changes: dict = {}
    for item in given:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise ValueError(f"--set: expected KEY=VALUE, got {item!r}")
        try:
            read_value = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"--set {key}: expected a value as in YAML, got {value!r}") from error
        for part in reversed(key.split(".")):
            read_value = {part: read_value}
        changes = merged(changes, read_value)
    return changes


def write_made(made: dict, directory: Path) -> None:
    """What a study was made with, beside its tables; without the place of the model."""
    directory.mkdir(parents=True, exist_ok=True)
    model = made["model"]
    write_json(directory / "made_with.json", {**made, "model": Path(model).name if model else model})


def merged(base: dict, changes: dict) -> dict:
    """base with changes, key by key down to what is no mapping."""
    out = copy.deepcopy(base)
    for key, value in changes.items():
        out[key] = merged(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out


def config_of(recipe: Recipe, case: str, seed: int, directory: Path, model: str | None, changes: dict) -> Config:
    """The config of one case and seed. changes: of the command line. Raises ValueError naming case and key."""
    own = {"output_dir": str(directory), "training": {"seed": seed}, "generation": {"seed": seed}}
    chosen = dict(recipe.cases[case] or {})
    methods = chosen.pop("methods", recipe.methods)
    data = merged(merged(merged(recipe.config, chosen), changes), own)
    data["evaluation"] = {**data.get("evaluation", {}), "methods": methods}
    if model is not None:
        data["model"] = model
    try:
        return checked(Config, data)
    except ValueError as error:
        raise ValueError(f"case {case!r}: {error}") from error


def provenance(recipe: Recipe, model: str | None) -> dict:
    """What a study was made with: the recipe, versions, the commit if the source is a checkout, and the machine."""
    from diffmas.benchmarks.machine import cpu_name

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    here = Path(__file__).parent
    git = subprocess.run(["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    dirty = subprocess.run(
        ["git", "-C", str(here), "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=False
    )
    commit = git.stdout.strip() + ("+" if dirty.stdout.strip() else "") if git.returncode == 0 else None
    return {
        "recipe": vars(recipe), "model": model or recipe.config.get("model"), "versions": versions, "commit": commit,
        "machine": cpu_name(),
    }  # fmt: skip


class Stages:
    """The stages of one case and seed. config: its directory is where they leave their files."""

    def __init__(self, recipe: Recipe, config: Config, device: str, progress: Callable[[str], object]):
        self.recipe, self.config, self.device, self.progress = recipe, config, device, progress
        self.directory = Path(config.output_dir)
        self.adapters: dict[str, Path] = {}

    def _once(self, name: str, make: Callable[[], dict]) -> dict:
        """What the stage left, or else what it makes now."""
        file = self.directory / f"{name}.json"
        if not file.is_file():
            self.directory.mkdir(parents=True, exist_ok=True)
            self.progress(f"{self.directory}: {name}")
            write_json(file, make())
        return read_json(file)

    def train(self, method: str) -> dict:
        settings = build.trained_as(self.config, method)
        directory = Path(settings.output_dir) / "adapter"
        settings.output_dir = str(Path(settings.output_dir) / "training")
        self.adapters[method] = directory

        def make() -> dict:
            from transformers import set_seed

            from diffmas.cli.train import trainer_of
            from diffmas.training import checkpoints

            resume = bool(checkpoints(settings.output_dir))
            set_seed(settings.training["seed"])  # the adapter's first weights
            trainer = trainer_of(settings, method, resume, self.progress)
            start = time.perf_counter()
            trainer.train(resume_from_checkpoint=resume or None)
            trainer.save_model(str(directory))
            rate = {} if resume else {"tokens_per_second": _tokens(trainer) / (time.perf_counter() - start)}
            return {"history": trainer.state.log_history, "steps": trainer.state.global_step, **rate}

        return self._once(f"trained_{method}", make)

    def _system(self):
        return build.trained_system(self.config, self.adapters.get("diffmas"), self.device)

    def evaluate(self) -> dict:
        """{method: a result's row, with "scores" by question}."""

        def make() -> dict:
            from diffmas import Agent, evaluation

            system = self._system()
            names = self.config.evaluation.methods
            others = {name: path for name, path in self.adapters.items() if name != "diffmas"}
            methods = build.methods_of(self.config, system, names, others)
            for name, prompt in self.recipe.alone.items():
                methods[f"{name}, bare"] = evaluation.single_agent(system, Agent("alone", prompt))
                if "diffmas" in self.adapters:
                    methods[name] = evaluation.single_agent(system, Agent("alone", prompt), adapter=True)
            rows, options = build.evaluation_rows(self.config), self.config.evaluation
            results = evaluation.evaluate(
                methods, rows, options.samples, build.scorer_of(self.config), options.batch_size, self.progress,
                baselines=[name for name in names if name != "diffmas"],
                **vars(self.config.generation),
            )  # fmt: skip
            evaluation.write_csv(results, self.directory / "results.csv")
            evaluation.write_answers(results, rows, self.directory / "answers.jsonl")
            evaluation.plot(results, self.directory / "results.png")
            return {r.method: {**r.row(), "scores": r.scores} for r in results}

        return self._once("evaluated", make)

    def audit(self) -> dict:
        """{condition: scores by question}."""

        def make() -> dict:
            from diffmas import evaluation

            kind = None if self.recipe.audit == "all" else self.recipe.audit
            options = self.config.evaluation
            conditions = evaluation.audit(
                self._system(), build.evaluation_rows(self.config), options.samples, build.scorer_of(self.config),
                options.batch_size, kind, progress=self.progress, **vars(self.config.generation),
            )  # fmt: skip
            evaluation.write_audit(conditions, self.directory / "audit.csv")
            return {c.change if c.agent is None else f"{c.change}: {c.agent}": c.scores for c in conditions}

        return self._once("audited", make)


def _tokens(trainer) -> float:
    """Tokens and latent steps that a training run forwards, by the mean of its first rows."""
    from diffmas.training.data import question_and_answer

    system, rows = trainer.model, trainer.train_dataset[:64]
    questions = [question_and_answer(row) for row in rows]
    turns = system.tokenize([q for q, _ in questions], [len(system.answer_ids(a)) for _, a in questions])
    count = sum(len(turn.ids) + turn.steps for row in turns for turn in row)
    count += sum(len(system.answer_ids(a)) for _, a in questions)
    arguments = trainer.args
    per_step = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    return count / len(rows) * per_step * trainer.state.global_step


def run(
    path: Path, output: Path, model: str | None, device: str, cases: list[str] | None, seeds: list[int] | None, changes: dict,
    progress: Callable[[str], object],
) -> tuple[list[Pooled], list[Pooled], list[dict], dict]:  # fmt: skip
    """The methods and the audit over seeds, what every method cost by case and seed (the columns of `Result.row`), and what all
    was made with. output: of all stages. cases, seeds: some of the
    recipe's, by default all. changes: of the recipe's config. Raises ValueError for what does not fit, and for an output that
    another recipe or model has written to."""
    recipe = read(path)
    for name, given, known in (("--case", cases, recipe.cases), ("--seed", seeds, recipe.seeds)):
        if unknown := [x for x in given or [] if x not in known]:
            raise ValueError(f"{name}: expected some of {list(known)}, got {unknown[0]!r}")
    made = {**provenance(recipe, model), "changes": changes}
    stamp = output / "study.json"
    if stamp.is_file():
        earlier = read_json(stamp)
        for key in ("recipe", "model", "changes"):
            if earlier.get(key) != json.loads(json.dumps(made[key])):
                raise ValueError(f"{output}: expected results of the same {key}, found others; choose another --output")
        if earlier["commit"] != made["commit"]:
            made["commit"] = f"{earlier['commit']}, then {made['commit']}"
    else:
        output.mkdir(parents=True, exist_ok=True)
    for name, wanted in recipe.versions.items():
        if made["versions"].get(name) != str(wanted):
            progress(f"{name}: the recipe was made with {wanted}, this is {made['versions'].get(name)}")
    write_json(stamp, made)
    methods, audits, costs, rates = [], [], [], {}
    for case in cases or recipe.cases:
        scores: dict[str, list] = {}
        told: dict[str, list] = {}
        for seed in seeds or recipe.seeds:
            config = config_of(recipe, case, seed, output / case.replace(" ", "_") / f"seed{seed}", model, changes)
            stages = Stages(recipe, config, device, progress)
            for method in config.evaluation.methods:
                if method in TRAINED:
                    rates.setdefault(method, []).append(stages.train(method).get("tokens_per_second"))
            for name, result in stages.evaluate().items():
                scores.setdefault(name, []).append(result.pop("scores"))
                costs.append({"case": case, "seed": seed, **result})
            if recipe.audit and "diffmas" in config.evaluation.methods:
                for name, values in stages.audit().items():
                    told.setdefault(name, []).append(values)
        baselines = [name for name in scores if name in config.evaluation.methods and name != "diffmas"]
        best = max(baselines, key=lambda name: statistics.fmean(map(statistics.fmean, scores[name])), default=None)
        methods += pool(case, scores, best)
        team = {name: values for name, values in told.items() if ":" not in name}  # each agent's: in audit.csv of a seed
        audits += pool(case, team, "other") if team else []
    made["training_tokens_per_second"] = {m: [r for r in rs if r] for m, rs in rates.items()}
    return methods, audits, costs, made
