"""diffmas demo | bench | env: what this machine does, and has."""

import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from diffmas.cli.terminal import NOTHING_KEPT, Partly, console, goes_on

__all__ = ["bench", "demo", "env"]


def demo(
    output: Annotated[Path, typer.Option(help="directory for the table, the plot and the adapter")] = Path("runs/demo"),
    model: Annotated[str | None, typer.Option(help="another causal LM: a directory, GGUF file or hub name")] = None,
    steps: Annotated[int | None, typer.Option(help="training steps; the demo's own number by default", min=1)] = None,
    questions: Annotated[int | None, typer.Option(help="held-out questions; the demo's own number by default", min=1)] = None,
    seed: Annotated[int, typer.Option(help="of the LoRA's weights, the training questions and their order")] = 0,
):
    """Train and compare a small real system on this machine; ends with a table and a plot."""
    from diffmas.cli.made_with import made_with
    from diffmas.demo import run
    from diffmas.json_file import write_json

    made, start = {**made_with(), "seed": seed, "model": model}, time.time()
    goes_on(lambda: _left(output / "adapter", start))
    shown = run(output, model, seed, steps, questions)
    write_json(output / "made_with.json", made)
    return {"made_with": made, **shown}


def _left(adapter: Path, start: float) -> str:
    """Of a demo that was interrupted: the adapter, if it was trained since the start."""
    file = adapter / "agents.json"
    trained = file.exists() and file.stat().st_mtime >= start
    return f"the trained adapter is in {adapter}: the same command trains it again" if trained else NOTHING_KEPT


def bench(
    quick: Annotated[bool, typer.Option("--quick", help="the cases that end in under three minutes")] = False,
    only: Annotated[str, typer.Option(help="cases whose module or key has this text; other stored rows stay")] = "",
    missing: Annotated[
        bool, typer.Option("--missing", help="the cases that the CSV has no time of, of this machine; each is stored when done")
    ] = False,
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
        from diffmas.benchmarks.compare import failed

        rows = measure(compare, quick, only, threads, max_rounds, console, out)
        return _with_status({"rows": rows}, int(failed(rows)))
    target = out or suite.default_out(quick and not (report or readme))
    if readme:
        from diffmas.benchmarks.readme import update

        changed = update(target, Path("README.md"))
        console.print("README.md: " + ("updated" if changed else "as it was"))
        return {"file": "README.md", "updated": changed}
    if report:
        status = suite.write_report(target, console)
    else:
        status = suite.run(target, quick, only, threads, max_rounds, console, missing)
    return _with_status({"rows": suite.rows(target), "directory": target}, status or 0)


def _with_status(result: dict, status: int) -> dict:
    """The result; behind it the process ends with this status."""
    if status:
        raise Partly(result, typer.Exit(status))
    return result


def env():
    """Show backends, extension, versions and devices as diffmas finds them."""
    found = _found()
    out = Table(title=f"diffmas {found['versions']['diffmas']}", show_header=False)
    out.add_column(no_wrap=True)
    out.add_column(overflow="fold")
    for name, backend in found["backends"].items():
        how = " by name, in Triton's interpreter" if backend["interpreted"] else ""
        missing = backend["missing"]
        out.add_row(f"backend {name}", f"[green]usable[/]{how}" if missing is None else f"[yellow]missing[/]: {missing}")
    out.add_row("C++ extension", _of_extension(found["extension"]), end_section=True)
    out.add_row("python", f"{found['python']} on {found['platform']}")
    for name, installed in found["versions"].items():
        if name != "diffmas":
            out.add_row(name, installed or "[yellow]not installed[/]")
    cuda = found["cuda"]
    built_for = f"torch is built for CUDA {cuda['torch']}" if cuda["torch"] else "torch is built without CUDA"
    out.add_row("CUDA devices", ", ".join(cuda["devices"]) or f"none ({built_for})")
    console.print(out)
    return found


def _found() -> dict:
    """What `env` shows."""
    import torch

    from diffmas import ops
    from diffmas.ops import extension

    versions = {}
    for name in ("diffmas", "torch", "triton", "transformers", "peft", "accelerate"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    backends = {
        name: {"missing": missing, "interpreted": ops.BACKENDS[name].interpreted} for name, missing in ops.available().items()
    }
    form = error = None
    if extension.loaded:
        try:
            form = extension.cpu_form()
        except RuntimeError as wrong:  # DIFFMAS_CPU_ISA
            error = str(wrong)
    built = {
        "loaded": extension.loaded, "error": error or extension.error, "cpu_form": form, "cpu_forms": extension.cpu_forms,
        "cpu_forms_left_out": extension.cpu_forms_left_out, "cuda_targets": extension.cuda_targets,
    }  # fmt: skip
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "versions": versions, "python": platform.python_version(), "platform": platform.platform(), "backends": backends,
        "extension": built, "cuda": {"torch": torch.version.cuda, "devices": devices},
    }  # fmt: skip


def _of_extension(built: dict) -> str:
    """Which form of the CPU kernels runs, and what else is in the library."""
    if not built["loaded"]:
        return f"[yellow]not loaded[/]: {built['error']}"
    left_out = f"; the compiler did not know {', '.join(built['cpu_forms_left_out'])}" if built["cpu_forms_left_out"] else ""
    forms = f"CPU kernels: {built['cpu_form']} (of {', '.join(built['cpu_forms'])}{left_out})"
    kernels = f", CUDA kernels for {', '.join('sm_' + t for t in built['cuda_targets'])}" if built["cuda_targets"] else ""
    return f"[green]loaded[/], {forms if built['cpu_form'] else '[red]' + built['error'] + '[/]'}{kernels}"
