"""Generic tables of an artifact's figures, and its rows of throughput.csv and memory.json."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from psannlm.display import shortened
from psannlm.io.readers import is_spread, number
from psannlm.reports.page_model import Table, format_value

_MOST_ROWS = 200
_MOST_TABLES = 50
# Values of one row that are read, including those that make more columns than a page shows.
_MOST_KEYS = 1000
_LONGEST_NAME = 500
_MOST_COLUMNS = 40
# Suffixes of names and the units that they stand for.
_UNITS = (
    ("_tokens_per_s", "tokens/s"),
    ("_mb_per_s", "MB/s"),
    ("_bytes_per_s", "bytes/s"),
    ("_per_s", "/s"),
    ("_bytes", "bytes"),
    ("_ms", "ms"),
    ("_s", "s"),
)
_WHOLE = {
    "tokens_per_s": "tokens/s",
    "bits_per_byte": "bits per byte",
    "lr": "learning rate",
    "mb_per_s": "MB/s",
    "bandwidth_floor": "roofline",
    "floor_s": "roofline, s",
    "fraction_of_floor": "fraction of roofline",
}


def heading(key: str) -> str:
    """Return a human-readable name with its unit: ``decode_s`` becomes ``decode, s``."""
    *groups, last = key.split(".")
    if last in _WHOLE:
        text = _WHOLE[last]
    else:
        text = last
        for ending, unit in _UNITS:
            if last.endswith(ending) and len(last) > len(ending):
                text = f"{last.removesuffix(ending)}, {unit}"
                break
    return shortened(" ".join([*(_WHOLE.get(group, group) for group in groups), text]).replace("_", " "), _LONGEST_NAME)


def tables_of(figures: dict[str, Any], skip: frozenset[str] = frozenset()) -> Iterator[Table]:
    """Yield the tables in ``figures`` without ``skip``: each list or mapping of rows, then the single values."""
    rows: list[tuple[str, str]] = []
    tables: list[Table] = []
    n_rows = n_tables = 0
    for key, value in _sorted_out(figures, skip):
        if isinstance(value, _Rows):
            n_tables += 1
            if n_tables <= _MOST_TABLES:
                tables.append(rows_table(heading(key), value.rows))
        else:
            n_rows += 1
            if n_rows <= _MOST_ROWS:
                rows.append((heading(key), format_value(value)))
    yield from tables
    left_out = [(n_rows - len(rows), "rows"), (n_tables - len(tables), "tables")]
    note = "; ".join(f"{count:,} more {what} are in the artifact" for count, what in left_out if count > 0)
    if rows or note:
        yield Table("Settings and totals", ("what", "value"), rows, note=note, is_folded=bool(tables))


@dataclass(frozen=True)
class _Rows:
    """Rows of a table of their own."""

    rows: list[dict[str, Any]]


def _sorted_out(
    figures: dict[str, Any], skip: frozenset[str] = frozenset(), prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """Yield every single value with its dotted key, and lists and mappings of rows as :class:`_Rows`."""
    for key, value in figures.items():
        if key in skip:
            continue
        if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
            yield f"{prefix}{key}", _Rows(value)
        elif isinstance(value, dict) and not is_spread(value) and value:
            if _is_table(value):
                yield f"{prefix}{key}", _Rows([{"": name, **row} for name, row in value.items()])
            else:
                yield from _sorted_out(value, prefix=f"{prefix}{key}.")
        elif not isinstance(value, (list, dict)) or value or is_spread(value):
            yield f"{prefix}{key}", value


def _is_table(value: dict[str, Any]) -> bool:
    """Whether a mapping is one of names to rows: two or more, all of them mappings that share a key."""
    rows = [row for row in value.values() if isinstance(row, dict) and not is_spread(row)]
    return len(rows) == len(value) >= 2 and bool(set.intersection(*(set(row) for row in rows)))


def rows_table(title: str, rows: list[dict[str, Any]]) -> Table:
    """Return a table with a column for every key of ``rows``; a column is numeric if all its values are."""
    flat = [dict(islice(_flat_row(row), _MOST_KEYS)) for row in rows[:_MOST_ROWS]]
    keys = list(dict.fromkeys(key for row in flat for key in row))
    notes = []
    if len(keys) > _MOST_COLUMNS:
        notes.append(f"{len(keys) - _MOST_COLUMNS} more columns are in the artifact")
    if len(rows) > _MOST_ROWS:
        notes.append(f"{len(rows) - _MOST_ROWS:,} more rows are in the artifact")
    keys = keys[:_MOST_COLUMNS]
    numbers = frozenset(at for at, key in enumerate(keys) if _is_numeric([row.get(key) for row in flat]))
    cells = [[format_value(row.get(key)) for key in keys] for row in flat]
    return Table(title[:1].upper() + title[1:], [heading(key) for key in keys], cells, numbers, "; ".join(notes))


def _flat_row(row: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of ``row`` with dotted keys, its spreads left whole."""
    for key, value in row.items():
        if is_spread(value) or not isinstance(value, dict):
            yield f"{prefix}{key}", value
        elif value:
            yield from _flat_row(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", None


def _is_numeric(values: list[Any]) -> bool:
    filled = [value for value in values if value is not None]
    return bool(filled) and all(number(value) is not None or is_spread(value) for value in filled)


_RATE = re.compile(r"(?:.*_)?tokens_per_s")
_MEMORY = re.compile(r"(?:.*[._])?(?:peak|memory|cache|weight|weights|activations|allocated|resident|rss)\w*_bytes")
_LABELS = ("name", "case", "model", "variant", "candidate", "check", "id")
_CONTEXT = ("base", "mlp", "batch_tokens", "seq_len", "parameters", "dtype", "precision", "device", "grad_checkpoint")
# Keys of times beside an amount of memory, the most specific first, and what took that time.
_WALL_TIMES = {"step_s": "a training step", "decode_s": "decoding", "encode_s": "encoding", "total_s": "the whole"}
_WALL_TIMES |= {"wall_time_s": "the whole", "seconds": "the whole", "prep_s": "the whole", "fit_s": "fitting"}


def rate_rows(figures: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a row for every figure named ``tokens_per_s`` or ``..._tokens_per_s``, at any depth.

    Each has ``name`` (the way to it), ``figure``, ``tokens_per_s``, ``..._lowest`` and ``..._highest`` (None where it
    was measured once), and base, batch and precision from the mappings around it.
    """
    for way, context, key, value, beside in _walk(figures, (), {}):
        if _RATE.fullmatch(key):
            edges = {edge: number(beside.get(f"{key}_{edge}")) for edge in ("lowest", "highest")}
            spread = value if isinstance(value, dict) else {"median": value, **edges}
            yield {
                "name": _name(way),
                **{name: context.get(name) for name in _CONTEXT},
                "figure": key,
                "tokens_per_s": spread["median"],
                "tokens_per_s_lowest": spread.get("lowest"),
                "tokens_per_s_highest": spread.get("highest"),
            }


def memory_rows(figures: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a row for every figure named as an amount of memory.

    Each has ``name``, ``figure``, ``bytes``, ``grad_checkpoint`` where the artifact states it, and ``wall_time_s`` with
    ``wall_time_of`` where the same mapping has a time; else None.
    """
    for way, context, key, value, beside in _walk(figures, (), {}):
        # The name of a mapping may mark its values as memory: cache_bytes: {measured: ...}.
        named = f"{way[-1]}.{key}" if way else key
        if _MEMORY.fullmatch(key) and not key.endswith("per_s"):
            yield _memory_row(way, key, value, context, beside)
        elif any(_MEMORY.fullmatch(part) for part in way) and key in ("measured", "predicted"):
            yield _memory_row(way, named, value, context, beside)


def _name(way: tuple[str, ...]) -> str:
    return shortened(" / ".join(way), _LONGEST_NAME)


def _memory_row(
    way: tuple[str, ...], figure: str, value: Any, context: dict[str, Any], beside: dict[str, Any]
) -> dict[str, Any]:
    row = {"name": _name(way), "figure": figure, "bytes": value["median"] if is_spread(value) else value}
    times = (
        (beside[key]["median"] if is_spread(beside.get(key)) else beside.get(key), of)
        for key, of in _WALL_TIMES.items()
    )
    seconds, of = next(((time, of) for time, of in times if number(time) is not None), (None, None))
    grad_checkpoint = context.get("grad_checkpoint")
    return {**row, "grad_checkpoint": grad_checkpoint, "wall_time_s": seconds, "wall_time_of": of}


def _leaves(value: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the last part of the key, and the value, of every single value in nested mappings."""
    for key, item in value.items():
        if isinstance(item, dict):
            yield from _leaves(item)
        elif isinstance(item, (str, int, float)):
            yield key.split(".")[-1], item


def _walk(
    value: dict[str, Any], way: tuple[str, ...], context: dict[str, Any]
) -> Iterator[tuple[tuple[str, ...], dict[str, Any], str, Any, dict[str, Any]]]:
    """Yield (way, context, key, value, the mapping that holds it) of every number and spread below ``value``."""
    context = {**context, **{key: item for key, item in _leaves(value) if key in _CONTEXT}}
    for key, item in value.items():
        if number(item) is not None or is_spread(item):
            yield way, context, str(key), item, value
        elif isinstance(item, dict):
            yield from _walk(item, (*way, str(key)), context)
        elif isinstance(item, list):
            for at, row in enumerate(item, 1):
                if isinstance(row, dict):
                    label = next((str(row[name]) for name in _LABELS if isinstance(row.get(name), str)), str(at))
                    yield from _walk(row, (*way, label), context)
