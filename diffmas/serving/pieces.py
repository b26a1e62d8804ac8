"""A text that is sent while it is written, in pieces that add up to the text."""

from collections.abc import Callable

__all__ = ["Pieces"]

UNFINISHED = "\ufffd"  # what a tokenizer makes of a character's first bytes


class Pieces:
    """text_of: the text of token ids, cut before a stop string. stop: these strings. special: the tokenizer's tokens that a
    text does not show.

        >>> pieces = Pieces(lambda ids: "".join("ab c<!"[i] for i in ids), ["<!>"])
        >>> pieces([0, 1, 2, 3, 4]), pieces([0, 1, 2, 3, 4, 5]), pieces([0, 1, 2, 3, 4, 5, 0], last=True)
        ('ab c', '', '<!a')
    """

    def __init__(self, text_of: Callable[[list[int]], str], stop=(), special=()):
        self.text_of, self.stop, self.sent = text_of, list(stop), ""
        # A stop string with a token that the text does not show: it shows too late, so as many tokens wait as it may have.
        self.behind = max((len(s) for s in stop if any(token in s for token in special)), default=0)

    def __call__(self, ids: list[int], last: bool = False) -> str:
        """What can be sent of a text that has these tokens so far; all the rest of it, if they are the last."""
        if last:
            text = self.text_of(ids)
        else:
            text = self._certain(self.text_of(ids[: len(ids) - self.behind]))
            if not text.startswith(self.sent):
                return ""
        piece = text[len(self.sent) :]
        self.sent += piece
        return piece

    def _certain(self, text: str) -> str:
        """Without an end that may change: half a character, the start of a stop string, space that punctuation may take."""
        text = text.rstrip(UNFINISHED)
        text = text[: len(text) - max(map(self._started(text), self.stop), default=0)]
        return text.rstrip()

    @staticmethod
    def _started(text: str):
        """How many of the last characters of a text are the first of a string."""
        return lambda s: next((n for n in range(min(len(s), len(text)), 0, -1) if text.endswith(s[:n])), 0)
