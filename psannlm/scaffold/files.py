"""The files of a new project: a commented configuration, a plan of a comparison, the schemas of both for editors."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from psannlm.config.data import BuiltinSource
from psannlm.config.model import BaseName
from psannlm.display import json_text, printable, shell_command, yaml_scalar
from psannlm.errors import StorageError
from psannlm.io.atomic import is_plain_file, is_plain_folder, read_small, write_text
from psannlm.scaffold.choice import Choice
from psannlm.scaffold.survey import Machine, TextSurvey

CONFIG_FILE, PLAN_FILE, SCHEMA_FOLDER = "config.yaml", "plan.yaml", "schemas"
_MOST_SCHEMA_BYTES = 1 << 20
# Of a run folder: no letters that a shell or another file system reads as something else.
_UNSAFE = re.compile(r"[^A-Za-z0-9._+-]+")
_LONGEST_NAME = 40
_SWIGLU = "the strongest of the common feed-forwards"
_BASES: dict[BaseName, str] = {
    "waveresnet": "sine-gated feed-forwards and short causal convolutions",
    "respsann": "sine-gated feed-forwards",
    "transformer": "a plain transformer, the baseline of every comparison",
}


@dataclass(frozen=True)
class Project:
    """The files that were written, and the commands to run next, each ready for a shell."""

    folder: Path
    files: tuple[Path, ...]
    commands: tuple[str, ...]


def write_project(
    folder: Path, text: TextSurvey, machine: Machine, choice: Choice, schemas: Mapping[str, Mapping[str, Any]]
) -> Project:
    """Write ``config.yaml``, ``plan.yaml`` and their schemas into ``folder``, which is made where it is missing.

    Args:
        schemas: the JSON Schemas of ``config`` and ``plan``.

    Raises:
        StorageError: a file is there already (nothing is written then), or the folder cannot be written.
    """
    paths = {name: folder / SCHEMA_FOLDER / f"{name}.schema.json" for name in schemas}
    refuse_existing(folder, schemas)
    name = run_name(folder, choice)
    contents = {paths[kind]: json_text(schema, indent=2) + "\n" for kind, schema in schemas.items()}
    contents[folder / PLAN_FILE] = plan_yaml(choice, name)
    contents[folder / CONFIG_FILE] = config_yaml(text, machine, choice, f"runs/{name}")
    for path, content in contents.items():
        write_text(path, content)
    return Project(folder, tuple(reversed(contents)), next_commands(folder, name))


def refuse_existing(folder: Path, schemas: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise StorageError where a file or folder is in the way; schemas that psannlm wrote are replaced."""
    if os.path.lexists(folder) and not folder.is_dir():
        raise StorageError(f"{folder} is not a folder; name another one: psannlm init DIR")
    in_way = [path for path in (folder / CONFIG_FILE, folder / PLAN_FILE) if os.path.lexists(path)]
    below = folder / SCHEMA_FOLDER
    if os.path.lexists(below) and not is_plain_folder(below):
        in_way.append(below)
    else:
        for kind, schema in schemas.items():
            path = below / f"{kind}.schema.json"
            if os.path.lexists(path) and not _is_schema(path, schema):
                in_way.append(path)
    if in_way:
        names = " and ".join(map(str, in_way))
        verb = "exists" if len(in_way) == 1 else "exist"
        raise StorageError(
            f"{names} {verb}, and psannlm init overwrites nothing. Move or rename what is there, or name another "
            "folder: psannlm init DIR"
        )


def _is_schema(path: Path, schema: Mapping[str, Any]) -> bool:
    """Return whether a file is a schema that psannlm wrote, of this version or another."""
    if not is_plain_file(path):
        return False
    try:
        found = json.loads(read_small(path, _MOST_SCHEMA_BYTES) or b"null")
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and all(found.get(key) == schema[key] for key in ("$schema", "title"))


def run_name(folder: Path, choice: Choice) -> str:
    """Return a name for the runs: that of the folder, or of base and size in the working folder."""
    name = _UNSAFE.sub("_", "" if folder == Path() else folder.resolve().name)[:_LONGEST_NAME].strip("._+-")
    return name or f"{choice.base}_{choice.size}"


def next_commands(folder: Path, name: str) -> tuple[str, ...]:
    """Return what to run after ``init``: train, generate from the result, compare with the baseline."""
    return (
        shell_command("psannlm", "train", _as_argument(folder / CONFIG_FILE)),
        shell_command("psannlm", "generate", "--checkpoint", f"runs/{name}", "--prompt", "The "),
        shell_command("psannlm", "compare", _as_argument(folder / PLAN_FILE)),
    )


def _as_argument(path: Path) -> str:
    # A relative path that begins with a dash would be read as an option.
    return f"./{path}" if str(path).startswith("-") else str(path)


def config_yaml(text: TextSurvey, machine: Machine, choice: Choice, run_folder: str) -> str:
    """Return the configuration as YAML, with the reason of each value in a comment."""
    lines = [
        _schema_line("config"),
        f"# {choice.base}, size {choice.size} ({choice.what}), for {describe_text(text)} and {describe(machine)}.",
        "# `psannlm schema config` lists every key. Relative paths start at the folder that psannlm runs in.",
        "model:",
        *_rows(_model_rows(choice)),
        "",
        "data:",
        "  sources:",
        *_source_lines(text),
        *_rows(_data_rows(text, choice)),
        "",
        "train:",
        *_rows(_train_rows(machine, choice, run_folder)),
    ]
    return "\n".join(lines) + "\n"


def plan_yaml(choice: Choice, name: str) -> str:
    """Return a plan that compares the base with the plain transformer (the baseline itself: with waveresnet)."""
    # In the study of 1M parameters a plain transformer was best at 8e-3, waveresnet at twice that (docs/research).
    rates = (choice.lr, 2 * choice.lr) if choice.size == "gpu" else (choice.lr / 2, choice.lr)
    is_baseline = choice.base == "transformer"
    ours: BaseName = "waveresnet" if is_baseline else choice.base
    transformer = f"  transformer:\n    model: {{base: transformer, mlp: swiglu}} # {_SWIGLU}"
    variants = (
        ["  transformer: {}", f"  {ours}:\n    model: {{base: {ours}, mlp: null}} # null: the base's own feed-forward"]
        if is_baseline
        else [transformer, f"  {ours}: {{}}"]
    )
    lines = [
        _schema_line("plan"),
        f"# Is {ours} better than a plain transformer of the same size on this text? `--dry-run` shows what it takes.",
        f"base: {CONFIG_FILE} # beside this file",
        f"name: {name}_study # the runs are in runs/{name}_study",
        "budget:",
        f"  tokens: {choice.budget_tokens} # of each run: as many as {CONFIG_FILE} trains on",
        "seeds: [1, 2, 3] # one seed shows no difference smaller than what two seeds differ by",
        f"learning_rates: [{', '.join(f'{rate:g}' for rate in rates)}] # each variant at its own best of these",
        "lr_seeds: [1] # one seed chooses the learning rate, the others train at it",
        "baseline: transformer",
        "parameters: equal # model.d_mlp is chosen so that the variants are within 1 % of each other",
        "measure: best # validation loss of the best checkpoint, which generate takes",
        "",
        "variants:",
        *variants,
    ]
    return "\n".join(lines) + "\n"


def describe_text(text: TextSurvey) -> str:
    """Return how much text there is."""
    about = "about " if text.is_estimate else ""
    documents = f"{text.n_documents:,} document{'' if text.n_documents == 1 else 's'}"
    return f"{about}{_size(text.n_bytes)} of text in {documents}"


def describe(machine: Machine) -> str:
    """Return what trains."""
    cores = f"{machine.n_cores} core{'' if machine.n_cores == 1 else 's'}"
    if machine.gpu is None or machine.gpu_bytes is None:
        return cores
    return f"{printable(machine.gpu)} ({machine.gpu_bytes / 2**30:.0f} GiB)"


def _size(n_bytes: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 1000)):
        if n_bytes >= size:
            return f"{n_bytes / size:.3g} {unit}"
    return f"{n_bytes} bytes"


def _schema_line(kind: str) -> str:
    return f"# yaml-language-server: $schema={SCHEMA_FOLDER}/{kind}.schema.json"


# Key, value as YAML, comment or "".
_Row = tuple[str, object, str]


def _rows(rows: Sequence[_Row]) -> Iterator[str]:
    for key, value, comment in rows:
        yield f"  {key}: {value}" + (f" # {comment}" if comment else "")


def _model_rows(choice: Choice) -> list[_Row]:
    rows: list[_Row] = [
        ("base", choice.base, _BASES[choice.base]),
        *([("mlp", "swiglu", _SWIGLU)] if choice.base == "transformer" else []),
        ("d_model", choice.d_model, ""),
        ("n_layers", choice.n_layers, ""),
        ("n_heads", choice.n_heads, f"heads of {choice.d_model // choice.n_heads} features"),
    ]
    if choice.is_small_text:
        rows.append(("dropout", 0.1, "the text is read several times: without it the model learns it by heart"))
    if choice.size != "gpu":
        rows.append(("tie_embeddings", "true", "of a small model, an output matrix of its own would be a large part"))
    return rows


def _source_lines(text: TextSurvey) -> Iterator[str]:
    for source in text.sources:
        if isinstance(source, BuiltinSource):
            yield f"    - builtin: {source.builtin} # the language reference of Python: nothing to download"
            continue
        is_folder = text.manifest is not None
        yield f"    - path: {yaml_scalar(source.path)}" + (" # made by psannlm prep" if is_folder else "")
        if text.has_plain_text:
            yield "      # per_line: true # for .txt with one document per line; without it each file is one document"
        if source.text_key != "text":
            yield f"      text_key: {yaml_scalar(source.text_key)}"
        if source.errors != "strict":
            yield f"      errors: {source.errors} # put U+FFFD for bytes that are not UTF-8"


def _data_rows(text: TextSurvey, choice: Choice) -> list[_Row]:
    length: _Row = ("max_length", choice.max_length, "tokens that the model sees at once")
    if choice.vocab_size is None:
        return [length]
    return [
        ("vocab_size", choice.vocab_size, f"{_size(text.n_bytes)} of text show each entry often enough to learn it"),
        length,
        ("val_split", f"{choice.val_split:g}", _held_out(text, choice.val_split)),
    ]


def _held_out(text: TextSurvey, val_split: float) -> str:
    if text.n_documents == 1:
        return f"the last {val_split:.0%} of the text is never trained on"
    few = ", at least one of them" if text.n_documents * val_split < 2 else ""
    return f"{val_split:.0%} of the documents{few}, never trained on"


def _train_rows(machine: Machine, choice: Choice, run_folder: str) -> list[_Row]:
    windows = choice.batch_tokens // choice.max_length
    rows: list[_Row] = [
        ("max_steps", choice.max_steps, _passes(choice)),
        ("batch_tokens", choice.batch_tokens, _batch(machine, choice, windows)),
    ]
    if choice.grad_accum_steps > 1:
        rows.append(("grad_accum_steps", choice.grad_accum_steps, f"{choice.step_tokens:,} tokens in a step"))
    rows += [
        ("optimizer", "muon", "learns more per step than AdamW on matrices of this size"),
        ("lr", f"{choice.lr:g}", f"{PLAN_FILE} tries {'twice' if choice.size == 'gpu' else 'half of'} it too"),
    ]
    if choice.size == "gpu":
        rows.append(("min_lr", f"{choice.lr / 10:g}", ""))
    rows.append(("warmup_steps", choice.warmup_steps, ""))
    if choice.is_small_text:
        rows.append(("weight_decay", 0.2, "with dropout and label smoothing, against learning the text by heart"))
        rows.append(("label_smoothing", 0.05, ""))
    rows += [
        ("amp", choice.amp, _precision(machine, choice)),
        ("eval_interval_steps", choice.eval_interval_steps, "the best checkpoint is kept, not only the last"),
    ]
    if choice.size == "gpu":
        rows.append(("save_interval_steps", choice.eval_interval_steps, "what a stop can lose"))
    rows.append(("checkpoint_dir", run_folder, "the run folder; the same command resumes a run that was stopped"))
    return rows


def _passes(choice: Choice) -> str:
    if choice.passes >= 1.5:
        return f"about {choice.passes:.0f} passes over the training text"
    return "about one pass over the training text" if choice.passes > 0.9 else f"{choice.passes:.1%} of the text, once"


def _batch(machine: Machine, choice: Choice, windows: int) -> str:
    count = f"{windows} window{'' if windows == 1 else 's'}"
    if choice.size != "gpu":
        return f"{count} per step"
    if machine.gpu is None:
        return f"{count} per GPU; no GPU was found here, so this fits one of 24 GiB"
    return f"{count} per GPU; halve it if memory runs out, and double grad_accum_steps"


def _precision(machine: Machine, choice: Choice) -> str:
    device = "GPU" if choice.size == "gpu" else "CPU"
    if choice.amp == "fp16":
        return "this GPU has no bf16 hardware"
    if machine.has_bf16 is None:
        return "bf16 where the device computes in it, else fp32"
    return (
        f"bf16: this {device} computes in it" if machine.has_bf16 else f"fp32 here: this {device} has no bf16 hardware"
    )
