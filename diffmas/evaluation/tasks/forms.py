"""Published records as rows: every form in which a set is published has its fields here.

A row has the field `question`, complete with options or tests, an `answer` to train on that ends in the final answer, and what
the matcher needs: `choices`, or `tests`, `entry_point` and `code_prefix`.
"""

import ast
import hashlib
import random
import re

from diffmas.evaluation.scorer import boxed
from diffmas.evaluation.tasks.final import LETTERS

__all__ = ["FieldMissing", "choice", "code", "gpqa", "gsm8k", "mathematics", "problem"]


class FieldMissing(ValueError):
    """A record has none of the fields that one of the published forms calls for."""


def _field(record: dict, *names: str):
    """The value of the first of these fields that is there and not None."""
    for name in names:
        if record.get(name) is not None:
            return record[name]
    wanted = " or ".join(map(repr, names))
    raise FieldMissing(f"expected the field {wanted}, got {sorted(record)}")


def _text(record: dict, *names: str) -> str:
    value = _field(record, *names)
    return (str(value) if isinstance(value, int) and not isinstance(value, bool) else _string(value, names[0])).strip()


def _string(value, name: str) -> str:
    if not isinstance(value, str):
        raise FieldMissing(f"expected a string in the field {name!r}, got {type(value).__name__}")
    return value


# ---- mathematics -----------------------------------------------------------------------------------------------------


def gsm8k(record: dict) -> dict:
    """GSM8K: {question, answer}, an answer with <<calculations>> that ends in "#### 18"."""
    solution, mark, final = _text(record, "answer").rpartition("####")
    if not mark:
        raise FieldMissing(f"expected a field 'answer' that ends in '#### NUMBER', got {final[-40:]!r}")
    steps = re.sub(r"<<[^<>]*>>", "", solution).strip()
    answer = f"The answer is \\boxed{{{final.strip().replace(',', '')}}}."
    return {"question": _text(record, "question"), "answer": f"{steps}\n{answer}" if steps else answer}


def mathematics(record: dict) -> dict:
    """MATH: {problem, solution, answer}, a solution with its answer in a box."""
    solution = _text(record, "solution")
    final = _text(record, "answer") if record.get("answer") is not None else boxed(solution)
    if final is None:
        raise FieldMissing("expected the field 'answer', or a box in the field 'solution', got neither")
    return {"question": _text(record, "problem"), "answer": _solved(solution, final)}


def problem(record: dict) -> dict:
    """AIME: {problem, answer} as Qwen2.5-Math, AReaL, math-ai and HuggingFaceH4 have it, {Problem, Answer} as Maxwell-Jia;
    some have a solution, too."""
    final = _text(record, "answer", "Answer")
    written = any(record.get(name) is not None for name in ("solution", "Solution"))
    solution = _text(record, "solution", "Solution") if written else ""
    return {"question": _text(record, "problem", "Problem", "question"), "answer": _solved(solution, final)}


def _solved(solution: str, final: str) -> str:
    """A solution that ends in the final answer's box."""
    if boxed(solution) == final and solution.rstrip(" \n.$\\])").endswith(f"{{{final}}}"):
        return solution
    return f"{solution}\nThe answer is \\boxed{{{final}}}.".lstrip()


# ---- options ---------------------------------------------------------------------------------------------------------


def _options(question: str, choices: list[str], right: int) -> dict:
    if not 2 <= len(choices) <= len(LETTERS) or not 0 <= right < len(choices):
        raise FieldMissing(
            f"expected 2 to {len(LETTERS)} options, one of them right, got {len(choices)} and number {right + 1}"
        )
    lines = "\n".join(f"{a}. {text}" for a, text in zip(LETTERS, choices))
    return {
        "question": f"{question}\n\n{lines}", "answer": f"The answer is \\boxed{{{LETTERS[right]}}}.", "choices": choices,
    }  # fmt: skip


def choice(record: dict) -> dict:
    """Multiple choice in three forms: the hub's {question or question_stem, choices: {text, label}, answerKey}, the authors'
    {question: {stem, choices: [{text, label}]}, answerKey}, and LLM-Adapters' {instruction, answer: "answer3"}."""
    if "instruction" in record:
        return _instruction(record)
    asked = _field(record, "question_stem", "question")
    stem, choices = (_text(asked, "stem"), _field(asked, "choices")) if isinstance(asked, dict) else (asked, None)
    choices = _field(record, "choices") if choices is None else choices
    if isinstance(choices, dict):
        choices = [{"text": t, "label": a} for t, a in zip(_field(choices, "text"), _field(choices, "label"))]
    labels, key = [_text(c, "label") for c in choices], _text(record, "answerKey")
    if key not in labels:
        raise FieldMissing(f"expected one of {labels} in the field 'answerKey', got {key!r}")
    return _options(_string(stem, "question").strip(), [_text(c, "text") for c in choices], labels.index(key))


def _instruction(record: dict) -> dict:
    found = re.fullmatch(
        r"(?:Please choose the correct answer to the question:)?\s*(.*?)\s*(Answer1:.*?)\s*(?:Answer format:.*)?",
        _text(record, "instruction"), re.DOTALL,
    )  # fmt: skip
    right = re.fullmatch(r"answer(\d+)", _text(record, "answer"))
    if not found or not right:
        raise FieldMissing("expected 'Answer1: ...' in the field 'instruction' and 'answerN' in the field 'answer', got others")
    choices = [text.strip() for text in re.split(r"\s*Answer\d+:\s*", found[2])[1:]]
    return _options(found[1], choices, int(right[1]) - 1)


def gpqa(record: dict) -> dict:
    """GPQA: {Question, Correct Answer, Incorrect Answer 1..3}; the order of the options follows from the question's text."""
    question = _text(record, "Question")
    right = _text(record, "Correct Answer")
    choices = [right, *(_text(record, f"Incorrect Answer {i}") for i in (1, 2, 3))]
    random.Random(hashlib.sha256(question.encode()).hexdigest()).shuffle(choices)
    return _options(question, choices, choices.index(right))


# ---- programs --------------------------------------------------------------------------------------------------------


def _whole(prefix: str, body: str) -> str:
    """A function from its beginning and its body, whose indentation CodeT's docstrings do not share."""
    try:
        ast.parse(prefix + body)
    except SyntaxError:
        if indent := re.search(r"^[ \t]+(?=[^\s#])", body, re.MULTILINE):
            prefix = re.sub(r"^    (?=\S)", lambda _: indent[0], prefix, flags=re.MULTILINE)
    return prefix + body


def code(record: dict, plus: bool = False) -> dict:
    """Programs: HumanEval's {prompt, canonical_solution, test, entry_point}, where `test` defines check(candidate), a form that
    CodeT gives MBPP too; and MBPP's {text or prompt, code, test_list}. plus: MBPP+, whose longer tests are in `test`; a record
    without it, as of MBPP's training part, has those of MBPP. A row has the question's number in MBPP as "mbpp", None if it is
    of another set."""
    if "entry_point" in record:
        prefix, name = _string(_field(record, "prompt"), "prompt"), _text(record, "entry_point")
        tests, solution = _string(_field(record, "test"), "test"), _whole(prefix, record.get("canonical_solution") or "")
        question = f"Complete this function:\n\n```python\n{prefix.rstrip()}\n```"
        # CodeT's tests, which call the function by its name, lack MBPP's only import.
        lacking = "candidate(" not in tests.replace("check(candidate)", "") and "math." in tests
        tests = ("import math\n" if lacking else "") + f"{tests}\ncheck({name})"
    else:
        prefix, solution, listed = "", _text(record, "code"), _field(record, "test_list")
        setup = [record.get("test_setup_code") or "", *(record.get("test_imports") or [])]
        called = [n for n in re.findall(r"def\s+(\w+)", solution) if re.search(rf"\b{n}\s*\(", " ".join(listed))]
        name = called[0] if called else ""
        question = f"{_text(record, 'text', 'prompt')}\n\nYour code should pass these tests:\n\n" + "\n".join(listed)
        longer = plus and record.get("test") is not None
        tests = "\n".join(filter(None, [*setup, _string(record["test"], "test") if longer else "\n".join(listed)]))
    answer = f"```python\n{solution.replace(chr(13), '').strip()}\n```"
    row = {"question": question, "answer": answer, "tests": tests, "entry_point": name, "code_prefix": prefix}
    number = re.fullmatch(r"(?:Mbpp(?:Eval)?/)?(\d+)", str(record.get("task_id")))
    return {**row, "mbpp": int(number[1]) if number else None}
