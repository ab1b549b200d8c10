"""psannlm schema: the JSON Schema of a configuration or plan file, for editors."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from psannlm.commands.options import print_json


def schema(
    kind: Annotated[
        Literal["config", "plan"],
        typer.Argument(metavar="config|plan", help="File that the schema describes: of train, or of compare."),
    ],
) -> None:
    """Print the JSON Schema of a configuration or plan file, for editors."""
    if kind == "config":
        from psannlm.config.schema import config_schema

        print_json(config_schema())
    else:
        from psannlm.experiments.plan_schema import plan_schema

        print_json(plan_schema())
