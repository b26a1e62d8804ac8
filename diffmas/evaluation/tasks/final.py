"""Final answers of options and of programs: where they are in a text, and when they mean the same."""

import ast
import functools
import re
import textwrap

from diffmas.evaluation import sandbox
from diffmas.evaluation.mathematics import last_expression
from diffmas.evaluation.scorer import boxed, last_number, normalise

__all__ = ["LETTERS", "boxed_or_mathematics", "boxed_or_number", "code", "letter", "passes", "same_code", "same_letter"]

LETTERS = "ABCDEFGHIJ"
MOST_FENCES = 20  # that are tried as a block's end
NO_PROGRAM = (SyntaxError, ValueError, RecursionError, MemoryError)  # the last two: nested too deeply for the parser


# ---- mathematics -----------------------------------------------------------------------------------------------------


def boxed_or_number(text: str) -> str | None:
    """The contents of the last box, else the last number."""
    final = boxed(text)
    return last_number(text) if final is None else final


def boxed_or_mathematics(text: str) -> str | None:
    """The contents of the last box, else the mathematics that math-verify takes for the answer."""
    final = boxed(text)
    return last_expression(text) if final is None else final


# ---- options ---------------------------------------------------------------------------------------------------------


def _bare(text: str) -> str:
    """An option's letter or text without LaTeX's \\text{}, brackets and full stops around it."""
    return re.sub(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}", r"\1", text).strip().strip("()[]{}*.: ")


def _named(text: str, choices: list[str]) -> str | None:
    """The letter of an option that is named alone: by its letter, by both, or by its text."""
    bare = _bare(text)
    valid = LETTERS[: len(choices)]
    if match := re.fullmatch(rf"(?:option\s+)?\(?([{valid}{valid.lower()}])(?:[).:]\s*.*)?", bare, re.DOTALL | re.IGNORECASE):
        return match.group(1).upper()
    same = [a for a, choice in zip(valid, choices) if normalise(choice) == normalise(bare)]
    return same[0] if same else None


def letter(text: str, row: dict) -> str | None:
    """The letter of the option that a text ends with, None if it names none. row: with the texts of the options, "choices".

    In this order, the last one of each: a box; (B), unless "answer is B" outweighs it (`_outweighing`); "answer is B", or
    "answer is" and an option's own text; an option's own text anywhere; "option B" or ": B"; a letter alone.

    >>> letter("(A) is too hot, so the answer is (B).", {"choices": ["a stove", "a fridge"]})
    'B'
    """
    choices = row["choices"]
    valid = LETTERS[: len(choices)]
    final = boxed(text)
    if final is not None and (found := _named(final, choices)):
        return found
    answers = re.finditer(r"(?:answer|choice)(?: is|:)\s*(?:option\s+)?[*\s(\['\"]*", text, re.IGNORECASE)
    tails = [text[match.end() :] for match in reversed(list(answers))]
    if matches := re.findall(rf"\(([{valid}])\)", text):
        return _outweighing(tails, valid) or matches[-1]
    for tail in tails:
        if found := _first(tail, choices):
            return found
    if found := _last_option(text, choices):
        return found
    if matches := re.findall(rf"(?:[Oo]ption|[Cc]hoice|:)\s*\**([{valid}])\b(?!['’])", text):
        return matches[-1]
    lines = text.strip().splitlines()
    return next((found for line in (lines[-1:] + lines[:1]) if (found := _named(line, choices))), None)


def _outweighing(tails: list[str], valid: str) -> str | None:
    """The letter of a verdict, "answer is B", that counts more than the last (A) of a text; None if there is none.

    lm-eval takes the last (A). But "the answer is (B), since (A) is hot" is B, and so is "of (A) and (B), the answer is B". A
    sentence may still turn, "if the answer is (B), it burns, so (A)", and a later one may take it back.

    tails: what follows "answer is", the last one first.
    """
    for tail in tails:
        if found := _marked(tail, valid):
            later = list(re.finditer(rf"\([{valid}]\)", tail))
            between = tail[: later[-1].start()] if later else ""
            turn = r"[.!?]\W*\s|\n|\b(?:so|thus|hence|therefore|then|no|wait)\b"
            return None if re.search(turn, between, re.IGNORECASE) else found
    return None


def _marked(text: str, valid: str) -> str | None:
    """The letter that a text begins with, if it is no word of a sentence: "A fridge", "I believe"."""
    # A small letter may be an article: it counts only with a mark after it, or at the end of a line.
    capital = rf"[{valid}]\b(?!['’]\w|[ \t]+(?!because|since)\w)"
    marked = re.match(rf"{capital}|[{valid.lower()}](?=\**(?:[).:]|\s*$))", text, re.MULTILINE)
    return marked[0].upper() if marked else None


def _first(text: str, choices: list[str]) -> str | None:
    """The letter of the option that a text begins with, by its letter or its text; "A fridge" is a fridge, not option A."""
    valid = LETTERS[: len(choices)]
    if marked := _marked(text, valid):
        return marked
    lettered = re.match(rf"([{valid}])[ \t]+(?=\w)", text)
    tails = [text, text[lettered.end() :]] if lettered else [text]
    return next((found for tail in tails if (found := _first_option(tail, choices))), lettered and lettered[1])


def _first_option(text: str, choices: list[str]) -> str | None:
    """The letter of the longest option whose text stands at the beginning, articles aside; an option "C" is no text."""
    article = r"(?:(?:an?|the) )?"
    forms = {re.sub(f"^{article}", "", normalise(choice)): a for a, choice in zip(LETTERS, choices)}
    start, letters = normalise(text), set(LETTERS.lower())
    longest_first = sorted((form for form in forms if form and form not in letters), key=len, reverse=True)
    return next((forms[f] for f in longest_first if re.match(rf"{article}{re.escape(f)}(?!\w)", start)), None)


def _last_option(text: str, choices: list[str]) -> str | None:
    """The letter of the option whose text comes last; a longer option that holds a shorter one counts."""
    forms = {normalise(choice): a for a, choice in zip(LETTERS, choices) if normalise(choice)}
    longest_first = sorted(forms, key=len, reverse=True)
    pattern = "|".join(rf"(?<!\w){re.escape(form)}(?!\w)" for form in longest_first)
    found = re.findall(pattern, normalise(text)) if pattern else []
    return forms[found[-1]] if found else None


def same_letter(given: str, gold: str) -> bool:
    return given == gold


# ---- programs --------------------------------------------------------------------------------------------------------


def _parses(source: str) -> bool:
    try:
        ast.parse(source)
    except NO_PROGRAM:
        return False
    return True


def _defines(source: str, name: str) -> bool:
    return bool(re.search(rf"^\s*(?:async\s+)?def\s+{re.escape(name)}\b", source, re.MULTILINE))


def _amid_prose(text: str) -> str:
    """The longest run of lines that is a program and begins like one, empty lines aside; the text if there is none."""
    lines = text.splitlines()
    starts = [i for i, line in enumerate(lines) if re.match(r"(?:from|import|def|class|async|@)\b|@", line)]
    longest, most = text, 0
    for start in starts:
        for end in range(len(lines), start + most, -1):
            if _parses(source := "\n".join(lines[start:end])):
                if (filled := sum(map(bool, map(str.strip, lines[start:end])))) > most:
                    longest, most = source, filled
                break
    return longest


def _definitions(source: str) -> str:
    """A program without what it does besides defining: its prints, its demonstrations, its own tests."""
    kept = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign)
    try:
        return ast.unparse(ast.Module([node for node in ast.parse(source).body if isinstance(node, kept)], []))
    except NO_PROGRAM:
        return source


def _blocks(text: str) -> list[str]:
    """What stands in fences. One closes where the block is a program, which may have fences in its docstrings, or at the first
    that follows; a block in a list of steps is indented."""
    blocks, opening = [], re.compile(r"```[^\n`]*\n")
    at = 0
    while match := opening.search(text, at):
        rest = text[match.end() :]
        ends = [fence.start() for fence in re.finditer("```", rest)] or [len(rest)]
        end = next((end for end in ends[:MOST_FENCES] if _parses(textwrap.dedent(rest[:end]))), ends[0])
        blocks.append(rest[:end])
        at = match.end() + end + len("```")
    return blocks


def code(text: str, row: dict) -> str | None:
    """The program in a text: the last code block that defines row["entry_point"], else the last block, else the text itself.

    A text that defines nothing goes on where row["code_prefix"], the beginning of the function, ends. None for an empty text.
    """
    name, prefix = row.get("entry_point") or "", row.get("code_prefix") or ""
    blocks = _blocks(text)
    defining = [block if _parses(block) else textwrap.dedent(block) for block in blocks if name and _defines(block, name)]
    source = (defining or blocks or [text])[-1]
    if not source.strip():
        return None
    if name and prefix and not _defines(source, name):
        return prefix + source
    if not _parses(source):  # prose around it, a session's >>> behind it, an end that was cut off
        source = _amid_prose(source)
    # The prefix alone is a function with nothing but its docstring; its imports and helpers count.
    return (f"{prefix}\n\n" if _parses(prefix) else "") + _definitions(source)


def passes(given: str, gold: str, row: dict) -> bool:
    """Whether a program passes row["tests"], in the sandbox. The gold answer is not looked at."""
    return _verdict(given, row["tests"]).passed


@functools.lru_cache(maxsize=4096)
def _verdict(program: str, tests: str) -> sandbox.Verdict:
    return sandbox.run(f"{program}\n\n{tests}\n")


def same_code(given: str, other: str) -> bool:
    """Two programs are one vote if they are the same but for layout and comments."""
    try:
        return ast.dump(ast.parse(given)) == ast.dump(ast.parse(other))
    except NO_PROGRAM:
        return given.strip() == other.strip()
