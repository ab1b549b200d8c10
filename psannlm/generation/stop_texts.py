"""Stop texts: end a completion before the first of several texts, wherever token boundaries fall."""

from __future__ import annotations

from collections.abc import Iterable

from psannlm.errors import GenerationError

MAX_STOP_TEXTS = 4
MAX_STOP_CHARACTERS = 1000


def require_stop_texts(stop: str | Iterable[str]) -> tuple[str, ...]:
    """Return the stop texts; one string is one stop text.

    Raises:
        GenerationError: there are more than ``MAX_STOP_TEXTS``, or one is not a string, empty or longer than
            ``MAX_STOP_CHARACTERS``.
    """
    if not isinstance(stop, Iterable):
        raise GenerationError(f"stop {stop!r:.60} is not a string or a list of strings")
    texts = (stop,) if isinstance(stop, str) else tuple(stop)
    if len(texts) > MAX_STOP_TEXTS:
        raise GenerationError(f"{len(texts)} stop texts are too many; give {MAX_STOP_TEXTS} at most")
    for text in texts:
        if not isinstance(text, str):
            raise GenerationError(f"stop text {text!r:.60} is not a string")
        if not 1 <= len(text) <= MAX_STOP_CHARACTERS:
            raise GenerationError(
                f"a stop text has {len(text):,} characters; it must have 1 to {MAX_STOP_CHARACTERS:,} of them"
            )
    return texts


class StopScanner:
    """Scanner of one completion's text for stop texts, whatever parts the text arrives in.

    The stop text that is complete first ends the completion, and of several that are complete with the same character
    the longest: the result is that of adding one character at a time.

    Args:
        stops: the stop texts; with none, every part is returned as it comes.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""
        self.found: str | None = None
        """The stop text that ended the completion."""

    def add(self, part: str) -> str:
        """Append ``part`` and return the text that cannot belong to a stop text, often none.

        Once ``found`` is set, everything before the stop text has been returned.
        """
        text = self._held + part
        places = [(text.find(stop), stop) for stop in self._stops]
        ends = [(start + len(stop), start, stop) for start, stop in places if start >= 0]
        if ends:
            _, start, self.found = min(ends)
            self._held = ""
            return text[:start]
        n_held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - n_held :]
        return text[: len(text) - n_held]


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of ``text`` that begins ``stop``, shorter than ``stop``."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
