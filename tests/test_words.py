"""The words of docs/glossary.md: code, help texts, errors and documents use the field's terms and no private ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
# Where older files, keys and options are named for those who still have them.
LEGACY_TEXT = {"docs/guides/migration.md", "docs/glossary.md"}
# What not to write, and what to write instead.
BANNED = {
    r"anew": "again, from scratch",
    r"batter(?:y|ies)": "GPU validation suite",
    r"c[ao]me to|comes to|what it came": "result, summary, total",
    r"companions?|in (?:any )?company": "batch-invariant, beside other processes",
    r"decode state": "KV cache",
    r"foret(?:ell|old)\w*": "estimate, predict",
    r"g(?:o|oes|oing|one) on|went on|take up again": "resume, continue",
    r"lean": "recompute",
    r"learnt": "learned",
    r"lifelines?": "watchdog",
    r"mishaps?": "failure",
    r"numbers? that (?:is|are) none|spoil(?:t|ed|s)?": "non-finite",
    r"rehears\w*": "dry run",
    r"rivals?": "reference model",
    r"rooms?": "package",
    r"so many": "the name of the variable",
    r"tells?|told|vouch\w*": "report, log, raise, return",
    r"trainees?": "candidate",
    r"twins?": "copy",
    r"waves?": "short convolution",
    r"yardsticks?": "baseline",
}
_ANY = re.compile(rf"(?<![\w.-])(?:{'|'.join(BANNED)})(?![\w-])", re.IGNORECASE)
# A key or option of older files in quotes: `rivals`, "is_rehearsal", ``model.wave``, --rehearse.
_QUOTED = re.compile(r"`[^`\n]*`|\"[\w.\- ]*\"|'[\w.\-]*'|--[\w-]+")


def texts() -> list[Path]:
    folders = [path for top in ("psannlm", "commands", "docs") for path in (REPOSITORY / top).rglob("*")]
    files = [path for path in folders if path.suffix in (".py", ".md", ".html") and "_build" not in path.parts]
    return sorted([*files, REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md"])


def banned_in(text: str) -> list[str]:
    """Return ``line: word`` for every banned word of ``text`` that is not a name in quotes."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        plain = _QUOTED.sub(lambda match: match[0] if " " in match[0].strip("`\"'") else "", line)
        found += [f"{number}: {match[0]}" for match in _ANY.finditer(plain)]
    return found


def test_words_are_those_of_the_glossary() -> None:
    found = {
        str(path.relative_to(REPOSITORY)): words
        for path in texts()
        if str(path.relative_to(REPOSITORY)) not in LEGACY_TEXT
        and (words := banned_in(path.read_text(encoding="utf-8")))
    }
    assert found == {}


@pytest.mark.parametrize("text", ["# the rival is slower", "Told to stop.", "waves copy", "the run goes on"])
def test_banned_words_are_found(text: str) -> None:
    assert banned_in(text)


@pytest.mark.parametrize("text", ["waveresnet", 'row["rival"]', "`model.wave` is read", "--rehearse", "wavelength"])
def test_names_of_older_files_are_allowed(text: str) -> None:
    assert banned_in(text) == []


def test_names_of_tests_have_nine_words_at_most() -> None:
    sources = (path.read_text(encoding="utf-8") for path in (REPOSITORY / "tests").rglob("test_*.py"))
    names = {name for source in sources for name in re.findall(r"^\s*def (test_\w+)", source, re.MULTILINE)}
    assert [name for name in sorted(names) if name.count("_") > 9] == []
