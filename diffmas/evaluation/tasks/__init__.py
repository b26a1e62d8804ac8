"""The published tasks: questions as rows, prompts, verdicts by meaning. `task("gsm8k")` is a `Task`, TASKS has all of them."""

from diffmas.evaluation.tasks.registry import TASKS, task
from diffmas.evaluation.tasks.task import Task

__all__ = ["TASKS", "Task", "task"]
