"""griffe's extension for mkdocstrings: our docstrings as Markdown.

They say `name: what it is` of a parameter or a field, in a line with hanging indent or between other sentences. Each becomes an
item of a list.
"""

import re

import griffe

__all__ = ["Docstrings", "markdown"]


def _names(obj) -> list[str]:
    """What a docstring may explain: parameters of a function, or of a class and its fields."""
    if obj.is_function:
        return [p.name.lstrip("*") for p in obj.parameters]
    if obj.is_class:
        made = obj.members.get("__init__")
        fields = [name for name, member in obj.members.items() if member.is_attribute]
        return fields + ([p.name for p in made.parameters] if made is not None and made.is_function else [])
    return []


def markdown(text: str, names: list[str]) -> str:
    """A docstring's text, without its indent, as Markdown. names: that it may explain."""
    return "\n\n".join(_block(block, names) for block in re.split(r"\n{2,}", text))


def _block(block: str, names: list[str]) -> str:
    if not block.strip() or block.startswith("    "):
        return block  # code
    if block.startswith(">>>"):
        return re.sub(r"^", "    ", block, flags=re.MULTILINE)
    block = re.sub(r"(`[^`]*`)|\]\[", lambda m: m[1] or "]\\[", block)  # a shape, no reference
    out, indents = [], []  # indents: of the items that we are in
    for line in _one_a_line(block, names):
        indent, said = len(line) - len(line.lstrip()), line.strip()
        while indents and indent < indents[-1]:
            indents.pop()
        head = re.match(r"([\w.]+(?:, [\w.]+)*)(?: \[[^\]]*\])?:(?= |$)", said)
        if head and (indent or set(re.findall(r"\w+", head[1])) & set(names)):
            if not indents or indent > indents[-1]:
                indents.append(indent)
            if out and not out[-1].lstrip().startswith("- ") and len(indents) == 1 and not any(x.startswith("- ") for x in out):
                out.append("")  # a list begins
            out.append(f"{'    ' * (len(indents) - 1)}- **{head[0][:-1]}**:{said[head.end() :]}")
        elif said.startswith(("Returns ", "Raises ")) and indents:
            out, indents = [*out, "", said], []
        else:
            out.append("    " * len(indents) + said)
    return "\n".join(out)


def _one_a_line(block: str, names: list[str]):
    """The lines of a block, with a new one for each name that is explained within a sentence, and for what comes of a call."""
    either = "|".join([*map(re.escape, sorted(names, key=len, reverse=True)), r"(?!)"])
    inner = re.compile(rf"(?<=[.;:)]) (?=(?:{either})(?:, (?:{either}))*:(?: |$)|(?:Returns|Raises) [\w`])")
    base = 0
    for line in block.split("\n"):
        indent = len(line) - len(line.lstrip())
        if re.match(rf" *(?:{either})(?:, \w+)*: ", line):
            base = indent
        first, *others = inner.split(line)
        yield first
        yield from (" " * base + other for other in others)


class Docstrings(griffe.Extension):
    def on_object(self, *, obj, **kwargs) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value, _names(obj))
