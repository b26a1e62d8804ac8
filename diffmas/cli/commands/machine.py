"""diffmas demo | bench | env: what this machine does, and has."""

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from diffmas.cli.terminal import console

__all__ = ["bench", "demo", "env"]


def demo(
    output: Annotated[Path, typer.Option(help="directory for the table, the plot and the adapter")] = Path("runs/demo"),
    model: Annotated[str | None, typer.Option(help="another causal LM: a directory, GGUF file or hub name")] = None,
    steps: Annotated[int | None, typer.Option(help="training steps; the demo's own number by default", min=1)] = None,
    questions: Annotated[int | None, typer.Option(help="held-out questions; the demo's own number by default", min=1)] = None,
    seed: Annotated[int, typer.Option(help="of the LoRA's weights, the training questions and their order")] = 0,
):
    """Train and compare a small real system on this machine; ends with a table and a plot."""
    from diffmas.agents.file import write_json
    from diffmas.cli.made_with import made_with
    from diffmas.demo import run

    run(output, model, seed, steps, questions)
    write_json(output / "made_with.json", {**made_with(), "seed": seed, "model": model})


def bench(
    quick: Annotated[bool, typer.Option("--quick", help="the cases that end in under three minutes")] = False,
    only: Annotated[str, typer.Option(help="cases whose module or key has this text; other stored rows stay")] = "",
    out: Annotated[Path | None, typer.Option(help="directory for the CSV, the plots and the page", show_default=False)] = None,
    threads: Annotated[int, typer.Option(help="threads that torch uses", min=1)] = 1,
    max_rounds: Annotated[int, typer.Option(help="samples of each provider at most", min=1)] = 25,
    compare: Annotated[str | None, typer.Option(metavar="REV", help="measure this commit side by side with the source")] = None,
    report: Annotated[bool, typer.Option("--report", help="no measurement: table, plots and page from the stored CSV")] = False,
    readme: Annotated[bool, typer.Option("--readme", help="no measurement: README.md's table from the stored CSV")] = False,
):
    """Measure diffmas and its peers on this machine: a table, plots and a page, from a CSV with every row."""
    from diffmas.benchmarks import run as suite

    if compare:
        from diffmas.benchmarks.compare import compare as measure

        raise typer.Exit(measure(compare, quick, only, threads, max_rounds, console, out))
    target = out or suite.default_out(quick and not (report or readme))
    if readme:
        from diffmas.benchmarks.readme import update

        return console.print("README.md: " + ("updated" if update(target, Path("README.md")) else "as it was"))
    if report:
        return suite.write_report(target, console)
    raise typer.Exit(suite.run(target, quick, only, threads, max_rounds, console))


def _cpu_forms() -> str:
    """Which form of the CPU kernels runs, and what else is in the library."""
    from diffmas.ops import extension

    try:
        runs = extension.cpu_form()
    except RuntimeError as error:  # DIFFMAS_CPU_ISA
        return f", [red]{error}[/]"
    left_out = f"; the compiler did not know {', '.join(extension.cpu_forms_left_out)}" if extension.cpu_forms_left_out else ""
    return f", CPU kernels: {runs} (of {', '.join(extension.cpu_forms)}{left_out})"


def env():
    """Show backends, extension, versions and devices as diffmas finds them."""
    import torch

    import diffmas
    from diffmas import ops
    from diffmas.ops import extension

    out = Table(title=f"diffmas {diffmas.__version__}", show_header=False)
    out.add_column(no_wrap=True)
    out.add_column(overflow="fold")
    for name, missing in ops.available().items():
        how = " by name, in Triton's interpreter" if ops.BACKENDS[name].interpreted else ""
        out.add_row(f"backend {name}", f"[green]usable[/]{how}" if missing is None else f"[yellow]missing[/]: {missing}")
    forms = _cpu_forms() if extension.loaded else ""
    kernels = f", CUDA kernels for {', '.join('sm_' + t for t in extension.cuda_targets)}" if extension.cuda_targets else ""
    out.add_row(
        "C++ extension",
        f"[green]loaded[/]{forms}{kernels}" if extension.loaded else f"[yellow]not loaded[/]: {extension.error}",
        end_section=True,
    )
    out.add_row("python", f"{platform.python_version()} on {platform.platform()}")
    for name in ("torch", "triton", "transformers", "peft", "accelerate"):
        try:
            out.add_row(name, version(name))
        except PackageNotFoundError:
            out.add_row(name, "[yellow]not installed[/]")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    built_for = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
    out.add_row("CUDA devices", ", ".join(devices) if devices else f"none ({built_for})")
    console.print(out)
