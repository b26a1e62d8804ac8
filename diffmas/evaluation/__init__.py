"""Evaluation: tasks as rows of questions and answers, baselines side by side, metrics. See `diffmas.evaluation.run`."""

from diffmas.evaluation.baselines import Answers, Latent, Method, TextAgents, latent_mas, single_agent
from diffmas.evaluation.metrics import Scorer, perplexity, wilson
from diffmas.evaluation.run import MethodsFailed, Result, evaluate, plot, table, write_answers, write_csv

__all__ = [
    "Answers", "Latent", "Method", "MethodsFailed", "Result", "Scorer", "TextAgents", "evaluate", "latent_mas",
    "perplexity", "plot", "single_agent", "table", "wilson", "write_answers", "write_csv",
]  # fmt: skip
