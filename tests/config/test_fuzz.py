"""Any file gives a configuration or one printable ConfigError."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from psannlm.config.reference import keys
from psannlm.config.run import RunConfig, config_from_mapping, load_config, section_from_kwargs, to_yaml
from psannlm.config.validation import SECTIONS
from psannlm.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
# A plan for psannlm compare is no configuration.
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.yaml") if not path.stem.startswith(("compare_", "study_")))
VALID = [path.read_text(encoding="utf-8") for path in CONFIGS] + [to_yaml(RunConfig())]
# One section each: as easily damaged as a whole file, and read in a fraction of the time.
VALID_SECTIONS = sorted({part for text in VALID for part in re.split(r"\n(?=\w)", text) if part[:1].isalpha()})

_NAMES = sorted({part.strip("[]") for key in keys() for part in key.path.split(".")})
_KEYS = st.sampled_from(_NAMES) | st.text(max_size=6)
_LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-3, 70),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["python-reference", "rope", "on", "cuda:0", "muon", "", "a.txt", "~", "**", "[", "x/../y"]),
    st.sampled_from([10**400, -(10**400), 2**63, 1e308, b"bytes", (1, 2), {1}, object, RunConfig(), Path("x")]),
)
_GARBAGE = st.recursive(
    _LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS | st.integers(), inner, max_size=4)
)
_SECTIONS = st.dictionaries(
    st.sampled_from(sorted(SECTIONS)) | _KEYS, st.dictionaries(_KEYS, _GARBAGE, max_size=5) | _GARBAGE
)
_MUTATIONS = st.lists(
    st.tuples(
        st.integers(0, 1 << 16),
        st.sampled_from(["delete", "insert", "swap", "repeat"]),
        st.sampled_from(
            [*":-[]{}#&*!|>%@`'\",\t\n 0e.~?<", "\x00", "\ufeff", "\x85", "&a ", "*a", "!!int ", "---\n", "  "]
        ),
    ),
    min_size=1,
    max_size=6,
)
SETTINGS = {"deadline": None, "suppress_health_check": list(HealthCheck)}


def attempt(build: Any) -> None:
    """Accept a result or a printable ConfigError; let anything else through as the failure it is."""
    refusal: ConfigError | None = None
    try:
        build()
    except ConfigError as error:
        refusal = error
    if refusal is not None:
        str(refusal).encode("utf-8")
        assert refusal.problems
        assert all("\n" not in str(problem) for problem in refusal.problems), str(refusal)


def mutate(text: str, mutations: list[tuple[int, str, str]]) -> str:
    for place, kind, piece in mutations:
        at = place % (len(text) + 1)
        if kind == "delete":
            text = text[:at] + text[at + len(piece) :]
        elif kind == "insert":
            text = text[:at] + piece + text[at:]
        elif kind == "swap":
            text = text[:at] + piece + text[at + 1 :]
        else:
            line = text.splitlines(keepends=True)[: at % 40 + 1][-1:]
            text = text + "".join(line)
    return text


def check_mapping(mapping: dict[Any, Any]) -> None:
    attempt(lambda: config_from_mapping(mapping))
    for name, cls in SECTIONS.items():
        section = mapping.get(name)
        if isinstance(section, dict):
            attempt(lambda cls=cls, name=name, section=section: section_from_kwargs(cls, name, section))


def check_text(folder: Path, content: bytes, overrides: list[str]) -> None:
    path = folder / "run.yaml"
    path.write_bytes(content)
    attempt(lambda: load_config(path, overrides))


_OVERRIDES = st.lists(
    st.builds(
        lambda key, value: f"{key}={value}",
        st.sampled_from([k.path for k in keys()]) | st.text(max_size=8),
        st.text(max_size=8),
    ),
    max_size=3,
)


@pytest.mark.slow
@given(_SECTIONS)
@settings(max_examples=200, **SETTINGS)
def test_garbage_mappings_end_in_a_message(mapping: dict[Any, Any]) -> None:
    check_mapping(mapping)


@given(st.sampled_from(VALID), _MUTATIONS, _OVERRIDES)
@settings(max_examples=120, **SETTINGS)
def test_damaged_files_end_in_a_message(
    tmp_path_factory: pytest.TempPathFactory, text: str, mutations: list[tuple[int, str, str]], overrides: list[str]
) -> None:
    check_text(tmp_path_factory.getbasetemp(), mutate(text, mutations).encode("utf-8"), overrides)


@given(st.binary(max_size=200))
@settings(max_examples=100, **SETTINGS)
def test_any_bytes_end_in_a_message(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    check_text(tmp_path_factory.getbasetemp(), content, [])


@pytest.mark.slow
def test_ten_thousand_configs_end_in_a_message(tmp_path: Path) -> None:
    """Mixtures of what some hundred draws gave: to draw each of them would take several times as long as to read it."""
    mappings: list[dict[Any, Any]] = []
    damages: list[list[tuple[int, str, str]]] = []
    overrides: list[list[str]] = []

    @given(_SECTIONS, _MUTATIONS, _OVERRIDES)
    @settings(max_examples=500, phases=[Phase.generate], database=None, **SETTINGS)
    def draw(mapping: dict[Any, Any], mutations: list[tuple[int, str, str]], given_overrides: list[str]) -> None:
        mappings.append(mapping)
        damages.append(mutations)
        overrides.append(given_overrides)

    draw()
    mix = random.Random(20261129)
    for _ in range(10_000):
        check_mapping({**mix.choice(mappings), **mix.choice(mappings)})
        text = mutate(mix.choice(VALID_SECTIONS), [*mix.choice(damages), *mix.choice(damages)[: mix.randrange(3)]])
        check_text(tmp_path, text.encode("utf-8"), mix.choice(overrides))


def test_a_value_that_holds_itself_is_refused() -> None:
    loop: dict[str, Any] = {}
    loop["model"] = loop
    attempt(lambda: config_from_mapping(loop))
    items: list[Any] = []
    items.append(items)
    attempt(lambda: config_from_mapping({"data": {"sources": items}}))
