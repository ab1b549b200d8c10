"""Root of the command line: exit codes, one-line errors, help without torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from psannlm import __version__
from psannlm.commands import app as root
from psannlm.display import printable


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["generate", "-h"], ["eval", "--help"]])
def test_help_loads_neither_torch_nor_numpy(arguments: list[str]) -> None:
    program = (
        "import sys\nfrom psannlm.commands.app import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit as end:\n    assert not end.code\n"
        "heavy = {'torch', 'numpy', 'matplotlib', 'sentencepiece'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Usage: psannlm" in done.stdout


def test_version_option_prints_version(psannlm) -> None:
    assert psannlm("--version").out.strip() == f"psannlm {__version__}"


@pytest.mark.parametrize(
    ("arguments", "commands"),
    [(["--debug", "generate", "train"], ["generate"]), (["train", "--help"], ["train"])],
)
def test_named_command_is_built_without_the_others(arguments: list[str], commands: list[str]) -> None:
    assert [command.name for command in root.build_app(arguments).registered_commands] == commands


@pytest.mark.parametrize("arguments", [[], ["--help"], ["--version"], ["trian"]])
def test_all_commands_are_built_where_none_is_named(arguments: list[str]) -> None:
    assert len(root.build_app(arguments).registered_commands) == len(root.build_app().registered_commands) > 10


def test_unknown_commands_and_options_exit_2(psannlm) -> None:
    assert psannlm("trian").code == 2
    assert psannlm("train", "x.yaml", "--fast").code == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["{}"],
        ["--{}"],
        ["train", "a", "{}"],
        ["train", "--{}"],
        ["train", "{}.yaml"],
        ["generate", "-p", "x", "--dtype", "{}"],
        ["report", "--since", "{}"],
        ["report", "--kind", "{}"],
        ["prep", "x", "--out", "o", "--tokenizer", "config.yaml", "--part", "{}"],
        ["tokenize", "--model", "{}", "--text", "x"],
        ["compare", "{}"],
    ],
)
def test_usage_errors_escape_control_characters(psannlm, project: Path, arguments: list[str]) -> None:
    hostile = "a\x1b[2J\x9bb\u202e"
    done = psannlm(*(argument.format(hostile) for argument in arguments))
    assert done.code in (1, 2)
    assert printable(done.err, keep="\n") == done.err
    assert "x1b[2J" in done.err


def test_unexpected_error_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    root._one_line(ValueError, ValueError("first line\nsecond"), None)
    said = capsys.readouterr().err
    assert said == "error: unexpected ValueError: first line (run again with --debug for the traceback)\n"
    root._one_line(MemoryError, MemoryError(), None)
    assert "train.batch_tokens" in capsys.readouterr().err

    root._one_line(
        RuntimeError, RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), None
    )
    assert "train.batch_tokens" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("is_debug", [False, True])
def test_traceback_requires_debug(is_debug: bool, project: Path) -> None:
    program = (
        "import psannlm.commands.generate\nfrom psannlm.commands.app import main\n"
        "def broken(*arguments, **named):\n    raise ZeroDivisionError('as it happens')\n"
        "psannlm.commands.generate.find_model_file = broken\n"
        f"main({['generate', '--prompt', 'x', *(['--debug'] if is_debug else [])]!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=project)
    assert done.returncode == 1
    assert ("Traceback" in done.stderr) == is_debug
    if not is_debug:
        assert done.stderr.startswith("error: unexpected ZeroDivisionError: as it happens")
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("rank", "said"), [(None, "error: "), ("0", "error: "), ("1", "rank 1: error: ")])
def test_configuration_error_is_printed_by_rank_0_only(
    psannlm, project: Path, monkeypatch: pytest.MonkeyPatch, rank: str | None, said: str
) -> None:
    """And says it after all where it is still there: then no other rank has that error."""
    slept: list[float] = []
    monkeypatch.setattr("psannlm.commands.app.time.sleep", slept.append)
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    done = psannlm("train", "missing.yaml")
    assert done.code == 2
    assert done.err.startswith(f"{said}missing.yaml: no such file")
    assert bool(slept) == (rank == "1")


@pytest.mark.slow
def test_torchrun_prints_configuration_error_once(project: Path) -> None:
    (project / "bad.yaml").write_text("train: {lr: fast}\n", encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", "psannlm", "train", "bad.yaml"],
        capture_output=True,
        text=True,
        cwd=project,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode != 0
    assert done.stderr.count("train.lr (line 1): 'fast' is not a number") == 1


def test_ctrl_c_before_training_exits_130(psannlm, monkeypatch: pytest.MonkeyPatch, project: Path) -> None:
    def interrupted(*arguments: object, **named: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("psannlm.commands.generate.find_model_file", interrupted)
    done = psannlm("generate", "--prompt", "x")
    assert done.code == 130
    assert done.err == "interrupted\n"


def test_broken_pipe_exits_1_silently() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-m", "psannlm", "--version"], stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert done.returncode == 1
    assert done.stderr == b""


@pytest.mark.slow
def test_every_command_has_a_help_text() -> None:
    for command in root.build_app().registered_commands:
        shown = CliRunner().invoke(root.build_app(), [str(command.name), "--help"])
        assert shown.exit_code == 0
        assert len(shown.output) > 200


def test_help_groups_commands_and_cuts_no_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = CliRunner().invoke(root.build_app(), ["--help"], prog_name="psannlm").output
    assert max(map(len, shown.splitlines())) <= 80
    assert "..." not in shown.partition("Options:")[2]
    panels: dict[str, list[str]] = {}
    for line in shown.partition("Options:")[2].splitlines():
        if line.endswith(":") and not line.startswith(" "):
            panels[line[:-1]] = []
        elif panels and (name := line[2:].split(" ")[0]):
            [*_, commands] = panels.values()
            commands.append(name)
    assert list(panels) == ["Data", "Models", "Serve", "Measure"]
    assert panels["Models"] == ["train", "generate", "eval", "export", "import"]
    assert sorted(name for names in panels.values() for name in names) == sorted(
        str(command.name) for command in root.build_app().registered_commands
    )
    flat = " ".join(shown.split())
    for command in root.build_app().registered_commands:
        sentence = " ".join((command.callback.__doc__ or "").split("\n\n")[0].split())  # type: ignore[union-attr]
        assert sentence.partition(". ")[0].rstrip(".") + "." in flat


@pytest.mark.slow
def test_forwarding_import_path_trains(psannlm, project: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "psann.lm.train.cli", "--config", "config.yaml", "--set", "train.max_steps=2"],
        capture_output=True,
        text=True,
        cwd=project,
    )
    assert done.returncode == 0, done.stderr
    assert (project / "runs" / "tiny" / "step_00000002").is_dir()


@pytest.mark.parametrize(
    ("command", "chosen", "expected"),
    [
        ("--version", {}, "1000"),
        ("generate", {}, "10000"),
        ("--version", {"GOMP_SPINCOUNT": "7"}, "7"),
        ("--version", {"OMP_WAIT_POLICY": "ACTIVE"}, None),
    ],
)
def test_openmp_spin_count_respects_environment(command: str, chosen: dict[str, str], expected: str | None) -> None:
    ours = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    environment = {name: value for name, value in os.environ.items() if name not in ours} | chosen
    program = (
        "import os, sys\nfrom psannlm.commands.app import main\n"
        f"try:\n    main(['{command}', '--help'])\nexcept SystemExit:\n    pass\n"
        f"assert os.environ.get('GOMP_SPINCOUNT') == {expected!r}\nassert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--temperature", "0,7", "'0,7' is not a number; write 0.7"),
        ("--temperature", "warm", "'warm' is not a number"),
        ("--top-k", "1,000", "'1,000' is not a whole number; write 1000"),
        ("--top-k", "1.5", "'1.5' is not a whole number"),
    ],
)
def test_number_option_error_suggests_a_value(psannlm, option: str, value: str, expected: str) -> None:
    done = psannlm("generate", "--prompt", "x", option, value)
    assert done.code == 2
    assert done.err.strip().endswith(f"Invalid value for '{option}': {expected}")


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["generate", "--prompt", "x", "--checkpoint"], "--checkpoint"),
        (["eval", "a.txt", "--checkpoint"], "--checkpoint"),
        (["bench-kv", "--checkpoint"], "--checkpoint"),
        (["export", "--out", "out"], "CHECKPOINT"),
        (["serve"], "CHECKPOINT"),
        (["bench-serve"], "CHECKPOINT"),
    ],
)
def test_missing_checkpoint_error_names_path_and_option(
    psannlm, project: Path, arguments: list[str], hint: str
) -> None:
    done = psannlm(*arguments, "runs/nope")
    assert done.code == 2
    expected = f"{hint}: no model file, checkpoint folder or run at runs/nope (looked from {project})"
    assert expected in done.err


# Each argument of every command that names a file or folder to read.
_NAMES_NOTHING = (
    ("train", "nowhere"),
    ("train", "config.yaml", "--resume", "nowhere"),
    ("generate", "--prompt", "x", "--checkpoint", "nowhere"),
    ("generate", "--prompt", "x", "--runs", "nowhere"),
    ("generate", "--prompts-file", "nowhere"),
    ("eval", "corpus.txt", "--checkpoint", "nowhere"),
    ("eval", "corpus.txt", "--runs", "nowhere"),
    ("tokenize", "nowhere"),
    ("tokenize", "--model", "nowhere", "--text", "x"),
    ("tokenize", "--model", "config.yaml", "--file", "nowhere"),
    ("prep", "corpus.txt", "--tokenizer", "nowhere", "--out", "o"),
    ("prep", "nowhere", "--merge", "--out", "o"),
    ("bench-tokenizers", "--corpus", "nowhere"),
    ("bench-tokenizers", "--corpus", "corpus.txt", "--held-out", "nowhere"),
    ("bench-tokenizers", "--model", "nowhere"),
    ("bench-kv", "--checkpoint", "nowhere"),
    ("compare", "nowhere"),
    ("gpu-validate", "--device", "cpu", "--baseline", "nowhere"),
    ("report", "--runs", "nowhere"),
    ("report", "--reports", "nowhere"),
    ("report", "--compare", "nowhere", "runs"),
)


@pytest.mark.parametrize("arguments", _NAMES_NOTHING, ids=" ".join)
def test_commands_missing_input_exits_2(psannlm, project: Path, arguments: tuple[str, ...]) -> None:
    before = sorted(project.iterdir())
    done = psannlm(*arguments)
    assert done.code == 2, done.err
    assert "nowhere" in done.err
    assert sorted(project.iterdir()) == before
