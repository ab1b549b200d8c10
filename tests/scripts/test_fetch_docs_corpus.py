"""The corpus download script, with stand-ins for Debian's tools and without network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "scripts" / "fetch_docs_corpus.sh"
TOOLS = "dirname realpath sed grep mkdir mktemp rm mv find cp chmod awk wc touch".split()
APT_CACHE = """\
[[ $2 == --important && $3 == linux-doc ]] && printf 'linux-doc\\n  Depends: linux-doc-9.9\\n'
"""
APT_GET = """\
echo "$*" >>"$LOG"
[[ -z "${BROKEN:-}" ]] || { echo 'E: no route' >&2; exit 100; }
touch "${@: -1}_1_all.deb"
"""
DPKG_DEB = """\
if [[ $1 == -f ]]; then echo 1.2-3; exit; fi
mkdir -p "$3/usr/share/doc/x/html/_sources/deep"
echo text >"$3/usr/share/doc/x/html/_sources/deep/a.rst.txt"
echo other >"$3/usr/share/doc/x/html/_sources/picture.svg"
"""


@pytest.fixture
def bin_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in TOOLS:
        found = shutil.which(tool)
        if found is None:
            pytest.skip(f"this system has no {tool}")
        (folder / tool).symlink_to(found)
    for name, content in (("apt-cache", APT_CACHE), ("apt-get", APT_GET), ("dpkg-deb", DPKG_DEB)):
        (folder / name).write_text(f"#!{shutil.which('bash')}\n{content}")
        (folder / name).chmod(0o755)
    return folder


def fetch(bin_folder: Path, goal: Path, *arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
    bash = shutil.which("bash")
    assert bash is not None
    environment = {
        "PATH": str(bin_folder),
        "LOG": str(bin_folder / "log"),
        "HOME": os.environ.get("HOME", "/"),
        **extra,
    }
    return subprocess.run([bash, str(SCRIPT), str(goal), *arguments], env=environment, capture_output=True, text=True)


def test_fetch_docs_corpus_fetches_once_and_cleans_up(bin_folder: Path, tmp_path: Path) -> None:
    goal = tmp_path / "corpus"
    done = fetch(bin_folder, goal)
    assert done.returncode == 0, done.stderr
    files = sorted(str(path.relative_to(goal)) for path in goal.rglob("*") if path.is_file())
    assert files == sorted(
        f"{name}/{file}" for name in ("linux-doc", "python3.11-doc") for file in ("VERSION", "deep/a.rst.txt")
    )
    assert (goal / "linux-doc" / "VERSION").read_text() == "linux-doc-9.9 1.2-3\n"
    calls = (bin_folder / "log").read_text()
    assert "there already" in fetch(bin_folder, goal).stdout
    assert (bin_folder / "log").read_text() == calls, "what is there is not fetched again"


def test_fetch_docs_corpus_numbers_copies(bin_folder: Path, tmp_path: Path) -> None:
    (bin_folder / "python3").symlink_to(sys.executable)
    goal = tmp_path / "corpus"
    for _ in range(2):  # what a former call wrote is no text of the corpus
        done = fetch(bin_folder, goal, "3")
        assert done.returncode == 0, done.stderr
        lines = (goal / "copies_3.jsonl").read_text().splitlines()
        texts = [json.loads(line)["text"] for line in lines]
        assert sorted(texts) == sorted(f"copy {copy}\ntext\n" for copy in range(3) for _ in range(2))
    assert fetch(bin_folder, goal, "0").returncode == 2


def test_fetch_docs_corpus_failure_leaves_no_corpus(bin_folder: Path, tmp_path: Path) -> None:
    goal = tmp_path / "corpus"
    done = fetch(bin_folder, goal, BROKEN="1")
    assert done.returncode == 1
    assert "cannot download python3.11-doc" in done.stderr
    assert list(goal.iterdir()) == []


def test_fetch_docs_corpus_refuses_bad_environment(bin_folder: Path, tmp_path: Path) -> None:
    inside = fetch(bin_folder, REPOSITORY / "corpus")
    assert inside.returncode == 1
    assert "outside it" in inside.stderr
    (bin_folder / "apt-get").unlink()
    done = fetch(bin_folder, tmp_path / "corpus")
    assert done.returncode == 1
    assert "apt-get is missing" in done.stderr
