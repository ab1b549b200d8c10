from __future__ import annotations

from psannlm.config.reference import keys, markdown_table
from psannlm.config.validation import SECTIONS


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
