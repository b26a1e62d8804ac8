"""Studies: an experiment as one YAML file, over cases and seeds, that goes on after a kill and gives the same table.

    about: Three readers tell a solver what only they know, by latent vectors alone.
    seeds: [0, 1, 2]
    methods: [single, latent_mas, diffmas]   # some of config.METHODS; those that are trained get an adapter for each seed
    alone: {all facts as text: "Facts: {facts} Question: {question}"}   # one agent with this prompt, bare and with the adapter
    audit: latent                            # rows of this kind are a message; all: everything that is handed on
    versions: {torch: 2.13.0}                # those it was made with; others are told
    config: {...}                            # keys of config.yaml
    cases:                                   # what each changes in `config`; with methods of its own, if any
      one fact: {}
      two facts: {task: facts_two}
      unseen words: {task: facts_unseen, trained_by: one fact}   # measured with that case's adapters, none of its own
      four samples: {trained_by: one fact, audit: null, evaluation: {samples: 4}, generation: {temperature: 0.6}}

Every stage (a training, a method, an audit) leaves a file when it is done, which the next run finds (diffmas.cli.stages); one
that fails is told at the end and does not stop the others. The seed is that of the adapter's first weights, of the order of the
rows, and of sampling. Relative paths of files start at the study's file.
"""

import copy
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import yaml

from diffmas.agents.file import read_json, write_json
from diffmas.cli.config import Config
from diffmas.cli.made_with import made_with
from diffmas.cli.methods import TRAINED
from diffmas.cli.plain_data import parsed as checked
from diffmas.cli.stages import NotDone, Stages, slug
from diffmas.evaluation.pooled import Pooled, best_of, pool
from diffmas.evaluation.tasks import task

__all__ = ["Outcome", "Recipe", "changes_of", "named", "run", "write_made"]

STAMP = "study.json"  # in an output: the recipe, the model and the changes that it is of


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
        self.cases = {name: changes or {} for name, changes in (self.cases or {"all": {}}).items()}
        for where, of in (("", vars(self)), *((f"cases.{name}.", changes) for name, changes in self.cases.items())):
            if of.get("audit") not in (None, "all", "latent", "prompt", "text"):
                raise ValueError(f"{where}audit: expected all, latent, prompt, text or none, got {of['audit']!r}")
        if len({slug(name) for name in self.cases}) != len(self.cases):
            raise ValueError(f"cases: expected names that differ in letters or digits, got {list(self.cases)}")
        for name, changes in self.cases.items():
            other = changes.get("trained_by", name)
            if other not in self.cases or "trained_by" in self.cases[other] and other != name:
                trains = [case for case, of in self.cases.items() if "trained_by" not in of]
                raise ValueError(f"cases.{name}.trained_by: expected one of {trains}, got {other!r}")


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
        recipe = checked(Recipe, yaml.safe_load(path.read_text(encoding="utf-8")) or {})
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: expected YAML, got {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    for settings in (recipe.config, *recipe.cases.values()):
        for section, key in (("data", "train"), ("data", "validation"), ("evaluation", "data")):
            if isinstance(settings.get(section), dict) and settings[section].get(key):
                settings[section][key] = str(path.parent / settings[section][key])
    return recipe


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


def write_made(made: dict, directory: Path) -> Path:
    """Writes what a study was made with beside its tables, without the places of files; returns its path."""

    def named_only(x):
        if isinstance(x, dict):
            return {key: named_only(value) for key, value in x.items()}
        if isinstance(x, list):
            return [named_only(value) for value in x]
        return Path(x).name if isinstance(x, str) and (Path(x).is_absolute() or "/" in x and Path(x).exists()) else x

    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "made_with.json", named_only(made))
    return directory / "made_with.json"


def merged(base: dict, changes: dict) -> dict:
    """base with changes, key by key down to what is no mapping."""
    out = copy.deepcopy(base)
    for key, value in changes.items():
        out[key] = merged(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out


def config_of(recipe: Recipe, case: str, seed: int, directory: Path, model: str | None, changes: dict) -> Config:
    """The config of one case and seed. changes: of the command line. Raises ValueError naming case and key."""
    own = {"output_dir": str(directory), "training": {"seed": seed}, "generation": {"seed": seed}}
    chosen = {key: value for key, value in recipe.cases[case].items() if key not in ("trained_by", "audit")}
    methods = chosen.pop("methods", recipe.methods)
    data = merged(merged(merged(recipe.config, chosen), changes), own)
    data["evaluation"] = {**data.get("evaluation", {}), "methods": methods}
    if model is not None:
        data["model"] = model
    try:
        return checked(Config, data)
    except ValueError as error:
        raise ValueError(f"case {case!r}: {error}") from error


class Outcome(NamedTuple):
    """Of a study. methods, audits: over seeds; of audits, those of one agent as "change: agent". costs: a `Result.row` for each
    case, seed and method. entropies: of each of these, a row for each token of an answer. norms: of the gradients of teams
    that were trained. made: what all was made with. failures: what was not measured, and why. missing: what is not done, where
    nothing is run."""

    methods: list[Pooled]
    audits: list[Pooled]
    costs: list[dict]
    entropies: list[dict]
    norms: list[dict]
    made: dict
    failures: list[str]
    missing: list[str]


def run(
    path: Path, output: Path, model: str | None, device: str, cases: list[str] | None, seeds: list[int] | None, changes: dict,
    progress: Callable[[str], object], only_done: bool = False,
) -> Outcome:  # fmt: skip
    """Does what is missing of a study. output: of all stages. model: instead of the recipe's. cases, seeds: some of the
    recipe's, by default all. changes: of the recipe's config. only_done: runs nothing, for the tables of what is there, by
    default with its model and changes. Raises
    ValueError for what does not fit, before anything runs, and for an output that another recipe, model or changes have written
    to; cases and seeds may have been added to a recipe."""
    recipe = read(path)
    for name, given, known in (("--case", cases, recipe.cases), ("--seed", seeds, recipe.seeds)):
        if unknown := [x for x in given or [] if x not in known]:
            raise ValueError(f"{name}: expected some of {list(known)}, got {unknown[0]!r}")
    cases, seeds = cases or list(recipe.cases), seeds or recipe.seeds
    if only_done and (stamp := output / STAMP).is_file():
        model, changes = model or read_json(stamp)["model"], changes or read_json(stamp)["changes"]
    if model is not None and (own := [case for case in cases if "model" in recipe.cases[case]]):
        raise ValueError(f"--model: expected none, since the case {own[0]!r} has its own, got {model!r}; --case chooses others")
    configs = {
        (case, seed): config_of(recipe, case, seed, output / slug(case) / f"seed{seed}", model, changes)
        for case in dict.fromkeys([*cases, *(recipe.cases[case].get("trained_by", case) for case in cases)]) for seed in seeds
    }  # fmt: skip
    if not only_done:
        _check_data(recipe, configs, cases, seeds)
    asked = {"recipe": vars(recipe), "model": model, "changes": changes}
    _stamp(output, json.loads(json.dumps(asked)), only_done)
    for name, wanted in recipe.versions.items():
        here = made_with()["versions"].get(name)
        if str(here).partition("+")[0] != str(wanted):  # builds of one version are one
            progress(f"{name}: the recipe was made with {wanted}, this is {here}")
    outcome = Outcome([], [], [], [], [], {**asked, "made_with": [], "training_tokens_per_second": {}}, [], [])
    told = None if only_done else progress
    for case in cases:
        trainer = recipe.cases[case].get("trained_by")
        of = {
            seed: Stages(
                configs[case, seed], recipe.alone, device, told,
                trained_by=Stages(configs[trainer, seed], recipe.alone, device, told) if trainer else None,
            )
            for seed in seeds
        }  # fmt: skip
        _run_case(recipe, case, of, outcome)
    return outcome


def _stamp(output: Path, asked: dict, only_look: bool) -> None:
    """Says in an output what writes to it. Raises ValueError if others have; cases and seeds may have been added since."""
    stamp = output / STAMP
    if stamp.is_file():
        earlier = read_json(stamp)
        known, now = earlier["recipe"], asked["recipe"]
        of_cases = {name: changes for name, changes in now["cases"].items() if name in known["cases"]}
        same = {"recipe": {**now, "cases": {**known["cases"], **of_cases}, "seeds": known["seeds"]}}
        for key, value in {**asked, **same}.items():
            if earlier.get(key) != value:
                raise ValueError(f"{output}: expected results of the same {key}, found others; choose another --output")
        seeds = list(dict.fromkeys([*known["seeds"], *now["seeds"]]))
        asked = {**asked, "recipe": {**now, "cases": {**known["cases"], **now["cases"]}, "seeds": seeds}}
    if not only_look:
        output.mkdir(parents=True, exist_ok=True)
        write_json(stamp, asked)


def _check_data(recipe: Recipe, configs: dict[tuple[str, int], Config], cases: list[str], seeds: list[int]) -> None:
    """Raises ValueError naming a case that is to be trained without its files: hours may pass before a study comes to it."""
    for case, seed in itertools.product(cases, seeds):
        methods = set(configs[case, seed].evaluation.methods) & set(TRAINED)
        case = recipe.cases[case].get("trained_by", case)
        config = configs[case, seed]
        if all((Path(config.output_dir) / f"{slug(f'trained {method}')}.json").is_file() for method in methods):
            continue
        for key, given in (("data.validation", config.data.validation), ("evaluation.data", config.evaluation.data)):
            if given and not Path(given).is_file():
                raise ValueError(f"case {case!r}: {key}: expected a file, found none at {given}")
        file, name = config.data.train, config.training_task
        says = "--set data.train=FILE names one, --set data.task=NAME takes another task's rows"
        if file and not Path(file).is_file():
            raise ValueError(f"case {case!r}: data.train: expected a file, found none at {file}; {says}")
        if not file and (name is None or config.training_part not in task(name).splits):
            why = "" if name is None else f", since {name} has no part to train on"
            raise ValueError(f"case {case!r}: data.train: expected a file{why}, got none; {says}")


def _run_case(recipe: Recipe, case: str, of: dict[int, Stages], outcome: Outcome) -> None:
    scores: dict[str, dict[int, list]] = {}
    told: dict[str, dict[int, list]] = {}
    audit = recipe.cases[case].get("audit", recipe.audit)
    for seed, stages in of.items():
        measured, missing = set(), []
        for name in stages.methods():
            try:
                result = stages.measure(name)
            except NotDone:
                missing.append(name)
                continue
            except Exception as error:  # the others are measured all the same
                outcome.failures.append(f"{case}, seed {seed}, {name}: {error}")
                continue
            measured.add(name)
            scores.setdefault(name, {})[seed] = result.pop("scores")
            result.pop("texts")
            curve = zip(result.pop("entropy_curve", []), result.pop("entropy_counts", []))  # older stages have none
            of_one = {"case": case, "seed": seed, "method": name}
            outcome.entropies.extend({**of_one, "token": t, "nats": nats, "tokens": n} for t, (nats, n) in enumerate(curve))
            outcome.costs.append({"case": case, "seed": seed, "model": Path(stages.config.model).name, **result})
            if name in TRAINED and "tokens_per_second" in (trained := stages.train(name)):
                outcome.made["training_tokens_per_second"].setdefault(name, []).append(trained["tokens_per_second"])
        if "diffmas" in measured:
            norms = stages.gradient_norms("diffmas")
            outcome.norms.extend({"case": case, "seed": seed, **norm} for norm in norms)
        if audit and "diffmas" in measured:
            try:
                for name, values in stages.audit(None if audit == "all" else audit).items():
                    told.setdefault(name, {})[seed] = values
            except NotDone:
                missing.append("audit")
            except Exception as error:
                outcome.failures.append(f"{case}, seed {seed}, audit: {error}")
        if missing:
            outcome.missing.append(f"{case}, seed {seed}: {', '.join(missing) if measured else 'all'}")
        for made in stages.made:
            if made not in outcome.made["made_with"]:
                outcome.made["made_with"].append(made)
    baselines = [name for name in scores if name in stages.config.evaluation.methods and name != "diffmas"]
    outcome.methods.extend(pool(case, scores, best_of(scores, baselines)))
    for agent in dict.fromkeys(name.partition(": ")[2] for name in told):  # "": the team
        of_agent = {name: values for name, values in told.items() if name.partition(": ")[2] == agent}
        outcome.audits.extend(pool(case, of_agent, f"other: {agent}" if agent else "other"))
