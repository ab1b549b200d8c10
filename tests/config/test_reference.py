from __future__ import annotations

from pathlib import Path

from psannlm.config.reference import keys, markdown_table
from psannlm.config.validation import SECTIONS

README = Path(__file__).resolve().parents[2] / "README.md"
BEGIN, END = "<!-- config keys: begin -->", "<!-- config keys: end -->"


def test_every_key_is_listed_once_and_described() -> None:
    listed = {key.path: key for key in keys()}
    assert len(listed) == len(list(keys()))
    assert all(key.description for key in listed.values())
    for section, cls in SECTIONS.items():
        for name in cls.model_fields:
            assert any(path == f"{section}.{name}" or path.startswith(f"{section}.{name}.") for path in listed)
    assert listed["model.sine_params.freq_init"].kind == "number > 0"
    assert listed["data.vocab_size"].kind == "whole number ≥ 261"
    assert listed["train.max_steps"].kind == "whole number ≥ 1 or null"
    assert listed["train.max_steps"].default == "null"
    assert listed["model.short_conv.places"].default == "[attention, mlp]"


def test_the_table_has_four_cells_in_every_row() -> None:
    rows = markdown_table().splitlines()
    assert {row.replace("\\|", "").count("|") for row in rows} == {5}


def test_the_readme_shows_the_present_table() -> None:
    text = README.read_text(encoding="utf-8")
    assert BEGIN in text
    assert END in text
    shown = text.split(BEGIN)[1].split(END)[0].strip()
    assert shown == markdown_table().strip(), "run python scripts/update_readme.py"
