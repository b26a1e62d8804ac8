"""Published tasks: every form of a record, what is asked, and verdicts as the reference scorers give them."""

import csv
import dataclasses
import gzip
import json
import re
from pathlib import Path

import pytest
import tiny_systems as tiny
import yaml
from typer.testing import CliRunner

from diffmas import MultiAgentSystem
from diffmas.cli import build
from diffmas.cli import main as cli
from diffmas.cli.config import Config
from diffmas.cli.plain_data import parsed
from diffmas.evaluation import Scorer, evaluate, sandbox
from diffmas.evaluation.tasks import TASKS, Task, final, task
from diffmas.training.data import Collator, check_row

GSM8K = [
    {"question": "Tom has 3 bags of 6 pens. How many pens?", "answer": "He has 3*6=<<3*6=18>>18 pens.\n#### 18"},
    {"question": "A car costs $1,000 and a bike $200. Together?", "answer": "1,000+200=$<<1000+200=1200>>1,200\n#### 1,200"},
]
MATH = {
    "problem": "What is $1/2$ of $1$?", "solution": "It is $\\boxed{\\frac{1}{2}}$.", "answer": "\\frac{1}{2}", "level": 1,
}  # fmt: skip
AIME = {"id": 60, "problem": "Find $n$.", "solution": "$\\framebox{204}$ or \\boxed{7}", "answer": "204", "url": "-"}
SUN = {"text": ["a planet", "a star", "a moon"], "label": ["A", "B", "C"]}
HUB_ARC = {"id": "1", "question": "The Sun is", "choices": SUN, "answerKey": "B"}
HUB_OPENBOOK = {"id": "1", "question_stem": "The Sun is", "choices": SUN, "answerKey": "B"}
AUTHORS = {
    "id": "1", "question": {"stem": "The Sun is", "choices": [{"text": t, "label": a} for t, a in zip(*SUN.values())]},
    "answerKey": "B",
}  # fmt: skip
ADAPTERS = {
    "instruction": "Please choose the correct answer to the question: The Sun is\n\nAnswer1: a planet Answer2: a star Answer3: "
    "a moon\n\nAnswer format: answer1/answer2/answer3", "input": "", "output": "the correct answer is answer2",
    "answer": "answer2",
}  # fmt: skip
GPQA = {
    "Question": "Which is it?", "Correct Answer": "spin 1/2", "Incorrect Answer 1": "spin 0", "Incorrect Answer 2": "spin 1",
    "Incorrect Answer 3": "spin 2", "Explanation": "-",
}  # fmt: skip
HUMANEVAL = {
    "task_id": "T/0", "prompt": 'import math\n\n\ndef root(x):\n    """The square root."""\n', "entry_point": "root",
    "canonical_solution": "    return math.sqrt(x)\n", "test": "def check(candidate):\n    assert candidate(9) == 3\n",
}  # fmt: skip
CODET = {
    "task_id": "MbppEval/2", "prompt": "def area(r):\n    '''\n    The area of a circle.\n    '''\n", "entry_point": "area",
    "canonical_solution": "  import math as m\n  return m.pi * r * r\n",
    "test": "def check(candidate):\n    assert math.isclose(area(1), 3.14159, rel_tol=0.001)\n",
}  # fmt: skip
MBPP = {
    "task_id": 2, "text": "Write a function to add two numbers.",
    "code": "def one():\r\n  return 1\r\ndef add(a, b):\r\n  return a + b",
    "test_list": ["assert add(1, 2) == 3", "assert add(0, 0) == ZERO"], "test_setup_code": "ZERO = 0",
    "challenge_test_list": [],
}  # fmt: skip
SANITIZED = {
    "source_file": "-", "task_id": 2, "prompt": "Write a function to add.", "code": "def add(a, b):\n    return a + b",
    "test_imports": ["import math"], "test_list": ["assert math.isclose(add(1, 2), 3)"],
}  # fmt: skip
PLUS = {**SANITIZED, "test": "import math\nfor a in range(9):\n    assert add(a, 1) == a + 1\n"}


def published(path: Path, records: list[dict]) -> Path:
    """The records as a file: JSON lines, a JSON list or compressed lines, as its name says."""
    text = json.dumps(records) if path.suffix == ".json" else "".join(json.dumps(r) + "\n" for r in records)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


# ---- forms -----------------------------------------------------------------------------------------------------------

FORMS = [
    ("gsm8k", GSM8K[0], "18"), ("gsm8k", GSM8K[1], "1200"), ("math500", MATH, "\\frac{1}{2}"),
    ("math500", {"problem": "?", "solution": "Three.", "answer": "3"}, "3"), ("aime24", AIME, "204"),
    ("aime24", {"ID": "2024-I-1", "Problem": "Find $n$.", "Solution": "-", "Answer": 204}, "204"),
    ("aime25", {"problem": "Find $n$.", "answer": 70, "id": "0"}, "70"), ("arc_easy", HUB_ARC, "B"),
    ("arc_challenge", {**HUB_ARC, "choices": {**SUN, "label": ["1", "2", "3"]}, "answerKey": "2"}, "B"),
    ("openbookqa", HUB_OPENBOOK, "B"), ("openbookqa", AUTHORS, "B"), ("openbookqa", ADAPTERS, "B"),
    ("commonsenseqa", {**HUB_ARC, "question_concept": "sun"}, "B"),
]  # fmt: skip


@pytest.mark.parametrize("name, record, answer", FORMS)
def test_a_record_becomes_a_row(name, record, answer):
    row = task(name).row(record)
    assert row["answer"].rstrip(".$").endswith(f"\\boxed{{{answer}}}") and "<<" not in row["answer"]
    scorer = task(name).scorer()
    assert scorer.correct(row["answer"], row["answer"], row) and scorer.correct(f"so \\boxed{{{answer}}}", row["answer"], row)
    assert not scorer.correct("\\boxed{C}" if "choices" in row else "\\boxed{41}", row["answer"], row)
    for way in ("latent", "text", "single"):
        for agent in task(name).agents(way):
            check_row(row | {"messages": "-"}, "row", [agent])


def test_a_solution_is_trained_on_and_ends_in_the_box():
    for name, solution in (("solution", "It is $\\boxed{204}$."), ("Solution", "So \\[n = \\boxed{204}\\]")):
        assert task("aime24").row({"problem": "?", name: solution, "answer": 204})["answer"] == solution
    for name in ("aime24", "math500"):
        for solution in ("$204$.", "\\boxed{204}, as Tom says.", "\\boxed{7}"):
            answer = task(name).row({"problem": "?", "solution": solution, "answer": "204"})["answer"]
            assert answer == f"{solution}\nThe answer is \\boxed{{204}}."
    assert task("aime24").row({"problem": "?", "solution": None, "answer": 204})["answer"] == "The answer is \\boxed{204}."


def test_mbpp_plus_has_the_longer_tests_where_there_are_any():
    assert "range(9)" in task("mbpp_plus").row(PLUS)["tests"] and "range(9)" not in task("mbpp").row(PLUS)["tests"]
    assert task("mbpp_plus").row(SANITIZED) == task("mbpp").row(SANITIZED)


def test_options_stand_in_the_question():
    rows = [task("openbookqa").row(r) for r in (HUB_OPENBOOK, AUTHORS, ADAPTERS)]
    assert rows[0] == rows[1] == rows[2]
    assert rows[0]["question"] == "The Sun is\n\nA. a planet\nB. a star\nC. a moon"


def test_gpqas_options_are_in_one_order_for_all():
    rows = [task("gpqa_diamond").row({**GPQA, "Question": f"Which is it, {i}?"}) for i in range(20)]
    assert [r["choices"]["ABCD".index(final.letter(r["answer"], r))] for r in rows] == ["spin 1/2"] * 20
    assert len({r["answer"] for r in rows}) == 4 and rows[3] == task("gpqa_diamond").row(
        {**GPQA, "Question": "Which is it, 3?"}
    )


CODE = [
    ("humaneval", HUMANEVAL),
    ("humaneval_plus", HUMANEVAL),
    ("mbpp", CODET),
    ("mbpp", MBPP),
    ("mbpp", SANITIZED),
    ("mbpp_plus", PLUS),
    ("mbpp_plus", MBPP),
    ("mbpp_plus", SANITIZED),
]


@pytest.mark.parametrize("name, record", CODE, ids=lambda x: x if isinstance(x, str) else x["task_id"])
def test_a_record_of_code_becomes_a_row(name, record, programs):
    row, scorer = task(name).row(record), task(name).scorer()
    assert scorer.correct(row["answer"], row["answer"], row)
    wrong = f"```python\ndef {row['entry_point']}(*a):\n    return 99\n```"
    assert row["entry_point"] in ("root", "area", "add") and not scorer.correct(wrong, row["answer"], row)
    assert "The square root" in row["question"] or "area" in row["question"] or "assert" in row["question"]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.jsonl.gz"])
def test_files_of_records(tmp_path, name):
    path = published(tmp_path / name, GSM8K)
    assert task("gsm8k").rows(path=path) == [task("gsm8k").row(r) for r in GSM8K]
    assert len(task("gsm8k").rows(path=path, limit=1)) == 1


def test_a_hub_set(tmp_path):
    """A directory in the hub's layout, read by the package that reads the hub."""
    pytest.importorskip("datasets")
    for split in ("train", "test"):
        (tmp_path / "main").mkdir(exist_ok=True)
        published(tmp_path / "main" / f"{split}.jsonl", GSM8K if split == "train" else GSM8K[1:])
    files = "".join(f"\n  - {{split: {s}, path: main/{s}.jsonl}}" for s in ("train", "test"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n- config_name: main\n  data_files:{files}\n---\n")
    local = dataclasses.replace(task("gsm8k"), hub=str(tmp_path))
    assert local.rows("train") == [task("gsm8k").row(r) for r in GSM8K] and local.rows() == [task("gsm8k").row(GSM8K[1])]
    with pytest.raises(ValueError, match=r"gsm8k: expected one of the parts \['test', 'train'\].*got 'validation'"):
        local.rows("validation")


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, records, message",
    [
        ("gsm8k", [GSM8K[0], {"question": "a"}], r"rows.jsonl:2: gsm8k: expected the field 'answer', got \['question'\]"),
        ("gsm8k", [GSM8K[0], {**GSM8K[1], "answer": "18"}], "rows.jsonl:2: gsm8k: .*ends in '#### NUMBER', got '18'"),
        ("math500", [{"problem": "a", "solution": "b"}], "rows.jsonl:1: math500: expected the field 'answer', or a box"),
        ("aime24", [{"answer": "1"}], "rows.jsonl:1: aime24: expected the field 'problem' or 'Problem' or 'question'"),
        ("arc_easy", [{**HUB_ARC, "answerKey": "D"}], r"expected one of \['A', 'B', 'C'\] in the field 'answerKey', got 'D'"),
        ("arc_easy", [{**HUB_ARC, "choices": {"text": []}}], "expected the field 'label'"),
        ("openbookqa", [{**ADAPTERS, "answer": "answer7"}], "expected 2 to 10 options, one of them right, got 3 and number 7"),
        ("openbookqa", [{**ADAPTERS, "instruction": "?"}], "expected 'Answer1: ...' in the field 'instruction'"),
        ("humaneval", [{k: v for k, v in HUMANEVAL.items() if k != "test"}], "humaneval: expected the field 'test'"),
        ("mbpp_plus", [{**PLUS, "test": 3}], "mbpp_plus: expected a string in the field 'test', got int"),
        ("mbpp", [{"text": "a"}], "mbpp: expected the field 'code'"),
        ("gpqa_diamond", [{"Question": "a"}], "gpqa_diamond: expected the field 'Correct Answer'"),
        ("gsm8k", ["text"], "rows.jsonl:1: expected an object, got str"),
        ("gsm8k", [], "rows.jsonl: expected at least one record, got an empty data set"),
        ("gsm8k", [{"question": 3.5, "answer": "#### 1"}], "expected a string in the field 'question', got float"),
    ],
)
def test_a_record_that_does_not_fit_is_named(tmp_path, name, records, message):
    with pytest.raises(ValueError, match=message) as error:
        task(name).rows(path=published(tmp_path / "rows.jsonl", records))
    assert "\n" not in str(error.value)


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.jsonl: expected a file"):
        task("gsm8k").rows(path=tmp_path / "none.jsonl")
    (tmp_path / "a.jsonl").write_text('{"question"')
    (tmp_path / "a.json").write_text('[{"question": 1},\n{]')
    (tmp_path / "a.gz").write_bytes(b"no archive")
    for name, message in (
        ("a.jsonl", "a.jsonl:1: expected one JSON object"),
        ("a.json", "a.json:2: expected a JSON list"),
        ("a.gz", "a.gz: expected text"),
    ):
        with pytest.raises(ValueError, match=message):
            task("gsm8k").rows(path=tmp_path / name)


def test_an_unknown_task_has_a_neighbour():
    with pytest.raises(ValueError, match="task: expected one of .*got 'gsm8'; did you mean 'gsm8k'"):
        task("gsm8")
    with pytest.raises(ValueError, match="way: expected one of .*got 'magic'"):
        task("gsm8k").agents("magic")
    with pytest.raises(ValueError, match="part: expected one of .*got 'dev'"):
        task("gsm8k").rows("dev")


def test_without_datasets_and_without_access(monkeypatch):
    import sys
    import types

    class DatasetNotFoundError(FileNotFoundError): ...

    def load_dataset(hub, config, split):
        raise DatasetNotFoundError(f"Dataset '{hub}' is a gated dataset on the Hub.\nVisit the page.")

    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="openai/gsm8k: loading from the hub needs .* pip install datasets"):
        task("gsm8k").rows()
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(ValueError, match="Idavidrein/gpqa: this set is gated: ask for access at .*hf auth login"):
        task("gpqa_diamond").rows()
    with pytest.raises(ValueError, match="openai/gsm8k: expected the set on the hub .*got DatasetNotFoundError: Dataset"):
        task("gsm8k").rows()


# ---- agents and runs -------------------------------------------------------------------------------------------------


def test_agents_of_every_published_task():
    for chosen in (t for t in TASKS.values() if isinstance(t, Task)):
        latent, text, single = (chosen.agents(way) for way in ("latent", "text", "single"))
        assert [a.name for a in latent] == [a.name for a in text] == ["planner", "critic", "refiner", "solver"]
        assert [a.latent_steps for a in latent] == [10, 10, 10, 0] and not any(a.latent_steps for a in text + single)
        assert all("{messages}" in a.prompt for a in text[1:]) and not any("{messages}" in a.prompt for a in latent + single)
        final_form = "code block" if chosen.kind == "code" else "\\boxed{{}}"
        assert all(final_form in crew[-1].prompt for crew in (latent, text, single))
        assert [a.latent_steps for a in chosen.agents(latent_steps=3)] == [3, 3, 3, 0]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny base model whose context is long enough for the tasks' prompts."""
    path = tiny.save_base(tmp_path_factory.mktemp("base"))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4096}))
    return path


def call(*arguments, code: int = 0):
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def test_rows_train_a_system(base):
    rows = [task("gsm8k").row(r) for r in GSM8K]
    model = tiny.AutoModelForCausalLM.from_pretrained(base)
    system = MultiAgentSystem(model, tiny.tokenizer(), task("gsm8k").agents(latent_steps=1))
    batch = Collator(tiny.tokenizer())(rows)
    system(batch["questions"], batch["answers"]).loss.backward()
    assert next(model.parameters()).grad.abs().sum() > 0


def test_code_is_run_where_it_was_written():
    """A method's answers reach the sandbox through `evaluate`."""
    if sandbox.isolation() != "namespaces":
        pytest.skip("no bubblewrap, or a system without namespaces")
    rows = [task("humaneval").row(HUMANEVAL), task("mbpp").row(MBPP)]

    class Writes:
        def answer(self, questions, samples, batch_size, **_):
            from diffmas.evaluation import Answers

            return Answers(
                [[rows[0]["answer"], "    return 3\n"], ["def add(a, b):\n    return a - b", "import os; os._exit(0)"]], 4, 1.0
            )

        def loss(self, questions, answers, batch_size, seed):
            return 0.0, 1

    (result,) = evaluate({"writes": Writes()}, rows, 2, task("humaneval").scorer())
    assert result.accuracy == 0.5 and result.vote_accuracy == 0.5


def test_evaluate_needs_no_yaml(base, tmp_path):
    pytest.importorskip("math_verify")
    path = published(tmp_path / "test.jsonl", GSM8K)
    options = ("--max-new-tokens", 3, "--max-message-tokens", 2, "--latent-steps", 1, "--device", "cpu")
    result = call("evaluate", "--task", "gsm8k", "--model", base, "--path", path, "--output", tmp_path / "out", *options)
    assert "diffmas: left out, it needs --adapter" in result.output and "2 questions, 1 sample(s) each" in result.output
    lines = (tmp_path / "out" / "results.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["method", "single", "text", "latent_mas"]
    chosen = ("--limit", 1, "--samples", 2, "--methods", "single", "--temperature", 0, "--seed", 3)
    call("evaluate", "--task", "gsm8k", "--model", base, "--path", path, "--output", tmp_path / "one", *options, *chosen)
    (line,) = [json.loads(x) for x in (tmp_path / "one" / "answers.jsonl").read_text().splitlines()]
    assert list(line["given"]) == ["single"] and len(line["given"]["single"]) == 2


def test_evaluate_runs_programs(base, tmp_path, monkeypatch, programs):
    judge, judged = Scorer.verdicts, []
    monkeypatch.setattr(Scorer, "verdicts", lambda self, texts, *rest: judged.append(texts) or judge(self, texts, *rest))
    path = published(tmp_path / "HumanEval.jsonl.gz", [HUMANEVAL])
    arguments = ("evaluate", "--task", "humaneval", "--model", base, "--path", path, "--methods", "single", "--samples", 2)
    output = call(*arguments, "--max-new-tokens", 3, "--device", "cpu", "--output", tmp_path).output
    assert "single: pass@1 0.0 %, pass@2 0.0 %" in output and f"isolated by: {sandbox.isolation()}" in output
    assert len(judged) == 1  # what is shown comes from the verdicts there are
    judge = lambda self, texts, *rest: [[True, False]]  # noqa: E731
    assert "single: pass@1 50.0 %, pass@2 100.0 %" in call(*arguments, "--device", "cpu", "--output", tmp_path).output


def test_a_config_may_name_a_task(base, tmp_path):
    pytest.importorskip("math_verify")
    published(tmp_path / "gsm8k.jsonl", GSM8K)
    settings = {
        "model": str(base), "task": "gsm8k", "output_dir": "run", "lora": {"r": 2}, "data": {"train": "gsm8k.jsonl"},
        "training": {"max_steps": 1, "gradient_accumulation_steps": 2, "use_cpu": True, "disable_tqdm": True},
        "generation": {"max_new_tokens": 3}, "evaluation": {"data": "gsm8k.jsonl", "methods": ["diffmas"], "limit": 1},
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    assert "planner (T=10), critic (T=10), refiner (T=10) -> solver" in " ".join(
        call("train", tmp_path / "config.yaml").output.split()
    )
    output = call("evaluate", tmp_path / "config.yaml", "--adapter", tmp_path / "run", "--device", "cpu").output
    assert "1 questions" in output


def test_a_team_is_trained_on_the_rows_of_another_task(tmp_path):
    pytest.importorskip("math_verify")
    described = {"model": "m", "task": "aime24", "evaluation": {"data": str(published(tmp_path / "aime.jsonl", [AIME]))}}
    file = str(published(tmp_path / "gsm8k.jsonl", GSM8K))
    settings = parsed(Config, {**described, "data": {"task": "gsm8k", "train": file, "validation": file}})
    assert build.training_rows(settings) == ([task("gsm8k").row(r) for r in GSM8K],) * 2
    assert build.evaluation_rows(settings) == [task("aime24").row(AIME)]
    other = parsed(Config, {"model": "m", "task": "facts", "data": {"task": "gsm8k"}})
    scorers = [build.scorer_of(other, training) for training in (True, False)]
    assert [s.correct("18 dollars", "\\boxed{18}") for s in scorers] == [True, False]
    held_out = {"task": "facts", "limit": 6, "validation_fraction": 0.5}
    asked = parsed(Config, {"model": "m", "agents": [{"name": "a", "prompt": "{question}"}], "data": held_out})
    row = build.evaluation_rows(asked)[0]
    assert build.scorer_of(asked).correct(row["answer"].partition("Answer: ")[2], row["answer"])
    made = parsed(Config, {"model": "m", "task": "facts", "data": {"task": "facts_two", "part": "validation", "limit": 7}})
    assert build.training_rows(made) == (task("facts_two").rows("validation")[:7], None)
    assert build.evaluation_rows(made) == task("facts").rows("test")


@pytest.mark.parametrize("name", ["mbpp", "mbpp_plus"])
def test_a_team_is_not_trained_on_the_questions_of_mbpp_that_it_is_asked(name, tmp_path):
    asked = str(published(tmp_path / "asked.jsonl", [PLUS, {**CODET, "task_id": "MbppEval/602"}]))
    train = str(published(tmp_path / "train.jsonl", [{**MBPP, "task_id": n} for n in (2, 601, 602, 603, 604)]))
    described = {"model": "m", "task": name, "evaluation": {"data": asked}}
    rows, held_out = build.training_rows(
        parsed(Config, {**described, "data": {"task": "mbpp", "train": train, "limit": 2, "validation": train}})
    )
    assert [[row["mbpp"] for row in some] for some in (rows, held_out)] == [[601, 603], [601, 603, 604]]
    assert (
        task("mbpp_plus").row({**PLUS, "task_id": "Mbpp/3"})["mbpp"] == 3 and task("humaneval").row(HUMANEVAL)["mbpp"] is None
    )
    with pytest.raises(ValueError, match="data: expected questions that .* does not ask, found none in"):
        build.training_rows(parsed(Config, {**described, "data": {"task": "mbpp", "train": asked}}))
    other = {"model": "m", "task": "humaneval", "evaluation": {"data": asked}, "data": {"task": "mbpp", "train": train}}
    assert len(build.training_rows(parsed(Config, other))[0]) == 5


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"task": "humaneval_plus", "data": {"task": "humaneval", "part": "test"}},
            "data.part: expected another part than that which humaneval_plus is evaluated on",
        ),
        ({"task": "aime24", "data": {"task": "gsm8"}}, "data.task: expected one of .*did you mean 'gsm8k'?"),
        (
            {"task": "gsm8k", "data": {"task": "aime24"}},
            r"data.task: expected a part of aime24 to train on, of \['test'\], got",
        ),
        (
            {"task": "gsm8k", "data": {"part": "dev"}},
            r"data.part: expected a part of gsm8k .*of \['test', 'train'\], got 'dev'",
        ),
        ({"task": "gsm8k", "data": {"part": "test"}}, "data.part: expected another part than that which gsm8k is evaluated on"),
        (
            {"task": "gsm8k", "data": {"part": "train", "train": "f"}},
            "data.part: expected none with a file in data.train, which",
        ),
        ({"agents": [{"name": "a", "prompt": "b"}], "data": {"part": "train"}}, "data.part: expected none with no task, got"),
    ],
)
def test_rows_to_train_on_that_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        parsed(Config, {"model": "m", **settings})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "expected a config file, or --task and --model, got neither"),
        (("--task", "gsm8"), "did you mean 'gsm8k'?"),
        (("--task", "gsm8k"), "--model: expected a directory or hub name with --task gsm8k, got none"),
        (("config.yaml", "--task", "gsm8k"), "--task: expected it without a config file, got config.yaml too"),
        (("config.yaml", "--latent-steps", 3), "--latent-steps: expected it without a config file"),
        (("config.yaml", "--chat-option", "a=1"), "--chat-option: expected it without a config file"),
        (
            ("--task", "gsm8k", "--model", "m", "--adapter", "d", "--chat-option", "a=1"),
            "--chat-option: expected none with --adapter, which was trained with its own, got 'a=1'",
        ),
        (("--task", "gsm8k", "--model", "m", "--path", "none.jsonl"), "none.jsonl: expected a file of JSON lines"),
        (
            ("--task", "gsm8k", "--model", "m", "--methods", "magic"),
            "expected some of ('single', 'text', 'text_sft', 'latent_mas', 'stitch', 'c2c', 'diffmas'), got 'magic'",
        ),
    ],
)
def test_what_evaluate_refuses(arguments, message):
    pytest.importorskip("math_verify")
    output = call("evaluate", *arguments, code=1).output
    assert message in output and len(output.strip().splitlines()) == 1


def test_the_chat_template_is_given_options_without_a_yaml(tmp_path):
    """What --chat-option says is what the agents read; a model without a template is told of once, and so is a wrong option."""
    pytest.importorskip("math_verify")
    path = published(tmp_path / "test.jsonl", GSM8K)
    for name in ("plain", "chat"):
        tiny.save_base(tmp_path / name, max_position_embeddings=4096)
    chat = tiny.tokenizer()
    chat.chat_template = (
        "{% for m in messages %}{{ m.content }}{% endfor %} answer : {% if enable_thinking is false %}notes{% endif %}"
    )
    chat.save_pretrained(tmp_path / "chat")
    run = ("evaluate", "--task", "gsm8k", "--path", path, "--methods", "single", "--max-new-tokens", 2, "--device", "cpu")
    told = []
    for name, options in (("plain", ()), ("chat", ()), ("chat", ("--chat-option", "enable_thinking=false"))):
        out = tmp_path / f"{name}{len(options)}"
        told.append(call(*run, "--model", tmp_path / name, "--output", out, *options).output.count("has no chat template"))
        with (out / "results.csv").open() as file:
            (row,) = csv.DictReader(file)
        told.append(int(row["prompt_tokens"]))
    assert told[0::2] == [1, 0, 0]
    assert told[5] - told[3] == 2  # the template's word for it, in each of two prompts
    for option, message in (
        ("enable_thinkng=false", r"chat_options: expected some of \['enable_thinking'\].*got 'enable_thinkng'"),
        ("enable_thinking", "--chat-option: expected NAME=VALUE, got 'enable_thinking'"),
        ("enable_thinking=[", r"--chat-option enable_thinking: expected a value as in YAML, got '\['"),
    ):
        output = call(*run, "--model", tmp_path / "chat", "--chat-option", option, code=1).output
        assert re.search(message, output.replace("\n", " "))


def test_tasks_lists_them():
    output = call("tasks").output
    lines = output.splitlines()
    assert all(any(line.startswith(f"{name} ") for line in lines) for name in TASKS) and "gated" in output  # names are whole
    assert max(map(len, lines)) <= 80 and "CC-BY-SA-4.0" in output
    assert "openai/gsm8k, main, test" in output and "tau/commonsense_qa, validation" in output
    rows = json.loads(call("tasks", "--json").stdout)["tasks"]
    assert {"name": "arc_easy", "config": "ARC-Easy", "split": "test"}.items() <= rows[[*TASKS].index("arc_easy")].items()
