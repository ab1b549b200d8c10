"""psannlm generate: prompts, streaming, default checkpoint and errors."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from psannlm.commands.options import LiveLine

GREEDY = ("--temperature", "0", "--max-new-tokens", "8", "--device", "cpu")


@pytest.fixture
def in_trained(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(trained)
    return trained


def test_generate_without_checkpoint_recommends_train(psannlm, project: Path) -> None:
    refused = psannlm("generate", "--prompt", "The")
    assert refused.code == 1
    assert "psannlm train" in refused.err


def test_generate_defaults_to_best_checkpoint_of_newest_run(psannlm, in_trained: Path) -> None:
    best = (in_trained / "runs" / "tiny" / "best").read_text().strip()
    done = psannlm("generate", "--prompt", "The tide", *GREEDY, "--json")
    assert done.code == 0
    assert json.loads(done.out)["checkpoint"] == f"runs/tiny/{best}"


def test_generate_streams_prompt_and_completion(psannlm, in_trained: Path) -> None:
    told = json.loads(psannlm("generate", "--prompt", "The tide", *GREEDY, "--json").out)
    streamed = psannlm("generate", "--prompt", "The tide", *GREEDY)
    assert streamed.out == "The tide" + told["completions"][0]["completion"] + "\n"


def test_generate_escapes_control_characters_on_a_terminal(
    psannlm, in_trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["generate", "-p", "a\x1b[2Jb", "--max-new-tokens", "1", "--device", "cpu", "--seed", "1"]
    assert psannlm(*arguments).out.startswith("a\x1b[2Jb"), "a file or pipe gets the text itself"
    monkeypatch.setattr("psannlm.runtime.streams.is_terminal", lambda stream: True)
    assert psannlm(*arguments).out.startswith("a\\x1b[2Jb")


def test_generate_reports_a_full_context(psannlm, in_trained: Path) -> None:
    greedy = ("--temperature", "0", "--device", "cpu", "--max-new-tokens")
    stopped = [
        row["stopped_by"]
        for row in json.loads(psannlm("generate", "-p", "The", "-p", "A tide", *greedy, "40", "--json").out)[
            "completions"
        ]
    ]
    assert stopped == ["context", "context"]
    assert (
        "for 2 of 2 prompts: the model's context of 16 tokens is full"
        in psannlm("generate", "-p", "The", "-p", "A tide", *greedy, "40").err
    )
    assert "full" not in psannlm("generate", "-p", "The", *greedy, "2").err


def test_generate_prompts_file_splits_at_line_feeds_only(psannlm, in_trained: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("A\u2028b\r\nThe\x0cc".encode())
    done = psannlm("generate", "--prompts-file", str(file), *GREEDY, "--json")
    assert [row["prompt"] for row in json.loads(done.out)["completions"]] == ["A\u2028b", "The\x0cc"]


def test_generate_batch_equals_single_prompts(psannlm, in_trained: Path, tmp_path: Path) -> None:
    prompts = ["The tide", "A", "What goes"]
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(prompts) + "\n\n", encoding="utf-8")
    sampled = ("--seed", "5", "--max-new-tokens", "8", "--device", "cpu", "--json")
    together = json.loads(psannlm("generate", "--prompts-file", str(file), *sampled).out)["completions"]
    alone = [json.loads(psannlm("generate", "--prompt", p, *sampled).out)["completions"][0] for p in prompts]
    assert [row["prompt"] for row in together] == prompts
    assert together == alone


@pytest.mark.slow
def test_generate_reads_prompts_from_file_and_stdin_alike(
    psannlm, in_trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "prompts.txt"
    for given, code, said in (
        (b"\xef\xbb\xbfThe\r\n\nSay\n", 0, ""),
        ("The\n".encode("utf-16"), 2, "is UTF-16, not UTF-8"),
        (b"The\nt\xefde\n", 2, "byte 5 is 0xEF, which is not UTF-8"),
    ):
        path.write_bytes(given)
        for name in (str(path), "-"):
            monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(given)))
            done = psannlm("generate", "--prompts-file", name, "--max-new-tokens", "1", "--json")
            assert done.code == code, done.err
            assert said in done.err
            if not code:
                assert [row["prompt"] for row in json.loads(done.out)["completions"]] == ["The", "Say"]
    monkeypatch.setattr("psannlm.data.corpus.reading.MAX_LINE_BYTES", 1 << 10)
    path.write_bytes(gzip.compress(b"The\n" + b"x" * 5000))
    refused = psannlm("generate", "--prompts-file", str(path))
    assert (refused.code, "prompts.txt:2: a line of more than" in refused.err) == (2, True)


def test_generate_without_prompt_exits_2(psannlm, in_trained: Path) -> None:
    assert psannlm("generate").code == 2


@pytest.mark.parametrize(
    ("option", "value"),
    [("--temperature", "-1"), ("--top-p", "0"), ("--top-k", "0"), ("--repetition-penalty", "0"), ("--min-p", "1.5")],
)
def test_generate_rejects_settings_out_of_range(psannlm, in_trained: Path, option: str, value: str) -> None:
    refused = psannlm("generate", "--prompt", "The", option, value)
    assert refused.code == 2
    assert value.lstrip("-") in refused.err


def test_generate_error_of_long_prompt_names_both_lengths(psannlm, in_trained: Path) -> None:
    refused = psannlm("generate", "--prompt", "x" * 40, *GREEDY)
    assert refused.code == 2
    assert refused.out == ""
    assert "41" in refused.err  # with the beginning of text
    assert "16" in refused.err


def test_generate_damaged_model_is_one_error_line(psannlm, in_trained: Path, tmp_path: Path) -> None:
    source = next((in_trained / "runs" / "tiny").glob("step_*")) / "model.safetensors"
    damaged = tmp_path / "damaged.safetensors"
    shutil.copy(source, damaged)
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 1
    damaged.write_bytes(content)
    refused = psannlm("generate", "--prompt", "The", "--checkpoint", str(damaged))
    assert refused.code == 1
    assert len(refused.err.strip().splitlines()) == 1
    assert "damaged" in refused.err


def test_generate_takes_a_run_folder_as_checkpoint(psannlm, in_trained: Path) -> None:
    best = (in_trained / "runs" / "tiny" / "best").read_text().strip()
    done = psannlm("generate", "--prompt", "The", *GREEDY, "--checkpoint", "runs/tiny", "--json")
    assert json.loads(done.out)["checkpoint"] == f"runs/tiny/{best}"


def test_generate_shows_progress_for_several_prompts_only(
    psannlm, in_trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LiveLine, "_REDRAW_S", 0.0)
    monkeypatch.setattr(LiveLine, "_PLAIN_S", 0.0)
    named = ("--checkpoint", "runs/tiny")
    done = psannlm("generate", "-p", "The", "-p", "A", *GREEDY, *named)
    lines = done.err.splitlines()
    assert lines[0].startswith("generating: 2 tokens, ")
    assert lines[1].startswith("generating: 4 tokens, ")
    assert all(" tokens/s, at most 0:00:" in line for line in lines)
    assert "generating" not in done.out
    assert psannlm("generate", "-p", "The", *GREEDY, *named).err == ""


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_generate_dtype_accepts_known_names_only(dtype: str, psannlm, in_trained: Path) -> None:
    done = psannlm("generate", "--prompt", "The tide", *GREEDY, "--dtype", dtype, "--json")
    assert done.code == 0
    assert json.loads(done.out)["completions"][0]["tokens"] > 0
    refused = psannlm("generate", "--prompt", "The", *GREEDY, "--dtype", dtype[:-1])
    assert refused.code == 2
    assert "float32" in refused.err


def test_generate_speculation_changes_no_text(psannlm, in_trained: Path) -> None:
    seeded = (
        "generate",
        "--prompt",
        "tatata",
        "--seed",
        "3",
        "--max-new-tokens",
        "8",
        "--device",
        "cpu",
    )
    plain = psannlm(*seeded)
    guessed = psannlm(*seeded, "--speculate", "4")
    assert plain.code == guessed.code == 0
    assert guessed.out == plain.out
    assert psannlm(*seeded, "--speculate", "99").code == 2


def test_generate_sliding_context_never_fills(psannlm, in_trained: Path) -> None:
    long = ("--temperature", "0", "--device", "cpu", "--max-new-tokens", "40", "--json")
    prompt = "The tide is out and the boats lie on the sand, " * 4
    refused = psannlm("generate", "--prompt", prompt, *long)
    assert refused.code == 2
    assert "189 tokens, and the model's context is 16" in refused.err
    done = psannlm("generate", "--prompt", prompt, "--context", "slide", *long)
    (row,) = json.loads(done.out)["completions"]
    assert (row["tokens"], row["finish_reason"]) == (40, "length") or row["finish_reason"] == "stop"
    assert row["tokens"] > 16 or row["finish_reason"] == "stop"


@pytest.mark.parametrize(("reason", "former"), [("stop", "end_of_text"), ("length", "length"), ("context", "context")])
def test_generate_json_keeps_the_deprecated_key(
    psannlm, in_trained: Path, monkeypatch: pytest.MonkeyPatch, reason: str, former: str
) -> None:
    from psannlm.generation.generate import Completion

    monkeypatch.setattr(
        "psannlm.generation.generate.generate",
        lambda *_, **__: [Completion([5], "a", reason)],  # type: ignore[arg-type]
    )
    done = psannlm("generate", "-p", "The", "--device", "cpu", "--json")
    (row,) = json.loads(done.out)["completions"]
    assert (row["finish_reason"], row["stopped_by"]) == (reason, former)


def test_generate_compile_without_compiler_is_refused_before_work(
    psannlm, in_trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psannlm.kernels.compiler.missing_to_compile", lambda device: "a C++ compiler (install g++)")
    refused = psannlm("generate", "--prompt", "The tide", *GREEDY, "--compile")
    assert (refused.code, refused.out) == (2, "")
    assert "--compile needs a C++ compiler (install g++), which is missing; install it, or leave it out" in refused.err


def test_generate_without_compiler_notes_it_with_same_text(
    psannlm, in_trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = psannlm("generate", "--prompt", "The tide", *GREEDY)
    monkeypatch.setattr("psannlm.generation.engine.compiler_fault", lambda device: "a C++ compiler (install g++)")
    monkeypatch.setattr("psannlm.generation.generate.COMPILE_BREAK_EVEN_STEPS", 1)
    done = psannlm("generate", "--prompt", "The tide", *GREEDY)
    assert done.out == plain.out
    assert "needs a C++ compiler" in done.err


def test_generate_stop_text_is_not_printed(psannlm, in_trained: Path) -> None:
    (whole,) = json.loads(psannlm("generate", "-p", "The tide", *GREEDY, "--json").out)["completions"]
    stop = whole["completion"][3:5]
    done = psannlm("generate", "-p", "The tide", *GREEDY, "--stop", "never there", "--stop", stop)
    before = whole["completion"][: whole["completion"].index(stop)]
    assert done.out == f"The tide{before}\n"
    (row,) = json.loads(psannlm("generate", "-p", "The tide", *GREEDY, "--stop", stop, "--json").out)["completions"]
    assert (row["completion"], row["finish_reason"], row["stop_text"]) == (before, "stop", stop)
    assert row["stopped_by"] == "stop"
    for stops, said in (
        (("--stop", ""), "a stop text has 0 characters"),
        (("--stop", "a") * 5, "5 stop texts are too many"),
    ):
        refused = psannlm("generate", "-p", "The", *GREEDY, *stops)
        assert (refused.code, refused.out) == (2, "")
        assert said in refused.err


def test_generate_json_lists_logprobs_of_each_token(psannlm, in_trained: Path) -> None:
    done = psannlm("generate", "-p", "The tide", *GREEDY, "--json", "--logprobs", "3")
    (row,) = json.loads(done.out)["completions"]
    assert len(row["logprobs"]) == row["tokens"]
    assert "".join(token["text"] for token in row["logprobs"]) == row["completion"]
    for token in row["logprobs"]:
        assert len(token["top"]) == 3
        assert token["logprob"] <= token["top"][0]["logprob"] < 0
    assert "logprobs" not in json.loads(psannlm("generate", "-p", "The", *GREEDY, "--json").out)["completions"][0]
    refused = psannlm("generate", "-p", "The tide", *GREEDY, "--logprobs", "3")
    assert refused.code == 2
    assert "add --json" in refused.err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--prompt", "a"), "it does not go with --prompt and --prompts-file"),
        (("--json",), "it does not go with --json"),
        ((), "standard input is not a terminal"),
    ],
)
def test_generate_interactive_refuses_other_input(psannlm, in_trained: Path, more: tuple[str, ...], said: str) -> None:
    refused = psannlm("generate", "--interactive", *more)
    assert (refused.code, refused.out) == (2, "")
    assert said in re.sub(r"\s+", " ", refused.err)


class Terminal:
    """The command line in a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        import pty

        self.master, slave = pty.openpty()
        command = (
            "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); from psannlm.commands.app import main; main()"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", command, *arguments], stdin=slave, stdout=slave, stderr=slave, start_new_session=True
        )
        os.close(slave)
        self.shown = ""

    def type(self, text: str) -> None:
        self.shown = ""
        os.write(self.master, text.encode())

    def wait_for(self, *texts: str) -> None:
        """Read until all of ``texts`` have been shown since the last input."""
        end = time.monotonic() + 120
        while not all(text in self.shown for text in texts):
            assert time.monotonic() < end, self.shown
            if select.select([self.master], [], [], 1.0)[0]:
                self.shown += os.read(self.master, 4096).decode(errors="replace")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="terminals of Linux")
def test_generate_interactive_interrupt_stops_the_answer_only(in_trained: Path) -> None:
    endless = ("--max-new-tokens", "8000", "--context", "slide", "--temperature", "5", "--top-p", "1")
    terminal = Terminal("generate", "--interactive", "--checkpoint", "runs/tiny", "--device", "cpu", *endless)
    try:
        terminal.wait_for("> ")
        is_under_way = False
        while not is_under_way:
            terminal.type("The tide\n")
            terminal.wait_for("The tide\r\n")
            while len(terminal.shown) < 60 and "\r\n> " not in terminal.shown:
                terminal.shown += os.read(terminal.master, 4096).decode(errors="replace")
            # Some answers end by themselves after a few tokens.
            is_under_way = "\r\n> " not in terminal.shown
        terminal.type("\x03")
        terminal.wait_for("\r\n> ")
        # The arrow brings the former line back; Ctrl-C discards it.
        terminal.type("\x1b[A")
        terminal.wait_for("The tide")
        # Python's readline module misses a signal that arrives while it redraws the line, until the next key.
        time.sleep(2.0)
        terminal.type("\x03")
        terminal.wait_for("\r\n> ")
        assert terminal.process.poll() is None
        terminal.type("\x04")
        assert terminal.process.wait(60) == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.master)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="terminals of Linux")
def test_generate_interactive_answers_and_survives_refused_prompts(psannlm, in_trained: Path) -> None:
    (row,) = json.loads(psannlm("generate", "-p", "Say", *GREEDY, "--json").out)["completions"]
    terminal = Terminal("generate", "-i", "--checkpoint", "runs/tiny", *GREEDY)
    try:
        terminal.wait_for("> ")
        terminal.type("x" * 40 + "\n")
        terminal.wait_for("error: prompt 0 has 41 tokens", "\r\n> ")
        terminal.type("Say\n")
        terminal.wait_for(row["completion"].rstrip() + "\r\n", "\r\n> ")
        terminal.type("\x04")
        assert terminal.process.wait(60) == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.master)
