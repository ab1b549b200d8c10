from __future__ import annotations

import pytest
from pydantic import Field

from psannlm.config.base import Check, Section, Whole
from psannlm.config.model import ModelConfig
from psannlm.config.run import config_from_mapping
from psannlm.config.validation import _NAMES_ELSEWHERE, SECTIONS, dotted, examine, show, touches
from psannlm.errors import ConfigError


@pytest.mark.parametrize(
    ("refused", "path", "expected"),
    [
        (("train", "lr"), ("train", "lr"), True),
        (("train",), ("train", "lr"), True),
        (("model", "short_conv", "places", 0), ("model", "short_conv", "places"), True),
        (("train", "lr"), ("train", "min_lr"), False),
        (("data", "sources", 1), ("data", "sources", 0), False),
    ],
)
def test_touches_parents_and_children_of_refused_path(
    refused: tuple[str | int, ...], path: tuple[str | int, ...], expected: bool
) -> None:
    assert touches({refused}, path) is expected


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (("data", "sources", 0, "path"), "data.sources[0].path"),
        (("a b", "c"), "'a b'.c"),
        (("a\nb",), "'a\\nb'"),
        (("\ud800",), "'\\ud800'"),
    ],
)
def test_paths_are_printable(path: tuple[str | int, ...], text: str) -> None:
    assert dotted(path) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        (2e-4, "0.0002"),
        (0.1 + 0.2, "0.30000000000000004"),
        ("a\nb", "'a\\nb'"),
        (3, "3"),
    ],
)
def test_values_are_shown_as_yaml_spells_them(value: object, text: str) -> None:
    assert show(value) == text


def test_long_values_are_cut() -> None:
    assert len(show("x" * 10_000)) < 80
    assert len(show([["x" * 100] * 100] * 100)) <= 120


class _Even(Section):
    size: Whole = Field(2, description="an even number", multiple_of=2)

    def checks(self) -> list[Check]:
        return [Check(("size",), "too even")] if self.size == 4 else []


def test_validation_unknown_error_uses_pydantic_message() -> None:
    (issue,) = examine(_Even, ("x",), {"size": 3}).issues
    assert issue.path == ("x", "size")
    assert issue.message == "3: input should be a multiple of 2"


def test_section_has_defaults_for_refused_values() -> None:
    examined = examine(
        ModelConfig, ("model",), {"d_model": "x", "n_layers": 3, "sine_params": {"amp_init": 0, "freq_init": 5}}
    )
    assert len(examined.issues) == 2
    assert examined.section.d_model == ModelConfig().d_model
    assert (examined.section.n_layers, examined.section.sine_params.freq_init) == (3, 5)


def test_rules_of_a_section_are_collected_not_raised() -> None:
    assert [issue.message for issue in examine(_Even, ("x",), {"size": 4}).issues] == ["too even"]


@pytest.mark.parametrize("theirs", sorted(_NAMES_ELSEWHERE))
def test_names_of_other_trainers_lead_to_ours(theirs: str) -> None:
    ours = _NAMES_ELSEWHERE[theirs]
    section = next(name for name, cls in SECTIONS.items() if ours in cls.model_fields)
    with pytest.raises(ConfigError, match=f"did you mean '{ours}'"):
        config_from_mapping({section: {theirs: 1}})
