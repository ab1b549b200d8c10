"""psannlm init: a commented configuration and plan for the user's text and machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from psannlm.commands.options import ErrorsOption, JsonOption, TextKeyOption, print_json, print_path

if TYPE_CHECKING:
    from psannlm.scaffold.files import Project
    from psannlm.scaffold.survey import TextSurvey


def init(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder to write to; made if missing. Default: the working folder.")
    ] = Path(),
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            metavar="PATH",
            help="Text to train on: a file, folder, glob or URL, or a folder made by psannlm prep; may be repeated. "
            "Default: the language reference that comes with Python.",
        ),
    ] = None,
    size: Annotated[
        Literal["tiny", "small", "gpu"],
        typer.Option("--size", help="tiny trains in about a minute on a CPU, small in minutes, gpu on a GPU."),
    ] = "tiny",
    base: Annotated[
        Literal["respsann", "waveresnet", "transformer"],
        typer.Option("--base", help="Network; plan.yaml compares it with the plain transformer."),
    ] = "waveresnet",
    text_key: TextKeyOption = "text",
    errors: ErrorsOption = "strict",
    as_json: JsonOption = False,
) -> None:
    """Write a configuration and a plan that fit your text and machine, and name the next commands."""
    from psannlm.commands.options import naming_options
    from psannlm.config.schema import config_schema
    from psannlm.experiments.plan_schema import plan_schema
    from psannlm.scaffold.choice import choose
    from psannlm.scaffold.files import refuse_existing, write_project
    from psannlm.scaffold.survey import sources_of, survey_machine, survey_text

    schemas = {"config": config_schema(), "plan": plan_schema()}
    refuse_existing(folder, schemas)
    with naming_options("data"):
        sources = sources_of(data or [], text_key=text_key, errors=errors)
    text = survey_text(sources)
    machine = survey_machine(with_gpu=size == "gpu")
    project = write_project(folder, text, machine, choose(text, machine, size, base), schemas)
    if as_json:
        print_json({"files": [str(path) for path in project.files], "next": list(project.commands)})
    else:
        _show(project, text)


def _show(project: Project, text: TextSurvey) -> None:
    from psannlm.scaffold.files import describe_text

    which = "the language reference that comes with Python (name your own text with --data)"
    print_path(f"text: {which + ', ' if text.is_builtin else ''}{describe_text(text)}")
    for path in project.files:
        print_path(f"wrote {path}")
    print_path("next:")
    for command in project.commands:
        print_path(f"  {command}", style="bold")
