"""diffmas tasks | evaluate | audit: questions, and who answers them right."""

from pathlib import Path
from typing import Annotated

import typer
import yaml
from rich import box
from rich.table import Table

from diffmas.cli.methods import METHODS
from diffmas.cli.terminal import ConfigFile, Device, Partly, console, device_of, errors, goes_on, warn

__all__ = ["audit", "evaluate", "tasks"]

Limit = Annotated[int | None, typer.Option(help="only so many questions, from the first", min=1)]


def tasks():
    """List the published tasks that `evaluate --task` and a config's `task` know."""
    from diffmas.evaluation.tasks import TASKS

    out = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    widths = {"task": 14, "kind": 7, "asked": 5, "hub: set, config, test split": 30, "train": 5, "licence": 12}
    for head, width in widths.items():
        out.add_column(head, justify="right" if head == "asked" else "left", overflow="fold", width=width)
    for t in TASKS.values():
        place = ", ".join(filter(None, (t.hub, t.config, t.split)))
        licence = t.licence + (", gated" if t.gated else "")
        out.add_row(t.name, t.kind, str(t.questions), place, "yes" if "train" in t.splits else "", licence)
    console.print(out)
    columns = ("name", "kind", "questions", "hub", "config", "split", "licence", "gated")
    return {"tasks": [{**{c: getattr(t, c) for c in columns}, "train": "train" in t.splits} for t in TASKS.values()]}


def _chat_options(given: list[str]) -> dict | None:
    """["enable_thinking=false"] -> {"enable_thinking": False}; values as YAML has them."""
    options = {}
    for item in given:
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise ValueError(f"--chat-option: expected NAME=VALUE, got {item!r}")
        try:
            options[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"--chat-option {name}: expected a value as in YAML, got {value!r}") from error
    return options or None


def _settings(config, task, model, path, latent_steps, output, adapter, chat_option):
    """The settings of a config file or of the options that stand for one, with the agents of --adapter if there is one."""
    from diffmas.agents.agent import Agent
    from diffmas.agents.options import Options
    from diffmas.cli.config import Config, Evaluation, load
    from diffmas.evaluation import tasks

    given = {"--model": model, "--path": path, "--latent-steps": latent_steps, "--chat-option": chat_option or None}
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
    agents, options = chosen.agents("latent", latent_steps), Options(chat_options=_chat_options(chat_option or []))
    if adapter is not None:
        if chat_option:
            raise ValueError(
                f"--chat-option: expected none with --adapter, which was trained with its own, got {chat_option[0]!r}"
            )
        from diffmas.agents.file import read_agents

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


def _show_zeros(results, rows, judged_by_task: bool) -> None:
    """Where no answer is right: what two of them are, and what decides it."""
    zeros = [r for r in results if not r.accuracy]
    if not zeros:
        return
    console.print(f"{', '.join(r.method for r in zeros)}: no answer is right. Of {zeros[0].method}:", highlight=False)
    for row, (text, *_) in list(zip(rows, zeros[0].texts))[:2]:
        console.print(f"  {text!r} where {row['answer']!r} was expected", highlight=False, markup=False, soft_wrap=True)
    if not judged_by_task:
        console.print(
            "evaluation.extract (all | boxed | number | a regular expression) is what finds the final answer in a text, "
            "evaluation.match (exact | contains | math) what compares it", highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip


def _show_programs(results) -> None:
    """pass@k of every method, and what the programs ran in."""
    from diffmas.evaluation import sandbox

    for r in results:
        text = ", ".join(f"pass@{k} {100 * rate:.1f} %" for k, rate in r.pass_at.items())
        console.print(f"{r.method}: {text}", highlight=False)
    console.print(f"programs ran isolated by: {sandbox.isolation()}", highlight=False)


def evaluate(
    config: Annotated[
        Path | None, typer.Argument(help="config.yaml; or instead --task and --model", show_default=False)
    ] = None,
    task: Annotated[str | None, typer.Option(help="a published task, see `diffmas tasks`")] = None,
    model: Annotated[str | None, typer.Option(help="with --task: a directory or hub name")] = None,
    path: Annotated[Path | None, typer.Option(help="with --task: a file in a published form, instead of the hub")] = None,
    latent_steps: Annotated[
        int | None, typer.Option(help="with --task: T of every agent but the last; at 0 prompts alone are handed on", min=0)
    ] = None,
    chat_option: Annotated[
        list[str] | None,
        typer.Option(
            help="with --task: for the chat template, as enable_thinking=false; may be repeated", metavar="NAME=VALUE"
        ),
    ] = None,
    methods: Annotated[str | None, typer.Option(help=f"some of {', '.join(METHODS)}, with commas between")] = None,
    adapter: Annotated[Path | None, typer.Option(help="directory that `diffmas train` wrote; none: only the baselines")] = None,
    text_sft: Annotated[Path | None, typer.Option(help="directory of `diffmas train --method text_sft`")] = None,
    stitch: Annotated[Path | None, typer.Option(help="directory of `diffmas train --method stitch`; none: untrained")] = None,
    c2c: Annotated[Path | None, typer.Option(help="directory of `diffmas train --method c2c`")] = None,
    limit: Limit = None,
    samples: Annotated[int | None, typer.Option(help="answers per question", min=1)] = None,
    batch_size: Annotated[int | None, typer.Option(help="questions at once", min=1)] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="of an answer", min=1)] = None,
    max_message_tokens: Annotated[int | None, typer.Option(help="of a message of the text agents", min=1)] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy", min=0)] = None,
    seed: Annotated[int | None, typer.Option(help="of the samples")] = None,
    output: Annotated[
        Path | None, typer.Option(help="directory for results.csv, entropy.csv, results.png and answers.jsonl")
    ] = None,
    device: Device = None,
):
    """Compare the trained system with its baselines on the same questions, of a config or of a published task."""
    from diffmas.cli.config import Evaluation, check_methods

    settings = _settings(config, task, model, path, latent_steps, output, adapter, chat_option)
    options = settings.evaluation
    chosen = {
        "methods": methods and [name.strip() for name in methods.split(",")], "limit": limit, "samples": samples,
        "batch_size": batch_size, "max_message_tokens": max_message_tokens,
    }  # fmt: skip
    vars(options).update({k: v for k, v in chosen.items() if v is not None})
    decoding = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    vars(settings.generation).update({k: v for k, v in decoding.items() if v is not None})
    check_methods(options.methods)
    # Torch is not waited for before.
    from diffmas import evaluation
    from diffmas.cli.build import check_adapters, evaluation_rows, methods_of, scorer_of, trained_system
    from diffmas.cli.made_with import made_with
    from diffmas.json_file import write_json

    place = device_of(device)
    scorer, rows = scorer_of(settings), evaluation_rows(settings)
    adapters = {name: path for name, path in (("text_sft", text_sft), ("stitch", stitch), ("c2c", c2c)) if path}
    names = {*options.methods, *adapters} - (set() if adapter else {"diffmas"})
    check_adapters(names, adapters)
    if "diffmas" in options.methods and not adapter:
        errors.print("diffmas: left out, it needs --adapter", highlight=False)
    if settings.others and methods is None and options.methods == Evaluation().methods:  # nobody has asked for it
        errors.print("latent_mas: left out, it needs agents of one model", highlight=False)
        names -= {"latent_mas"}
    compared = methods_of(settings, trained_system(settings, adapter, place), names, adapters)
    if adapter is None and "latent_mas" in compared:
        from diffmas.agents.latent_check import unlike_tokens
        from diffmas.training.data import question_and_answer

        for line in unlike_tokens(compared["latent_mas"].system, question_and_answer(rows[0])[0]):
            warn(line)
    target = output or Path(settings.output_dir) / "evaluation"
    files = [target / name for name in ("results.csv", "entropy.csv", "results.png", "answers.jsonl", "made_with.json")]
    asked = options.data or settings.data.validation or settings.task or settings.data.train
    made = {
        **made_with(), "seed": settings.generation.seed, "model": settings.model, "adapter": adapter and str(adapter),
        "data": asked and Path(asked).name, "temperature": settings.generation.temperature, "top_p": settings.generation.top_p,
    }  # fmt: skip

    def save(results):
        evaluation.write_csv(results, files[0])
        evaluation.write_entropy(results, files[1])
        evaluation.plot(results, files[2])
        evaluation.write_answers(results, rows, files[3])
        write_json(files[4], made)
        goes_on(lambda: f"the methods that were done are in {target}; --methods with another --output takes the others")

    def show(results) -> dict:
        for table in evaluation.tables(results, str(config or task)):
            console.print(table)
            console.print()
        if all("tests" in row for row in rows):
            _show_programs(results)
        _show_zeros(results, rows, settings.task is not None and not (options.extract or options.match))
        for file in files:
            console.print(str(file), highlight=False, soft_wrap=True)
        return {"made_with": made, "results": [r.row() for r in results], "files": files}

    try:
        results = evaluation.evaluate(
            compared, rows, options.samples, scorer, options.batch_size,
            lambda name: errors.print(f"{name} ...", highlight=False), save,
            [name for name in compared if name != "diffmas"], **vars(settings.generation),
        )  # fmt: skip
    except evaluation.MethodsFailed as failure:
        written = f"{target} has {', '.join(r.method for r in failure.results)}" if failure.results else "nothing was written"
        given = all(isinstance(error, (ValueError, OSError)) for error in failure.errors.values())
        error = (ValueError if given else RuntimeError)(f"{failure} ({written})")
        raise Partly(show(failure.results), error) if failure.results else error from failure
    shown = show(results)
    for name, directory in {"diffmas": adapter, **adapters}.items():
        if directory and (result := next((r for r in results if r.method == name), None)) is not None:
            _say_in_the_card(directory, result, made)
    return shown


def _say_in_the_card(directory: Path, result, made: dict) -> None:
    from diffmas.agents.facts import add_facts

    numbers = ("method", "accuracy", "low", "high", "questions", "samples", "perplexity")
    made = {key: made[key] for key in ("data", "seed", "temperature", "top_p", "versions", "commit")}
    add_facts(directory, metrics=[{**made, **{key: getattr(result, key) for key in numbers}}])


def audit(
    config: ConfigFile,
    adapter: Annotated[Path | None, typer.Option(help="directory that `diffmas train` wrote; none: the bare model")] = None,
    kind: Annotated[
        str | None, typer.Option(help="latent: only latent steps are a message; none: all that is handed on")
    ] = None,
    limit: Limit = None,
    output: Annotated[Path | None, typer.Option(help="directory for audit.csv and audit.png")] = None,
    device: Device = None,
):
    """Does a team communicate? Answers with each agent's own message, none, another question's, and noise."""
    from diffmas.cli.config import load

    settings = load(config)
    # Torch is not waited for before.
    from diffmas import evaluation
    from diffmas.cli.build import evaluation_rows, scorer_of, trained_system
    from diffmas.cli.made_with import made_with
    from diffmas.json_file import write_json

    place = device_of(device)
    options = settings.evaluation
    options.limit = options.limit if limit is None else limit
    rows = evaluation_rows(settings)
    goes_on(lambda: "an audit keeps nothing: the same command starts again, and --limit asks fewer questions")
    conditions = evaluation.audit(
        trained_system(settings, adapter, place), rows, options.samples, scorer_of(settings), options.batch_size, kind,
        progress=lambda done: errors.print(f"{done} ...", highlight=False),
        **vars(settings.generation),
    )  # fmt: skip
    target = output or Path(settings.output_dir) / "audit"
    files = evaluation.write_audit(conditions, target / "audit.csv"), evaluation.plot_audit(conditions, target / "audit.png")
    made = {**made_with(), "seed": settings.generation.seed, "model": settings.model, "adapter": adapter and str(adapter)}
    write_json(target / "made_with.json", made)
    console.print(evaluation.audit_table(conditions, str(config)))
    for file in files:
        console.print(str(file), highlight=False, soft_wrap=True)
    return {"made_with": made, "conditions": evaluation.audit_rows(conditions), "files": files}
