"""The command line: diffmas demo | train | generate | tasks | evaluate | audit | study | bench | env."""

import functools
import math
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from diffmas.cli.methods import METHODS, TRAINED

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
console = Console()
errors = Console(stderr=True)

ConfigFile = Annotated[Path, typer.Argument(help="config.yaml; see examples/train.yaml", show_default=False)]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; a GPU if there is one")]


def explained(command):
    """Decorates a command: the user's errors become one line on stderr and exit status 1; others keep their traceback."""

    @functools.wraps(command)
    def wrapped(*args, **kwargs):
        try:
            return command(*args, **kwargs)
        except (ValueError, OSError, FloatingPointError) as error:  # the last is diffmas.training.NonFiniteLoss
            errors.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(1) from error

    return wrapped


def _device(name: str | None) -> str:
    import torch

    return name or ("cuda" if torch.cuda.is_available() else "cpu")


@app.command()
@explained
def demo(
    output: Annotated[Path, typer.Option(help="directory for the table, the plot and the adapter")] = Path("runs/demo"),
    model: Annotated[str | None, typer.Option(help="another causal LM: a directory, GGUF file or hub name")] = None,
    steps: Annotated[int | None, typer.Option(help="training steps; the demo's own number by default", min=1)] = None,
    questions: Annotated[int | None, typer.Option(help="held-out questions; the demo's own number by default", min=1)] = None,
    seed: Annotated[int, typer.Option(help="of the LoRA's weights, the training questions and their order")] = 0,
):
    """Train and compare a small real system on this machine; ends with a table and a plot."""
    from diffmas.demo import run

    run(output, model, seed, steps, questions)


@app.command()
@explained
def train(
    config: ConfigFile,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the newest whole checkpoint in output_dir")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="start afresh and remove an earlier run's checkpoints in output_dir")
    ] = False,
    method: Annotated[
        str, typer.Option(help=f"one of {','.join(TRAINED)}; all but diffmas are baselines and go to OUTPUT_DIR-METHOD")
    ] = "diffmas",
):
    """Train LoRA adapters as a config says; under torchrun on several GPUs.

    text_sft: text agents answer the training questions, evaluation.samples times each; where the answer is right, all that
    they wrote is what one shared adapter is trained on. stitch: agents that do not read each other.
    """
    from diffmas.cli.build import trained_as
    from diffmas.cli.config import load
    from diffmas.cli.train import trainer_of
    from diffmas.training import checkpoints

    settings = trained_as(load(config), method)
    earlier = [] if resume else checkpoints(settings.output_dir)
    if resume and overwrite:
        raise ValueError("--overwrite: expected it without --resume, got both")
    if earlier and not overwrite:
        raise ValueError(
            f"{settings.output_dir}: expected no checkpoints of an earlier run, found {earlier[-1].name}; go on from it with "
            "--resume, remove it with --overwrite, or choose another output_dir"
        )
    trainer = trainer_of(settings, method, resume, lambda text: errors.print(f"{text} ...", highlight=False))
    if trainer.is_world_process_zero():
        console.print(_summary(settings, trainer))
        for path in earlier:
            shutil.rmtree(path)
    result = trainer.train(resume_from_checkpoint=resume or None)
    trainer.save_model()
    if trainer.is_world_process_zero():
        best = f", best eval_loss {trainer.state.best_metric:.4f}" if trainer.state.best_metric is not None else ""
        console.print(f"{result.global_step} steps, training loss {result.training_loss:.4f}{best}", highlight=False)
        console.print(f"adapter and agents.json: {settings.output_dir}", highlight=False, soft_wrap=True)


def _summary(settings, trainer) -> Table:
    out = Table(title="diffmas train", show_header=False)
    system, arguments, rows, held_out = trainer.model, trainer.args, trainer.train_dataset, trainer.eval_dataset
    trainable = sum(p.numel() for p in system.parameters() if p.requires_grad)
    total = sum(p.numel() for p in system.parameters())
    step = (arguments.train_batch_size, arguments.gradient_accumulation_steps, arguments.world_size)
    rows_per_step = math.prod(step)
    schedule = getattr(arguments.lr_scheduler_type, "value", arguments.lr_scheduler_type)
    for name, value in (
        ("model", settings.model),
        ("agents", ", ".join(f"{a.name} (T={a.latent_steps})" for a in system.agents[:-1]) + f" -> {system.agents[-1].name}"),
        ("trainable", f"{trainable:,} of {total:,} parameters ({100 * trainable / total:.2f} %)"),
        ("adapter", f"{system.adapter_scope}, r={settings.lora.r}, alpha={settings.lora.alpha}"),
        ("data", f"{len(rows)} rows, {len(held_out or [])} for validation"),
        ("step", f"{rows_per_step} rows = " + " x ".join(map(str, step)) + " (micro-batch x accumulation x processes)"),
        ("learning rate", f"{arguments.learning_rate:g}, {schedule}"),
        ("device", str(arguments.device)),
        ("output", settings.output_dir),
    ):
        out.add_row(name, str(value))
    return out


@app.command()
@explained
def generate(
    adapter: Annotated[Path, typer.Option(help="directory that `diffmas train` wrote", show_default=False)],
    question: Annotated[str, typer.Option(help="the field {question} of the agents' prompts")] = "",
    field: Annotated[list[str] | None, typer.Option(help="another field of the prompts, as name=text; may be repeated")] = None,
    model: Annotated[
        str | None, typer.Option(help="base model (directory, GGUF file or hub name), if it is not where it was")
    ] = None,
    max_new_tokens: int = 256,
    temperature: float = 0.6,
    top_p: float = 0.95,
    seed: int | None = None,
    samples: int = 1,
    device: Device = None,
):
    """Answer a question with a trained system."""
    from diffmas.agents.system import MultiAgentSystem

    fields = {"question": question} if question else {}
    for item in field or []:
        name, equals, text = item.partition("=")
        if not equals:
            raise ValueError(f"--field: expected name=text, got {item!r}")
        fields[name] = text
    system = MultiAgentSystem.from_pretrained(adapter, model).to(_device(device))
    texts = system.generate(
        [fields], max_new_tokens, temperature, top_p, seed, samples=samples, progress=errors.is_terminal
    )  # fmt: skip
    for text in texts[0]:
        typer.echo(text)


@app.command()
def tasks():
    """List the published tasks that `evaluate --task` and a config's `task` know."""
    from diffmas.evaluation.tasks import TASKS

    out = Table(box=box.SIMPLE_HEAD)
    for head in ("task", "kind", "questions", "train", "on the hub", "licence"):
        out.add_column(head, justify="right" if head == "questions" else "left", overflow="fold")
    for t in TASKS.values():
        licence = t.licence + (", gated" if t.gated else "")
        out.add_row(t.name, t.kind, str(t.questions), "yes" if "train" in t.splits else "", t.hub, licence)
    console.print(out)


def _settings(config, task, model, path, latent_steps, output, adapter):
    """The settings of a config file or of the options that stand for one, with the agents of --adapter if there is one."""
    from diffmas.agents.file import read_agents
    from diffmas.agents.options import Options
    from diffmas.agents.prompts import Agent
    from diffmas.cli.config import Config, Evaluation, load
    from diffmas.evaluation import tasks

    given = {"--model": model, "--path": path, "--latent-steps": latent_steps}
    given = [name for name, value in given.items() if value is not None]
    if config is not None:
        if task is not None or given:
            raise ValueError(f"{task and '--task' or given[0]}: expected it without a config file, got {config} too")
        return load(config)
    if task is None:
        raise ValueError("evaluate: expected a config file, or --task and --model, got neither")
    chosen = tasks.task(task)
    if model is None:
        raise ValueError(f"--model: expected a directory or hub name with --task {task}, got none")
    agents, options = chosen.agents("latent", latent_steps), Options()
    if adapter is not None:
        described = read_agents(adapter)
        agents, options = [Agent(**a) for a in described["agents"]], Options(**{k: described[k] for k in vars(options)})
        theirs = [agent.latent_steps for agent in agents[:-1]]
        if latent_steps is not None and any(T != latent_steps for T in theirs):
            has = ", ".join(map(str, theirs))
            raise ValueError(f"--latent-steps: expected none with --adapter, whose agents have T = {has}, got {latent_steps}")
    return Config(
        model, agents, task, output_dir=str(output or Path("runs") / task), system=options,
        evaluation=Evaluation(data=str(path) if path else None),
    )  # fmt: skip


def _show_programs(results) -> None:
    """pass@k of every method, and what the programs ran in."""
    from diffmas.evaluation import metrics, sandbox

    for r in results:
        right = [round(share * r.samples) for share in r.scores]
        rates = {k: sum(metrics.pass_at_k(r.samples, n, k) for n in right) / len(right) for k in {1, r.samples}}
        text = ", ".join(f"pass@{k} {100 * rate:.1f} %" for k, rate in sorted(rates.items()))
        console.print(f"{r.method}: {text}", highlight=False)
    console.print(f"programs ran isolated by: {sandbox.isolation()}", highlight=False)


@app.command()
@explained
def evaluate(
    config: Annotated[
        Path | None, typer.Argument(help="config.yaml; or instead --task and --model", show_default=False)
    ] = None,
    task: Annotated[str | None, typer.Option(help="a published task, see `diffmas tasks`")] = None,
    model: Annotated[str | None, typer.Option(help="with --task: a directory or hub name")] = None,
    path: Annotated[Path | None, typer.Option(help="with --task: a file in a published form, instead of the hub")] = None,
    latent_steps: Annotated[int | None, typer.Option(help="with --task: T of every agent but the last", min=0)] = None,
    methods: Annotated[str | None, typer.Option(help=f"some of {','.join(METHODS)}")] = None,
    adapter: Annotated[Path | None, typer.Option(help="directory that `diffmas train` wrote; none: only the baselines")] = None,
    text_sft: Annotated[Path | None, typer.Option(help="directory of `diffmas train --method text_sft`")] = None,
    stitch: Annotated[Path | None, typer.Option(help="directory of `diffmas train --method stitch`; none: untrained")] = None,
    limit: Annotated[int | None, typer.Option(help="only so many questions, from the first", min=1)] = None,
    samples: Annotated[int | None, typer.Option(help="answers per question", min=1)] = None,
    batch_size: Annotated[int | None, typer.Option(help="questions at once", min=1)] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="of an answer", min=1)] = None,
    max_message_tokens: Annotated[int | None, typer.Option(help="of a message of the text agents", min=1)] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy")] = None,
    seed: Annotated[int | None, typer.Option(help="of the samples")] = None,
    output: Annotated[
        Path | None, typer.Option(help="directory for results.csv, entropy.csv, results.png and answers.jsonl")
    ] = None,
    device: Device = None,
):
    """Compare the trained system with its baselines on the same questions, of a config or of a published task."""
    from diffmas import evaluation
    from diffmas.cli.build import evaluation_rows, methods_of, scorer_of, trained_system
    from diffmas.cli.config import check_methods

    settings, place = _settings(config, task, model, path, latent_steps, output, adapter), _device(device)
    options = settings.evaluation
    chosen = {
        "methods": methods and [name.strip() for name in methods.split(",")], "limit": limit, "samples": samples,
        "batch_size": batch_size, "max_message_tokens": max_message_tokens,
    }  # fmt: skip
    vars(options).update({k: v for k, v in chosen.items() if v is not None})
    decoding = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    vars(settings.generation).update({k: v for k, v in decoding.items() if v is not None})
    check_methods(options.methods)
    scorer, rows = scorer_of(settings), evaluation_rows(settings)
    adapters = {name: path for name, path in (("text_sft", text_sft), ("stitch", stitch)) if path}
    names = {*options.methods, *adapters} - (set() if adapter else {"diffmas"})
    if "diffmas" in options.methods and not adapter:
        errors.print("diffmas: left out, it needs --adapter", highlight=False)
    compared = methods_of(settings, trained_system(settings, adapter, place), names, adapters)
    target = output or Path(settings.output_dir) / "evaluation"
    files = [target / name for name in ("results.csv", "entropy.csv", "results.png", "answers.jsonl")]

    def save(results):
        evaluation.write_csv(results, files[0])
        evaluation.write_entropy(results, files[1])
        evaluation.plot(results, files[2])
        evaluation.write_answers(results, rows, files[3])

    def show(results):
        for table in evaluation.tables(results, str(config or task)):
            console.print(table)
            console.print()
        if all("tests" in row for row in rows):
            _show_programs(results)
        for file in files:
            console.print(str(file), highlight=False, soft_wrap=True)

    try:
        results = evaluation.evaluate(
            compared, rows, options.samples, scorer, options.batch_size,
            lambda name: errors.print(f"{name} ...", highlight=False), save, [name for name in compared if name != "diffmas"],
            **vars(settings.generation),
        )  # fmt: skip
    except evaluation.MethodsFailed as failure:
        if failure.results:
            show(failure.results)
        written = f"{target} has {', '.join(r.method for r in failure.results)}" if failure.results else "nothing was written"
        given = all(isinstance(error, (ValueError, OSError)) for error in failure.errors.values())
        raise (ValueError if given else RuntimeError)(f"{failure} ({written})") from failure
    show(results)


@app.command()
@explained
def audit(
    config: ConfigFile,
    adapter: Annotated[Path | None, typer.Option(help="directory that `diffmas train` wrote; none: the bare model")] = None,
    kind: Annotated[
        str | None, typer.Option(help="latent: only latent steps are a message; none: all that is handed on")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="directory for audit.csv and audit.png")] = None,
    device: Device = None,
):
    """Does a team communicate? Answers with each agent's own message, none, another question's, and noise."""
    from diffmas import evaluation
    from diffmas.cli.build import evaluation_rows, scorer_of, trained_system
    from diffmas.cli.config import load

    settings, place = load(config), _device(device)
    options = settings.evaluation
    rows = evaluation_rows(settings)
    conditions = evaluation.audit(
        trained_system(settings, adapter, place), rows, options.samples, scorer_of(settings), options.batch_size, kind,
        progress=lambda done: errors.print(f"{done} ...", highlight=False),
        **vars(settings.generation),
    )  # fmt: skip
    target = output or Path(settings.output_dir) / "audit"
    console.print(evaluation.audit_table(conditions, str(config)))
    for file in (
        evaluation.write_audit(conditions, target / "audit.csv"), evaluation.plot_audit(conditions, target / "audit.png"),
    ):  # fmt: skip
        console.print(str(file), highlight=False, soft_wrap=True)


@app.command()
@explained
def study(
    name: Annotated[str, typer.Argument(help="one that comes with diffmas (benchmarks/studies), or a YAML file")],
    model: Annotated[str | None, typer.Option(help="a directory, GGUF file or hub name, instead of the recipe's")] = None,
    output: Annotated[Path | None, typer.Option(help="directory of adapters and of all that was measured")] = None,
    results: Annotated[Path | None, typer.Option(help="directory for the tables and plots alone")] = None,
    case: Annotated[list[str] | None, typer.Option(help="only this case; may be repeated")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="only this seed; may be repeated")] = None,
    change: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="a key of the recipe's config, as data.train=FILE")
    ] = None,
    device: Device = None,
):
    """Run an experiment over cases and seeds: trainings, methods side by side, a causal audit; a killed one goes on."""
    from diffmas.cli import study as studies
    from diffmas.evaluation import files, pooled

    path = studies.named(name)
    target = output or Path("runs") / "studies" / path.stem
    outcome = studies.run(
        path, target, model, _device(device), case, seed, studies.changes_of(change or []),
        lambda text: errors.print(f"{text} ...", highlight=False),
    )  # fmt: skip
    shown = results or target
    for rows, what in ((outcome.methods, "methods"), (outcome.audits, "audit")):
        if rows:
            console.print(pooled.pooled_table(rows, f"{path.stem}: {what}"))
            console.print()
            for file in (pooled.write_pooled(rows, shown / f"{what}.csv"), pooled.plot_pooled(rows, shown / f"{what}.png")):
                console.print(str(file), highlight=False, soft_wrap=True)
    if outcome.costs:
        console.print(str(files.write_rows(outcome.costs, shown / "costs.csv")), highlight=False, soft_wrap=True)
    studies.write_made(outcome.made, shown)
    if outcome.failures:
        raise ValueError("; ".join(outcome.failures) + f" (the others are in {shown}; run it again to try these again)")


@app.command()
@explained
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


@app.command()
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
    kernels = f", CUDA kernels for {', '.join('sm_' + t for t in extension.cuda_targets)}" if extension.cuda_targets else ""
    out.add_row(
        "C++ extension",
        f"[green]loaded[/]{kernels}" if extension.loaded else f"[yellow]not loaded[/]: {extension.error}",
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


if __name__ == "__main__":
    app()
