"""One commit's library under measurement, as a process: `diffmas.benchmarks.compare` starts one per commit.

Reads commands as JSON lines and answers each with one: {"prepare": key} -> {"seconds": one call, "repeats": of a sample} or
{"why": ...}; {"sample": true} -> {"seconds": ...}.
"""

import importlib
import json
import os
import sys

import torch

from diffmas.benchmarks.machine import own_stream
from diffmas.benchmarks.measure import OURS, Contest


def prepare(module: str, key: str) -> Contest:
    suite = importlib.import_module(f"diffmas.benchmarks.{module}")
    case = next(c for c in suite.CASES if c.key == key)
    torch.manual_seed(0)
    contest = Contest(suite.problem(case), {OURS: suite.PROVIDERS[OURS]}, "cuda" if torch.cuda.is_available() else "cpu")
    contest.warm_up()
    return contest


def main() -> None:
    torch.set_num_threads(int(sys.argv[1]))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    with own_stream("cuda" if torch.cuda.is_available() else "cpu"):
        serve(answers)


def serve(answers) -> None:
    contest = None
    for line in sys.stdin:
        command = json.loads(line)
        if "prepare" in command:
            contest = None  # frees the last one first
            try:
                contest = prepare(*command["prepare"])
                answer = (
                    {"why": contest.notes[OURS]} if contest.notes else {"rounds": contest.rounds(command["seconds"], 3, 25)}
                )
            except Exception as error:  # an older library may lack what the case needs
                answer = {"why": f"{type(error).__name__}: {error}".splitlines()[0]}
        else:
            answer = {"seconds": contest.sample(OURS, 0)}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
