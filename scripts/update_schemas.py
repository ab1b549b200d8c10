"""Rewrite the JSON Schemas in docs/reference/ from the fields of the configuration and of the plan.

Run from anywhere: ``python scripts/update_schemas.py``. ``--check`` changes nothing and fails where a schema is old.
"""

from __future__ import annotations

import sys
from pathlib import Path

from psannlm.config.schema import config_schema
from psannlm.display import json_text
from psannlm.experiments.plan_schema import plan_schema

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "reference"


def schema_files() -> dict[Path, str]:
    """Return the files and what they are to hold."""
    schemas = {"config": config_schema(), "plan": plan_schema()}
    return {FOLDER / f"{name}.schema.json": json_text(schema, indent=2) + "\n" for name, schema in schemas.items()}


def main() -> None:
    """Rewrite the files, or with ``--check`` exit with status 1 where one would change."""
    for path, content in schema_files().items():
        if "--check" not in sys.argv[1:]:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != content:
            raise SystemExit(f"{path} is old; run python scripts/update_schemas.py")


if __name__ == "__main__":
    main()
