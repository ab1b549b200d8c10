"""Closed or full standard streams are named, and characters they cannot encode are replaced."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from psannlm.errors import StreamError
from psannlm.runtime.streams import flush_output, guarding_streams, print_error_line, write_output


class Full(io.StringIO):
    """A stream on a disk that is full."""

    encoding, errors = "utf-8", "strict"

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


class Terminal(io.StringIO):
    """What says of itself that it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("stream", "reason"), [(Full(), "no space left on device"), (None, "closed")])
def test_stdout_closed_or_full_raises_named_error(
    monkeypatch: pytest.MonkeyPatch, stream: io.StringIO | None, reason: str
) -> None:
    monkeypatch.setattr(sys, "stdout", stream)
    with guarding_streams():
        for _ in range(2):
            with pytest.raises(StreamError, match=f"^standard output: {reason}"):
                sys.stdout.write("text")
        if stream is None:
            with pytest.raises(StreamError, match=r"^standard output: closed"):
                sys.stdout.buffer.write(b"text")
        with pytest.raises(StreamError, match=f"^standard output: {reason}"):
            typer.echo("text")
        flush_output()
    assert sys.stdout is stream


@pytest.mark.parametrize("stream", [Full(), None])
def test_stderr_closed_or_full_discards_messages(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO | None) -> None:
    monkeypatch.setattr(sys, "stderr", stream)
    print_error_line("before")
    with guarding_streams():
        sys.stderr.write("text")
        typer.echo("text", err=True)
        print_error_line("text")


def test_stdin_closed_raises_named_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with guarding_streams():
        assert not sys.stdin.isatty()
        for read in (lambda: sys.stdin.read(), lambda: sys.stdin.buffer.read(1)):
            with pytest.raises(StreamError, match=r"^standard input: closed"):
                read()


@pytest.mark.parametrize(("encoding", "text"), [("ascii", b"caf? ?\n"), ("latin-1", b"caf\xe9 ?\n")])
def test_streams_replace_unencodable_characters(monkeypatch: pytest.MonkeyPatch, encoding: str, text: bytes) -> None:
    page = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(page, encoding))
    with guarding_streams():
        sys.stdout.write("café –\n")
        flush_output()
    assert page.getvalue() == text


def test_write_output_escapes_on_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a\x1b[31m\tb\n\u202e"
    for page, written in ((Terminal(), "a\\x1b[31m\tb\n\\u202e"), (io.StringIO(), text)):
        monkeypatch.setattr(sys, "stdout", page)
        write_output(text)
        assert page.getvalue() == written


@pytest.mark.parametrize(
    ("redirection", "code", "said"),
    [
        ("> /dev/full", 1, "error: standard output: no space left on device"),
        (">&-", 1, "error: standard output: closed"),
        ("2>&-", 0, ""),
        ("2> /dev/full", 0, ""),
        ("<&-", 0, ""),
    ],
)
def test_command_error_names_the_stream(tmp_path: Path, redirection: str, code: int, said: str) -> None:
    command = f"exec '{sys.executable}' -m psannlm --version {redirection}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=tmp_path, env=dict(os.environ))
    assert done.returncode == code
    assert done.stderr.startswith(said)
    assert done.stderr.count("\n") == bool(said)
    assert bool(done.stdout) == (code == 0)


def test_closed_descriptor_is_not_reused_by_files(tmp_path: Path) -> None:
    program = (
        "import os, sys\nfrom psannlm.runtime.streams import guarding_streams\n"
        "with guarding_streams():\n"
        f"    file = open({str(tmp_path / 'data')!r}, 'w')\n"
        "    assert file.fileno() > 2, file.fileno()\n"
    )
    done = subprocess.run(
        ["bash", "-c", f'exec "$0" -c "$1" <&- >&- 2> "{tmp_path}/said"', sys.executable, program], check=False
    )
    assert done.returncode == 0, (tmp_path / "said").read_text()
