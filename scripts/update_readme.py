"""Rewrite the table of configuration keys in README.md from the fields of the configuration.

Run from anywhere: ``python scripts/update_readme.py``. ``--check`` changes nothing and fails where the table is old.
"""

from __future__ import annotations

import sys
from pathlib import Path

from psannlm.config.reference import markdown_table

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN = "<!-- config keys: begin -->"
END = "<!-- config keys: end -->"


def with_table(text: str) -> str:
    """Return the text of a README with what stands between the two markers replaced by the present table."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{README} lacks the markers {BEGIN} and {END}; put them where the table belongs")
    return f"{head}{BEGIN}\n{markdown_table()}{END}{tail}"


def main() -> None:
    """Rewrite README.md, or with ``--check`` exit with status 1 where it would change."""
    old = README.read_text(encoding="utf-8")
    new = with_table(old)
    if "--check" in sys.argv[1:]:
        if new != old:
            raise SystemExit("README.md has an old table of configuration keys; run python scripts/update_readme.py")
    else:
        README.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
