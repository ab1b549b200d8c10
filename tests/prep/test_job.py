"""Settings of ``prep`` and their record in a manifest."""

from __future__ import annotations

from dataclasses import asdict, fields

from psannlm.prep.job import PrepSettings


def test_manifest_settings_record_every_prep_setting() -> None:
    """All but the format of standard input, which the hash of the documents covers; three under other names."""
    given = PrepSettings("body", True, "jsonl", "replace", 3, 9, 0.5, 7, 1000, keep_duplicates=True)
    defaults = PrepSettings()
    assert all(getattr(given, field.name) != getattr(defaults, field.name) for field in fields(given))
    expected = {**asdict(given), "min_characters": 3, "max_characters": 9, "dedupe": False}
    for name in ("stdin_format", "min_chars", "max_chars", "keep_duplicates"):
        del expected[name]
    assert asdict(given.for_manifest()) == expected
