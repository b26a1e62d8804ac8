"""The trainer that a config describes, for a team or for a baseline that is trained."""

from collections.abc import Callable
from pathlib import Path

from diffmas.agents.described import readings
from diffmas.agents.graph import home
from diffmas.cli.build import c2c_system, scorer_of, text_team, training_arguments, training_rows, untrained_system
from diffmas.cli.config import Config

__all__ = ["trainer_of"]


def trainer_of(config: Config, method: str = "diffmas", resume: bool = False, progress: Callable[[str], object] = print):
    """A `diffmas.Trainer` of one of TRAINED. config: of `trained_as`. resume: take what the text team wrote before. progress:
    is told what takes long. Raises ValueError for what does not fit."""
    from transformers import EarlyStoppingCallback

    from diffmas import evaluation
    from diffmas.models.patch import check_trainable
    from diffmas.training import Trainer

    if method == "text_sft" and (others := [a.name for a in config.agents if home(a, readings(config.others)) is not None]):
        raise ValueError(f"text_sft: expected agents of one model, which share its adapter, got some of others: {others}")
    rows, held_out = training_rows(config)
    arguments = training_arguments(config)
    system = c2c_system(config) if method == "c2c" else untrained_system(config)
    if method == "text_sft":
        check_trainable(system.model)  # before its agents write for hours
        system, rows, held_out = _text_sft(config, arguments, system.to(arguments.device), rows, held_out, resume, progress)
    elif method == "stitch":
        system = evaluation.stitch(system, adapter=True).system
    callbacks = []
    if config.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(config.early_stopping_patience))
    return Trainer(
        system, arguments, train_dataset=rows, eval_dataset=held_out, callbacks=callbacks,
        gradient_report_steps=config.gradient_report_steps, explosion_factor=config.explosion_factor,
    )  # fmt: skip


def _text_sft(config: Config, arguments, system, rows, held_out, resume: bool, progress):
    """The team as `diffmas.evaluation.Writers`, and what its bare model wrote where it was right, as rows to train and validate
    on; they are kept in output_dir, where a resumed run finds them. Of several processes the first one writes them, and the
    others wait, at most the ddp_timeout of the training arguments."""
    from diffmas import evaluation
    from diffmas.json_file import read_json, write_json

    options, scorer = config.evaluation, scorer_of(config, training=True)
    writing = text_team(config, system)
    writers = evaluation.Writers(
        system.model, system.tokenizer, writing.agents, system.chat_template, system.chat_options
    )  # fmt: skip
    team = evaluation.TextAgents(writing, options.max_message_tokens)
    sets = []
    for name, questions in (("train", rows), ("validation", held_out)):
        file = Path(config.output_dir) / f"right_turns_{name}.json"
        if questions is None:
            sets.append(None)
            continue
        with arguments.main_process_first(local=False):
            if arguments.process_index == 0 and not (resume and file.is_file()):
                progress(f"text agents answer {len(questions)} questions ({name})")
                try:
                    kept = evaluation.right_turns(
                        team, questions, options.samples, scorer, options.batch_size, **vars(config.generation)
                    )  # fmt: skip
                except ValueError as error:
                    raise ValueError(f"{name} {error}") from error
                file.parent.mkdir(parents=True, exist_ok=True)
                write_json(file, kept)
        sets.append(read_json(file))
    return writers, *sets
