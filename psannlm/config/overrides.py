"""Overrides ``section.key=value`` of configuration values, and the origin of each value for error messages."""

from __future__ import annotations

from collections.abc import Iterable

from psannlm.config.validation import SECTIONS, ConfigIssue, dotted, present_path, unknown_section
from psannlm.config.yaml_loader import KeyPath, parse_yaml
from psannlm.errors import ConfigError, Problem


class Origin:
    """Origin of each value: a line of the file, or an override."""

    def __init__(self, lines: dict[KeyPath, int]) -> None:
        # A value under a former key is reported under the present one.
        self._lines = {present_path(path): line for path, line in lines.items()} | lines
        self._overrides: dict[KeyPath, str] = {}

    def override(self, path: KeyPath, text: str) -> None:
        """Record that the value at ``path`` comes from the override ``text``."""
        self._lines = {known: line for known, line in self._lines.items() if known[: len(path)] != path}
        self._overrides[path] = text

    def problems(self, issues: Iterable[ConfigIssue]) -> list[Problem]:
        """Return the issues as problems with their lines, in the order of the file; overrides come last."""
        problems = [self._problem(issue) for issue in issues]
        return sorted(problems, key=lambda problem: (problem.line is None, problem.line or 0))

    def _problem(self, issue: ConfigIssue) -> Problem:
        path, name = issue.path, dotted(issue.path)
        if path and path not in self._lines and path not in self._overrides:
            # A group that exists only because of an override.
            for place, origin in self._overrides.items():
                if place[: len(path)] == path:
                    return Problem(name, f"{issue.message} (from the override {origin!r})")
        for end in range(len(path), 0, -1):
            if text := self._overrides.get(path[:end]):
                return Problem(name, f"{issue.message} (from the override {text!r})")
            if line := self._lines.get(path[:end]):
                return Problem(name, issue.message, line)
        return Problem(name, issue.message)


def apply_override(tree: dict[str, object], text: str, origin: Origin) -> list[ConfigIssue]:
    """Set one key of ``tree`` to the value in ``text``, and return the issues of ``text`` itself.

    The key need not exist: groups on the way to it are made. Whether it is known is for the validation to say.
    """
    key, equals, value_text = text.partition("=")
    parts = tuple(part.strip() for part in key.split("."))
    if not equals or not all(parts):
        return [ConfigIssue((), f"override {text!r}: write section.key=value, such as train.lr=3e-4")]
    if len(parts) == 1:
        hint = unknown_section(parts[0]).message if parts[0] not in SECTIONS else "name a key in it"
        return [ConfigIssue((), f"override {text!r}: write section.key=value, such as train.lr=3e-4; {hint}")]
    try:
        parsed = parse_yaml(value_text)
    except ConfigError as error:
        return [ConfigIssue((), f"override {text!r}: {error}; quote the value if it is meant as text")]
    if parsed.faults:
        return [
            ConfigIssue((), f"override {text!r}: {dotted((*parts, *place))}: {why}") for place, why in parsed.faults
        ]
    path = present_path(parts)
    group = tree
    for part in map(str, path[:-1]):
        inner = group.get(part)
        if inner is not None and not isinstance(inner, dict) and group is tree:
            # A section that is not a group is reported elsewhere; the override cannot be applied.
            return []
        if not isinstance(inner, dict):
            inner = group[part] = {}
        group = inner
    group[str(path[-1])] = parsed.value
    origin.override(path, text)
    return []
