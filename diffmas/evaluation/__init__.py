"""Evaluation: tasks as rows of questions and answers, baselines side by side, metrics. See `diffmas.evaluation.run`."""

from diffmas.evaluation.audit import Condition, audit, communicates
from diffmas.evaluation.audit_tables import audit_rows, audit_table, plot_audit, write_audit
from diffmas.evaluation.baselines import (
    Answers,
    Latent,
    Method,
    Stitched,
    TextAgents,
    latent_mas,
    single_agent,
    stitch,
)
from diffmas.evaluation.c2c import C2C, c2c, load_c2c
from diffmas.evaluation.metrics import perplexity, wilson
from diffmas.evaluation.picture import plot
from diffmas.evaluation.run import (
    MethodsFailed,
    Result,
    evaluate,
    tables,
    write_answers,
    write_csv,
    write_entropy,
)
from diffmas.evaluation.scorer import Scorer
from diffmas.evaluation.text_sft import Writers, right_turns

__all__ = [
    "Answers", "C2C", "Condition", "Latent", "Method", "MethodsFailed", "Result", "Scorer", "Stitched", "TextAgents", "Writers",
    "audit", "audit_rows", "audit_table", "c2c", "communicates", "evaluate", "latent_mas", "load_c2c", "perplexity", "plot",
    "plot_audit", "right_turns", "single_agent", "stitch", "tables", "wilson", "write_answers", "write_audit", "write_csv",
    "write_entropy",
]  # fmt: skip
