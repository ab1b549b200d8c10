"""psannlm train: train a model from a YAML configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from psannlm.commands.options import (
    DEFAULT_RUNS,
    JsonOption,
    duration_s,
    figures_table,
    keep_record,
    live_line,
    print_json,
    print_path,
    stderr_console,
    stdout_console,
)
from psannlm.display import shell_argument
from psannlm.errors import EXIT_OK, AlreadyReported
from psannlm.runtime.streams import write_output

if TYPE_CHECKING:
    from psannlm.training.callbacks import TrainResult
    from psannlm.training.plan import TrainingPlan


ConfigArgument = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="YAML file with the sections model, data and train.")
]
OverridesOption = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override one configuration key, such as train.lr=3e-4."),
]
ResumeOption = Annotated[
    str,
    typer.Option(
        help="Checkpoint to resume from: auto, the latest valid one of the run folder; never, start from scratch "
        "(an existing run folder is renamed); or the path of a checkpoint."
    ),
]
MaxStepsOption = Annotated[int | None, typer.Option(help="Number of the last step; overrides train.max_steps.", min=1)]
TimeBudgetOption = Annotated[
    float | None,
    typer.Option(
        metavar="DURATION",
        parser=duration_s,
        help="Time limit, such as 90s, 20m or 1h30m (default none): the current step is finished and saved; "
        "the same command resumes.",
    ),
]
NRanksOption = Annotated[
    int | None,
    typer.Option("--nproc", metavar="N", help="Number of training processes on this machine, one per GPU (default 1)."),
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Print the resolved configuration, sizes and memory without training.")
]


def train(
    context: typer.Context,
    config: ConfigArgument,
    overrides: OverridesOption = None,
    resume: ResumeOption = "auto",
    out: Annotated[Path | None, typer.Option("--out", help="Run folder; overrides train.checkpoint_dir.")] = None,
    max_steps: MaxStepsOption = None,
    time_budget: TimeBudgetOption = None,
    n_ranks: NRanksOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train a model from a YAML configuration."""
    from psannlm.config.run import load_config, plan_mesh, to_yaml

    if out is not None:
        # A JSON string is one in YAML too, whatever characters the path holds.
        overrides = [*(overrides or []), f"train.checkpoint_dir={json.dumps(str(out), ensure_ascii=False)}"]
    if max_steps is not None:
        overrides = [*(overrides or []), f"train.max_steps={max_steps}"]
    run_config = load_config(config, overrides or [])
    if n_ranks is not None:
        from psannlm.runtime.launch import check_launch

        check_launch(n_ranks, run_config.train.device)
        if n_ranks > 1:
            plan_mesh(run_config.train, n_ranks, n_ranks)  # once, here: else every rank prints its error
    if run_config.train.init_from is not None:
        from psannlm.training.initial import with_parent_model

        # Once, here: ranks get a configuration with all keys, which must all agree with the parent's.
        run_config = with_parent_model(run_config, resume)
    if dry_run:
        from psannlm.training.plan import plan_training

        with live_line(stderr_console()) as line:
            plan = plan_training(run_config, n_ranks=n_ranks, on_progress=line.show)
        if as_json:
            print_json(plan.as_dict())
        else:
            write_output(to_yaml(plan.config) + "\n")
            _show_plan(plan)
        return

    if n_ranks is not None and n_ranks > 1:
        from psannlm.runtime.launch import launch

        options = [f"--resume={resume}", *(["--json"] if as_json else [])]
        if time_budget is not None:
            options.append(f"--time-budget={max(time_budget, 0.001):.3f}s")
        code = launch(run_config, n_ranks, options, debug="--debug" in context.obj)
        if code != EXIT_OK:
            raise AlreadyReported("a rank has printed its error", code)
        return

    from psannlm.generation.generate import draw_samples
    from psannlm.runtime.distributed import world_from_env
    from psannlm.runtime.malloc import retain_freed_memory
    from psannlm.training.run import train as run_training

    retain_freed_memory()
    result = run_training(
        run_config,
        resume=resume,
        console=stderr_console(),
        sampler=draw_samples,
        time_budget_s=time_budget,
    )
    if not world_from_env(run_config.train.ddp, run_config.train.fsdp).is_main:
        return
    table = figures_table("training", _result_rows(result))
    keep_record(result.folder, "train", result.as_dict(), table)
    if as_json:
        print_json(result.as_dict())
    else:
        _show_result(result, table)


def _show_plan(plan: TrainingPlan) -> None:
    rows = [(f"parameters: {group}", f"{count:,}") for group, count in plan.parameters.items()]
    rows += [
        ("parameters: all", f"{plan.n_parameters:,}"),
        ("training FLOPs per token", f"{plan.flops_per_token:,}"),
        ("training windows", f"{plan.n_windows:,} of {plan.batches.seq_len} tokens"),
        ("micro-batch", f"{plan.batches.micro_batch_size} windows, {plan.batches.tokens_per_micro_batch:,} tokens"),
        ("tokens per step", f"{plan.batches.tokens_per_step:,}"),
        ("steps", f"{plan.n_steps:,} ({plan.steps_per_epoch:,} per epoch)"),
        ("precision", plan.precision),
    ]
    rows += [(f"memory: {part}", f"{n_bytes / 1e6:,.1f} MB") for part, n_bytes in plan.memory.items()]
    rows.append(("disk per checkpoint", f"{plan.checkpoint_bytes / 1e6:,.1f} MB"))
    stdout_console().print(figures_table("plan", rows))


def _describe_epochs(epochs: float) -> str:
    """Return in words how much of the training text was read."""
    whole = int(epochs)
    if whole == 0:
        return f"{epochs:.1%} of the training text, once"
    times = "once" if whole == 1 else f"{whole:,} times"
    rest = f", and {epochs - whole:.1%} of it once more" if epochs - whole >= 0.0005 else ""
    return f"all of the training text {times}{rest}"


def _result_rows(result: TrainResult) -> list[tuple[str, str]]:
    from psannlm.tokenizers.roundtrip import LOSSY

    spent = "" if result.steps == result.total_steps else f" of {result.total_steps:,}: the time budget is spent"
    rows = [
        ("parameters", f"{result.parameters:,}"),
        ("steps", f"{result.steps:,}{spent}"),
        ("epochs", f"{result.epochs:.3g}: {_describe_epochs(result.epochs)}"),
        ("tokens", f"{result.tokens:,}"),
    ]
    if result.skipped:
        rows.append(("steps skipped, not finite", f"{result.skipped:,}; see metrics.jsonl"))
    if result.seconds >= 1:
        rows.append(("time since start or resume", f"{result.seconds:.0f} s, validation and checkpoints included"))
    rows.append(("training loss, last step", f"{result.train_loss:.4f} nats per token"))
    if result.best is not None:
        rows += [
            ("best validation at step", f"{result.best['step']:,}"),
            ("validation loss", f"{result.best['loss']:.4f} nats per token"),
            ("perplexity", f"{result.best['perplexity']:.2f}"),
            ("bits per byte", f"{result.best['bits_per_byte']:.4f}{LOSSY if result.lossy_tokenizer else ''}"),
        ]
    if result.ema is not None:
        rows.append(
            (
                "validation loss, EMA of the weights",
                f"{result.ema['loss']:.4f} nats per token, step {result.ema['step']:,}",
            )
        )
    if result.val_overlap:
        rows.append(
            ("held-out text also in training", f"{result.val_overlap:.1%}, verbatim: the validation loss is too low")
        )
    rows += [("run folder", str(result.folder)), ("checkpoint", str(result.checkpoint))]
    if result.curve is not None:
        rows.append(("loss curve", str(result.curve)))
    return rows


def _show_result(result: TrainResult, table: Table) -> None:
    stdout_console().print(table)
    # In its default folder, generate takes the newest run, which is this one.
    is_found = result.folder.resolve().parent == DEFAULT_RUNS.resolve()
    where = "" if is_found else f" --checkpoint {shell_argument(result.folder)}"
    print_path(f'next: psannlm generate --prompt "The "{where}', style="bold")
