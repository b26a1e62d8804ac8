"""GRPO (arXiv 2402.03300) by TRL's trainer, with a multi-agent system as the policy.

TRL's trainer groups, rewards, normalizes and clips; `diffmas.training.Trainer` checks, saves and resumes. What is here samples
answers from the team, and computes their log-probabilities with a gradient through the latent steps.
"""

import contextlib
import copy
from functools import partial

import torch
import trl
from datasets import Dataset, IterableDataset
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from diffmas.agents.adapters import switched_off
from diffmas.agents.sampling import Sampling
from diffmas.agents.system import MultiAgentSystem
from diffmas.models.adapted import check_bare
from diffmas.rl.policy import answer_log_probs, rollout
from diffmas.training.data import check_fields, fields_of_row
from diffmas.training.trainer import Trainer

__all__ = ["GRPOTrainer"]

LATENTS = ("recompute", "keep")
# Fields of GRPOConfig that would do nothing here, or something wrong, and what to do instead.
REFUSED = {
    "cache_implementation": "a system has its trace",
    "cast_lm_head_to_fp32": "log-probabilities are computed in float32 from the model's logits",
    "chat_template_kwargs": "a system has chat_options",
    "model_init_kwargs": "the system's model is loaded",
    "router_aux_loss_coef": "the loss is of the answers alone",
    "sync_ref_model": "the reference is the team without its adapter",
    "use_transformers_continuous_batching": "a system decodes its batches itself",
    "use_vllm": "a system decodes its batches itself",
}
# Names that TRL's rewards take for themselves, or by which it takes a row for a picture's.
TAKEN = {
    "completion", "completion_ids", "completions", "environments", "image", "images", "log_extra", "log_metric", "prompts",
    "trainer_state",
}  # fmt: skip
BARE = object()  # in the place of a reference model: the team without its adapter


class GRPOTrainer(Trainer, trl.GRPOTrainer):
    """TRL's GRPOTrainer for a `MultiAgentSystem`.

    system: its PEFT adapter is trained; a plain model gets one first.
    reward_funcs: one or several, as TRL takes them: (completions, prompts, and every other column of the rows by its name)
        -> a number or None for each; `scored` makes one of a `Scorer`.
    args: TRL's GRPOConfig. Its beta weighs the KL divergence from the team without its adapter.
    train_dataset, eval_dataset: rows with the fields of the agents' prompts, as for `diffmas.training.Trainer`, and whatever
        columns the rewards ask for. Rewards see the last agent's prompt as `prompts`.
    latents: "recompute": each loss runs the other agents again, and its gradient goes through all latent steps. "keep": their
        rows stay as the answers were sampled from them, as constants: faster, and only the last agent learns.
    reward_processing_classes, callbacks, optimizers: as TRL takes them. peft_config, gradient_report_steps: as
        `diffmas.training.Trainer` does.

    Saves, resumes and stops on a loss that is not finite as `diffmas.training.Trainer`. A run that resumes is as it would
    have been where answers are sampled anew after the checkpoint, which with GRPOConfig's defaults they always are.

    Raises ValueError for what does not apply to a team, and for rows that lack a field of a prompt.

        >>> options = dict(num_generations=2, per_device_train_batch_size=2, max_completion_length=4, bf16=False)
        >>> args = GRPOConfig(directory, max_steps=1, logging_steps=1, report_to=[], **options)
        >>> GRPOTrainer(system, scored(), args, train_dataset=rows).train().global_step
        {'loss': ...}
        1
    """

    compute_loss = trl.GRPOTrainer.compute_loss
    prediction_step = trl.GRPOTrainer.prediction_step

    def __init__(
        self, system: MultiAgentSystem, reward_funcs, args: trl.GRPOConfig, *, train_dataset, eval_dataset=None,
        latents: str = "recompute", reward_processing_classes=None, callbacks=None, optimizers=(None, None),
        peft_config=None, gradient_report_steps: int = 0,
    ):  # fmt: skip
        if not isinstance(args, trl.GRPOConfig):
            raise ValueError(f"args: expected a GRPOConfig, got {type(args).__name__}")
        if latents not in LATENTS:
            raise ValueError(f"latents: expected one of {LATENTS}, got {latents!r}")
        for name, instead in REFUSED.items():
            if value := getattr(args, name, None):
                raise ValueError(f"{name}: expected it to be off for a multi-agent system, got {value!r}; {instead}")
        for agent in system.agents[:-1]:
            if agent.message_temperature and latents == "recompute":
                raise ValueError(
                    f"agent {agent.name!r}: message_temperature: expected None or 0 with latents='recompute', got "
                    f"{agent.message_temperature}: the loss would read other messages than the answers did"
                )
        self._keep, self._samples = latents == "keep", []
        self._rewards = dict(reward_funcs=reward_funcs, reward_processing_classes=reward_processing_classes)
        super().__init__(
            system, args, train_dataset=_dataset("train_dataset", train_dataset),
            eval_dataset=_dataset("eval_dataset", eval_dataset), callbacks=callbacks, optimizers=optimizers,
            peft_config=peft_config, gradient_report_steps=gradient_report_steps, explosion_factor=None,
        )  # fmt: skip
        if self._engine != "one process or DDP":
            raise ValueError(
                f"args: expected a run of one process or DDP, got {self._engine}: answers are sampled from a model that a "
                "process has alone; start it with torchrun"
            )
        self._monitor.log = super(trl.GRPOTrainer, self).log  # TRL's own would put the means of rewards into a report

    @staticmethod
    def _check_row(row, where: str, agents) -> None:
        if taken := sorted(TAKEN & row.keys()):
            raise ValueError(f"{where}: expected no column {taken[0]!r}, which TRL reads as something else; rename it")
        check_fields(fields_of_row(row, where), where, agents)

    def _set_up(self, system, args, *, data_collator, compute_loss_func, **options) -> None:
        rows, least = options["train_dataset"], args.generation_batch_size // args.num_generations
        if hasattr(rows, "__len__") and len(rows) < least:
            raise ValueError(
                f"train_dataset: expected at least {least} rows, the questions of one generation, got {len(rows)}; lower "
                "per_device_train_batch_size or steps_per_generation"
            )
        Sampling.of(system, samples=args.num_generations, **_choice(args))  # do all values fit?
        if len(system.choices.weights):
            raise ValueError(
                "system: expected agents that choose no rows by 'learned', which the loss would choose with noise and the "
                f"answers without, got {list(system.choices.weights)}"
            )
        beta = args.beta
        if beta:
            check_bare(system.model)
            if system.realign.mode == "learned":
                raise ValueError(
                    f"beta: expected 0 with realign='learned', which is trained beside the adapter, got {beta}; the team "
                    "without its adapter is no reference then"
                )
        args.beta = 0.0  # TRL would load a reference model
        with _as_pretrained(system):
            trl.GRPOTrainer.__init__(
                self, system, args=args, processing_class=copy.deepcopy(system.tokenizer), **self._rewards, **options
            )
        vars(system).pop("forward", None)  # which TRL has put in the place of the system's own
        self.beta = self.args.beta = beta
        self.ref_model = BARE if beta else None
        self.aux_loss_enabled = False

    # ---- the policy --------------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs):
        if self.model.training:
            self._samples, self._buffered_inputs = [], None  # and the rows that were kept
        with self.accelerator.autocast():
            self._samples = rollout(
                self.model, [fields_of_row(row) for row in inputs], self._keep, seed=int(torch.randint(2**31, ())),
                **_choice(self.args),
            )  # fmt: skip
        last = self.model.agents[-1]
        with _as_pretrained(self.model):
            output = super()._generate_and_score_completions(
                [{**row, "prompt": last.render(sample.question)} for row, sample in zip(inputs, self._samples)]
            )
        return {**output, "samples": self._samples}

    def _tokenize_prompts(self, prompts: list):
        last = self.model.agents[-1]
        return [self.model.prompt_ids(last, sample.question) for sample in self._samples], None, {}

    def _generate_single_turn(self, *_, **__):
        return [sample.answer for sample in self._samples], None

    def _compute_loss(self, model, inputs):
        self._samples = inputs["samples"]
        return super()._compute_loss(model, inputs)

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, compute_entropy=False, **_
    ):  # fmt: skip
        """Of the samples that are at hand; [B, logits_to_keep], as TRL has padded them."""
        bare = model is BARE
        model, step = self.model if bare else model, batch_size or len(self._samples)
        found = []
        with switched_off(self.model.model) if bare else contextlib.nullcontext():
            for first in range(0, len(self._samples), step):
                part = self._samples[first : first + step]
                trace = part[0].trace.select([sample.sequence for sample in part]) if self._keep and not bare else None
                questions, answers = [sample.question for sample in part], [sample.answer for sample in part]
                with self.accelerator.autocast():
                    found.append(answer_log_probs(model, questions, answers, self.temperature, trace))
        log_probs, entropies = (_padded([row for part in x for row in part], logits_to_keep) for x in zip(*found))
        return log_probs, entropies if compute_entropy else None, None

    # ---- files -------------------------------------------------------------------------------------------------------

    def create_model_card(self, *_, **__) -> None:
        """None of TRL's: what is saved is a system."""


def _choice(args: trl.GRPOConfig) -> dict:
    """How the config chooses tokens, by the names of `MultiAgentSystem.generate`."""
    if not args.temperature > 0:
        raise ValueError(f"temperature: expected more than 0, got {args.temperature}")
    further = args.generation_kwargs or {}
    # Log-probabilities are taken at the config's temperature.
    if own := sorted({"do_sample", "num_return_sequences", "samples", "seed", "temperature"} & further.keys()):
        raise ValueError(
            f"generation_kwargs: expected it without {own[0]!r}; answers are sampled, num_generations of them at the config's "
            "temperature, with a seed for each batch"
        )
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    chosen = {name: getattr(args, name) for name in names} | {"max_new_tokens": args.max_completion_length} | further
    return {name: value for name, value in chosen.items() if value is not None}


def _padded(rows: list[torch.Tensor], width: int) -> torch.Tensor:
    rows = pad_sequence(rows, batch_first=True)
    return nn.functional.pad(rows, (0, width - rows.shape[1]))


def _dataset(name: str, rows):
    """Rows as TRL takes them: a datasets.Dataset. The values of a list's rows stay as they are, which they do not in Arrow:
    there all dicts of a column get the same keys, and a column one type."""
    if rows is None or isinstance(rows, (Dataset, IterableDataset)):
        return rows
    if isinstance(rows, dict):
        return {key: _dataset(f"{name}[{key!r}]", part) for key, part in rows.items()}
    rows = [{"question": row} if isinstance(row, str) else row for row in rows]
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"{name}[{i}]: expected an object or a string, got {type(row).__name__}")
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return Dataset.from_dict({"row": list(range(len(rows)))}).with_transform(partial(_values, rows, columns))


def _values(rows: list[dict], columns: list[str], batch: dict) -> dict[str, list]:
    return {column: [rows[i].get(column) for i in batch["row"]] for column in columns}


@contextlib.contextmanager
def _as_pretrained(system: MultiAgentSystem):
    """Inside, the system has what TRL reads from a transformers model."""
    model = system.model
    shown = {
        "config": copy.deepcopy(model.config), "generation_config": copy.deepcopy(model.generation_config),
        "add_model_tags": lambda tags: None, "is_gradient_checkpointing": False,
    }  # fmt: skip
    vars(system).update(shown)
    try:
        yield
    finally:
        for name in shown:
            vars(system).pop(name, None)
