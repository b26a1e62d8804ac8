"""The tasks by name."""

import difflib
import functools

from diffmas.evaluation.tasks import forms
from diffmas.evaluation.tasks.facts import FACTS, Facts
from diffmas.evaluation.tasks.task import Task

__all__ = ["TASKS", "task"]

ALL = {"train": "train", "validation": "validation", "test": "test"}
TEST = {"test": "test"}

TASKS: dict[str, Task | Facts] = {
    t.name: t
    for t in (
        Task(
            "gsm8k", "math", 1319, "openai/gsm8k", {"train": "train", "test": "test"}, forms.gsm8k, "MIT", "main",
            number=True,
        ),
        Task("math500", "math", 500, "HuggingFaceH4/MATH-500", TEST, forms.mathematics, "MIT", max_new_tokens=2048),
        Task("aime24", "math", 30, "HuggingFaceH4/aime_2024", {"test": "train"}, forms.problem, "MAA", max_new_tokens=4096),
        Task("aime25", "math", 30, "math-ai/aime25", TEST, forms.problem, "MAA", max_new_tokens=4096),
        Task(
            "gpqa_diamond", "options", 198, "Idavidrein/gpqa", {"test": "train"}, forms.gpqa, "CC-BY-4.0", "gpqa_diamond",
            gated=True, max_new_tokens=2048,
        ),
        Task("openbookqa", "options", 500, "allenai/openbookqa", ALL, forms.choice, "Apache-2.0", "main"),
        # The test split has no answers: its validation split is what everybody reports.
        Task(
            "commonsenseqa", "options", 1221, "tau/commonsense_qa", {"train": "train", "test": "validation"}, forms.choice,
            "MIT",
        ),
        Task("arc_challenge", "options", 1172, "allenai/ai2_arc", ALL, forms.choice, "CC-BY-SA-4.0", "ARC-Challenge"),
        Task("arc_easy", "options", 2376, "allenai/ai2_arc", ALL, forms.choice, "CC-BY-SA-4.0", "ARC-Easy"),
        Task("humaneval", "code", 164, "openai/openai_humaneval", TEST, forms.code, "MIT", max_new_tokens=1024),
        Task("humaneval_plus", "code", 164, "evalplus/humanevalplus", TEST, forms.code, "Apache-2.0", max_new_tokens=1024),
        Task("mbpp", "code", 500, "google-research-datasets/mbpp", ALL, forms.code, "CC-BY-4.0", "full", max_new_tokens=1024),
        Task(
            "mbpp_plus", "code", 378, "evalplus/mbppplus", TEST, functools.partial(forms.code, plus=True), "Apache-2.0",
            max_new_tokens=1024,
        ),
        *FACTS,
    )
}  # fmt: skip


def task(name: str) -> Task | Facts:
    """The task of a name; raises ValueError that suggests the nearest one for another.

    >>> task("gsm8k").questions, task("humaneval").kind
    (1319, 'code')
    """
    if name not in TASKS:
        close = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"task: expected one of {sorted(TASKS)}, got {name!r}{hint}")
    return TASKS[name]
