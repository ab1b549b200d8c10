"""psannlm schema prints the schemas that the repository keeps for editors."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "reference"


@pytest.mark.parametrize("kind", ["config", "plan"])
def test_schema_is_the_one_that_the_repository_keeps(psannlm, kind: str) -> None:
    done = psannlm("schema", kind)
    assert (done.code, done.err) == (0, "")
    Draft202012Validator.check_schema(json.loads(done.out))
    kept = (FOLDER / f"{kind}.schema.json").read_text(encoding="utf-8")
    assert done.out == kept, "run python scripts/update_schemas.py"


def test_schema_of_another_kind_is_wrong_usage(psannlm) -> None:
    done = psannlm("schema", "model")
    assert done.code == 2
    assert "'model' is not one of 'config', 'plan'" in done.err


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["config", "plan"])
def test_schema_loads_neither_torch_nor_numpy(kind: str) -> None:
    program = (
        "import sys\nfrom psannlm.commands.app import main\n"
        f"try:\n    main(['schema', '{kind}'])\nexcept SystemExit as end:\n    assert not end.code\n"
        "heavy = {'torch', 'numpy', 'matplotlib', 'sentencepiece', 'tokenizers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_schema_script_names_outdated_schemas(tmp_path: Path) -> None:
    for name in ("scripts", "docs/reference"):
        (tmp_path / name).mkdir(parents=True)
    script = tmp_path / "scripts" / "update_schemas.py"
    script.write_bytes((ROOT / "scripts" / "update_schemas.py").read_bytes())

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, script, *words], cwd=ROOT, capture_output=True, text=True)

    old = run("--check")
    assert (old.returncode, bool(re.search(r"config\.schema\.json is old; run python", old.stderr))) == (1, True)
    assert run().returncode == 0
    assert run("--check").returncode == 0
    for kind in ("config", "plan"):
        written = (tmp_path / "docs" / "reference" / f"{kind}.schema.json").read_bytes()
        assert written == (FOLDER / f"{kind}.schema.json").read_bytes()
