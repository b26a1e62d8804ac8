"""A study's file, read and checked: all that can be told before anything runs. Nothing of this waits for torch.

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

Relative paths of files start at the study's file.
"""

import copy
import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import yaml

from diffmas.cli.config import Config
from diffmas.cli.methods import TRAINED
from diffmas.cli.plain_data import parsed
from diffmas.cli.stages import slug
from diffmas.cli.training_section import training_fields
from diffmas.evaluation.tasks import task
from diffmas.json_file import read_json

__all__ = ["Recipe", "Study", "changes_of", "config_of", "named", "read", "study_of"]

STUDIES = Path(__file__).parents[1] / "benchmarks" / "studies"
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
        for name, changes in self.cases.items():
            if not isinstance(changes, dict):
                raise ValueError(f"cases.{name}: expected a mapping, got {changes!r}")
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
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        return path
    known = {p.stem: p for p in sorted(STUDIES.glob("*.yaml"))}
    if name not in known:
        raise ValueError(f"study: expected a YAML file or one of {sorted(known)}, got {name!r}")
    return known[name]


def read(path: Path) -> Recipe:
    """Raises ValueError with the file, the key, what was expected and what was found; FileNotFoundError if there is none."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a study's file, found none")
    try:
        recipe = parsed(Recipe, yaml.safe_load(path.read_text(encoding="utf-8")) or {})
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


def merged(base: dict, changes: dict) -> dict:
    """base with changes, key by key down to what is no mapping."""
    out = copy.deepcopy(base)
    for key, value in changes.items():
        out[key] = merged(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out


def config_of(recipe: Recipe, case: str, seed: int, directory: Path, model: str | None, changes: dict) -> Config:
    """The config of one case and seed. changes: of the command line. Raises ValueError naming case and key."""
    chosen = {key: value for key, value in recipe.cases[case].items() if key not in ("trained_by", "audit")}
    own = {"output_dir": str(directory), "training": {"seed": seed}, "generation": {"seed": seed}}
    own["evaluation"] = {"methods": chosen.pop("methods", recipe.methods)}
    data = merged(merged(recipe.config, chosen), changes)
    if model is not None:
        data["model"] = model
    try:
        for section in ("training", "generation", "evaluation"):
            if not isinstance(data.get(section) or {}, dict):
                raise ValueError(f"{section}: expected a mapping, got {data[section]!r}")
        config = parsed(Config, merged(data, own))
        training_fields(config.training)
    except ValueError as error:
        raise ValueError(f"case {case!r}: {error}") from error
    return config


class Study(NamedTuple):
    """What is asked of a study, checked. output: of all stages. configs: by case and seed, with those of the cases that train
    for others. asked: recipe, model and changes, as JSON has them. stamp: what `output` is to say of itself. only_done: it runs
    nothing, for the tables of what is there."""

    recipe: Recipe
    output: Path
    cases: list[str]
    seeds: list[int]
    configs: dict[tuple[str, int], Config]
    asked: dict
    stamp: dict
    only_done: bool


def study_of(
    path: Path, output: Path, model: str | None = None, cases: list[str] | None = None, seeds: list[int] | None = None,
    changes: dict | None = None, only_done: bool = False,
) -> Study:  # fmt: skip
    """A `Study` of a file. model: instead of the recipe's. cases, seeds: some of the recipe's, by default all. changes: of its
    config. With only_done, model and changes are by default those of the output. Raises ValueError for what does not fit, and
    for an output that another recipe, model or changes have written to; cases and seeds may have been added to a recipe."""
    recipe, changes = read(path), changes or {}
    for name, given, known in (("--case", cases, recipe.cases), ("--seed", seeds, recipe.seeds)):
        if unknown := [x for x in given or [] if x not in known]:
            raise ValueError(f"{name}: expected some of {list(known)}, got {unknown[0]!r}")
    cases, seeds = cases or list(recipe.cases), seeds or recipe.seeds
    earlier = read_json(output / STAMP) if (output / STAMP).is_file() else None
    if model is not None and (own := [case for case in cases if "model" in recipe.cases[case]]):
        raise ValueError(f"--model: expected none, since the case {own[0]!r} has its own, got {model!r}; --case chooses others")
    if only_done and earlier:
        model, changes = model or earlier["model"], changes or earlier["changes"]
    configs = {
        (case, seed): config_of(recipe, case, seed, output / slug(case) / f"seed{seed}", model, changes)
        for case in dict.fromkeys([*cases, *(recipe.cases[case].get("trained_by", case) for case in cases)]) for seed in seeds
    }  # fmt: skip
    if not only_done:
        _check_data(recipe, configs, cases, seeds)
    asked = json.loads(json.dumps({"recipe": vars(recipe), "model": model, "changes": changes}))
    stamp = _with_earlier(asked, earlier, output) if earlier else asked
    return Study(recipe, output, cases, seeds, configs, asked, stamp, only_done)


def _with_earlier(asked: dict, earlier: dict, output: Path) -> dict:
    """The stamp of an output that has one. Raises ValueError if it is another's; cases and seeds may have been added since."""
    known, now = earlier["recipe"], asked["recipe"]
    of_cases = {name: changes for name, changes in now["cases"].items() if name in known["cases"]}
    same = {"recipe": {**now, "cases": {**known["cases"], **of_cases}, "seeds": known["seeds"]}}
    for key, value in {**asked, **same}.items():
        if earlier.get(key) != value:
            raise ValueError(f"{output}: expected results of the same {key}, found others; choose another --output")
    seeds = list(dict.fromkeys([*known["seeds"], *now["seeds"]]))
    return {**asked, "recipe": {**now, "cases": {**known["cases"], **now["cases"]}, "seeds": seeds}}


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
