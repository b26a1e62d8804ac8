"""diffmas study."""

from pathlib import Path
from typing import Annotated

import typer

from diffmas.cli.terminal import Device, Partly, console, device_of, errors, goes_on

__all__ = ["study"]


def study(
    name: Annotated[
        str, typer.Argument(help="one that comes with diffmas, such as facts (a wrong name lists all), or a YAML file")
    ],
    model: Annotated[str | None, typer.Option(help="a directory, GGUF file or hub name, instead of the recipe's")] = None,
    output: Annotated[Path | None, typer.Option(help="directory of adapters and of all that was measured")] = None,
    results: Annotated[Path | None, typer.Option(help="directory for the tables and plots alone")] = None,
    case: Annotated[list[str] | None, typer.Option(help="only this case; may be repeated")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="only this seed; may be repeated")] = None,
    change: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="a key of the recipe's config, as data.train=FILE")
    ] = None,
    report: Annotated[bool, typer.Option("--report", help="run nothing: tables and plots of what is done in --output")] = False,
    device: Device = None,
):
    """Run an experiment over cases and seeds: trainings, methods side by side, a causal audit; a killed one goes on."""
    from diffmas.cli import recipe

    path = recipe.named(name)
    target = output or Path("runs") / "studies" / path.stem
    goes_on(lambda: f"what is done is in {target}, and the same command goes on")
    asked = recipe.study_of(path, target, model, case, seed, recipe.changes_of(change or []), report)
    from diffmas.cli import study as studies  # torch is not waited for before
    from diffmas.evaluation import files, gradient_norms, pooled, pooled_costs
    from diffmas.json_file import read_json

    outcome = studies.run(asked, device_of(device), lambda text: errors.print(f"{text} ...", highlight=False))
    shown, written = results or target, []
    for rows, what in ((outcome.methods, "methods"), (outcome.audits, "audit")):
        if rows:
            console.print(pooled.pooled_table(rows, f"{path.stem}: {what}"))
            console.print()
            # A plot of an audit shows the team; each agent is in the table.
            drawn = [row for row in rows if what == "methods" or ":" not in row.name]
            written += [pooled.write_pooled(rows, shown / f"{what}.csv"), pooled.plot_pooled(drawn, shown / f"{what}.png")]
    if report and not outcome.costs:
        raise ValueError(f"--report: expected something that is done in {target}, found nothing")
    if outcome.missing:  # or means over some seeds look like those over all
        errors.print(f"not done: {'; '.join(outcome.missing)}", highlight=False, markup=False, soft_wrap=True)
    if outcome.costs:
        for table in pooled_costs.cost_tables(outcome.costs, f"{path.stem}: costs"):
            console.print(table)
            console.print()
        written.append(files.write_rows(outcome.costs, shown / "costs.csv"))
        written.append(pooled_costs.plot_costs(outcome.costs, shown / "results.png", path.stem))
    if outcome.entropies:
        written.append(files.write_rows(outcome.entropies, shown / "entropy.csv"))
        written.append(pooled.plot_entropy(outcome.entropies, shown / "entropy.png"))
    if outcome.norms:
        written.append(gradient_norms.write_norms(outcome.norms, shown / "gradients.csv"))
        written.append(gradient_norms.plot_norms(outcome.norms, shown / "gradients.png"))
    written.append(studies.write_made(outcome.made, shown))
    for file in written:
        console.print(str(file), highlight=False, soft_wrap=True)
    rows = {"methods": [r.row() for r in outcome.methods], "audit": [r.row() for r in outcome.audits], "costs": outcome.costs}
    result = {
        "made_with": read_json(written[-1]),
        **rows,
        "failures": outcome.failures,
        "missing": outcome.missing,
        "files": written,
    }
    if outcome.failures:
        lines = "; ".join(outcome.failures)
        raise Partly(result, ValueError(f"{lines} (the others are in {shown}; run it again to try these again)"))
    return result
