"""Studies: an experiment as one YAML file (diffmas.cli.recipe), over cases and seeds, that goes on after a kill and gives the
same table.

Every stage (a training, a method, an audit) leaves a file when it is done, which the next run finds (diffmas.cli.stages); one
that fails is told at the end and does not stop the others. The seed is that of the adapter's first weights, of the order of the
rows, and of sampling.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from diffmas.cli.made_with import made_with
from diffmas.cli.methods import TRAINED
from diffmas.cli.recipe import STAMP, Recipe, Study
from diffmas.cli.stages import NotDone, Stages
from diffmas.evaluation.pooled import Pooled, best_of, pool
from diffmas.json_file import write_json

__all__ = ["Outcome", "run", "write_made"]


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


def run(study: Study, device: str, progress: Callable[[str], object]) -> Outcome:
    """Does what is missing of a study; progress is told of each stage."""
    recipe = study.recipe
    if not study.only_done:
        study.output.mkdir(parents=True, exist_ok=True)
        write_json(study.output / STAMP, study.stamp)
    for name, wanted in recipe.versions.items():
        here = made_with()["versions"].get(name)
        if str(here).partition("+")[0] != str(wanted):  # builds of one version are one
            progress(f"{name}: the recipe was made with {wanted}, this is {here}")
    outcome = Outcome([], [], [], [], [], {**study.asked, "made_with": [], "training_tokens_per_second": {}}, [], [])
    told = None if study.only_done else progress
    for case in study.cases:
        trainer = recipe.cases[case].get("trained_by")
        of = {
            seed: Stages(
                study.configs[case, seed], recipe.alone, device, told,
                trained_by=Stages(study.configs[trainer, seed], recipe.alone, device, told) if trainer else None,
            )
            for seed in study.seeds
        }  # fmt: skip
        _run_case(recipe, case, of, outcome)
    return outcome


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
