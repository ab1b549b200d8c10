"""Loading of YAML 1.2 with the line number of every key, and writing of YAML.

PyYAML follows YAML 1.1, where ``2e-4`` is text and ``on`` a boolean. Here the core schema of YAML 1.2 decides
(https://yaml.org/spec/1.2.2/#103-core-schema), no tag can build an object, and no input can take much time or memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from psannlm.errors import ConfigError, nearest
from psannlm.io.filenames import UNDECODABLE
from psannlm.io.lfs_pointers import refuse_pointer

KeyPath = tuple[str | int, ...]

_MAX_BYTES = 1 << 18
_MAX_NODES = 10_000
_MAX_DEPTH = 32
_MAX_NUMBER_LENGTH = 100

_TAG = "tag:yaml.org,2002:"
_UNDECODABLE = re.compile(f"[{UNDECODABLE}]")
_CORE = {
    "null": re.compile(r"(?:~|null|Null|NULL|)\Z"),
    "bool": re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"),
    "int": re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)\Z"),
    "float": re.compile(
        r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"
    ),
}
_FIRST_CHARACTERS = {
    "null": ["~", "n", "N", ""],
    "bool": list("tTfF"),
    "int": list("-+0123456789"),
    "float": list("-+.0123456789"),
}
_HEAD_OF_NUMBER = re.compile(r"[-+]?[0-9]+(?:,[0-9]+)*\Z")
_REST_OF_NUMBER = re.compile(r"[0-9]+(?:[.][0-9]+)?(?:[eE][-+]?[0-9]+)?%?\Z")


@dataclass
class YamlTree:
    """A parsed YAML document.

    ``value`` is made of dict (with str keys), list, str, int, float, bool and None. ``lines`` maps the path of every
    key and list item to its 1-based line. ``faults`` are places that could not be read as values, each with the
    reason; ``value`` holds None there, and the first of the values of a key given twice.
    """

    value: object
    lines: dict[KeyPath, int] = field(default_factory=dict)
    faults: list[tuple[KeyPath, str]] = field(default_factory=list)


class _Refused(Exception):
    def __init__(self, message: str, line: int) -> None:
        super().__init__(message)
        self.line = line


class _Loader(yaml.SafeLoader):
    """Composes nodes only; values are built by ``_Builder``, which knows no tag beyond the core schema's."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._count = 0

    def check_printable(self, data: str) -> None:
        """Raise ReaderError for a character that YAML forbids, except those of file names that are not UTF-8."""
        super().check_printable(_UNDECODABLE.sub("x", data))

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self._count += 1
        self._depth += 1
        line = self.peek_event().start_mark.line + 1  # type: ignore[no-untyped-call]
        if self._depth > _MAX_DEPTH:
            raise _Refused(f"nested more than {_MAX_DEPTH} levels deep", line)
        if self._count > _MAX_NODES:
            raise _Refused(_TOO_MANY, line)
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or 1.2 would read as another type, and writes no anchors and aliases."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # Only double quotes preserve line breaks and control characters.
    style = None if text.isprintable() else '"'
    return dumper.represent_scalar(_TAG + "str", text, style=style)


_Dumper.add_representer(str, _represent_text)

_TOO_MANY = f"more than {_MAX_NODES:,} values, aliases expanded; name a folder or a glob rather than many files"

# Start with an empty table: otherwise PyYAML copies that of YAML 1.1 when the first resolver is added.
_Loader.yaml_implicit_resolvers = {}
for _kind, _pattern in _CORE.items():
    _Loader.add_implicit_resolver(_TAG + _kind, _pattern, _FIRST_CHARACTERS[_kind])
    _Dumper.add_implicit_resolver(_TAG + _kind, _pattern, _FIRST_CHARACTERS[_kind])


def read_yaml(path: Path) -> YamlTree:
    """Read a YAML file (UTF-8, a byte order mark is accepted).

    Raises:
        ConfigError: the file is missing, a folder, over 256 KiB, not UTF-8, or refused by :func:`parse_yaml`.
    """
    refuse_pointer(path, ConfigError)
    try:
        with open(path, "rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file{nearest_sibling(path)}") from error
    except IsADirectoryError as error:
        raise ConfigError(f"{path} is a folder; name a YAML file in it") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{str(path)!r} cannot be read: {reason}") from error
    if len(content) > _MAX_BYTES:
        raise ConfigError(f"{path}: larger than {_MAX_BYTES:,} bytes; is it a configuration?")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        message = f"{path} is not UTF-8: byte 0x{content[error.start]:02x} in line {line}; save it as UTF-8"
        raise ConfigError(message) from error
    return parse_yaml(text, str(path))


def parse_yaml(text: str, source: str | None = None) -> YamlTree:
    """Parse one YAML document.

    Raises:
        ConfigError: a syntax error, several documents, nesting beyond 32 levels, or more than 10,000 values once
            aliases are expanded. Duplicate keys and foreign tags are collected in ``faults`` instead.
    """
    if len(text) > _MAX_BYTES:
        raise ConfigError(f"{_prefix(source)}larger than {_MAX_BYTES:,} bytes; is it a configuration?")
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
        finally:
            loader.dispose()
        builder = _Builder()
        value = None if node is None else builder.build(node, ())
    except _Refused as error:
        raise ConfigError(f"{_prefix(source)}line {error.line}: {error}") from error
    except yaml.reader.ReaderError as error:
        code = error.character if isinstance(error.character, int) else ord(error.character)
        message = f"{_prefix(source)}character U+{code:04X} is not allowed in YAML; is this a text file in UTF-8?"
        raise ConfigError(message) from error
    except yaml.MarkedYAMLError as error:
        raise ConfigError(f"{_prefix(source)}{_explain(error)}") from error
    except (ValueError, OverflowError) as error:
        # PyYAML passes an escape such as "\UFFFFFFFF" to chr() unchecked.
        raise ConfigError(f"{_prefix(source)}a \\U escape names no Unicode character") from error
    return YamlTree(value, builder.lines, builder.faults)


def dump_yaml(value: object) -> str:
    """Return ``value`` (dict, list, str, int, float, bool, None) as YAML that :func:`parse_yaml` reads back."""
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    return text


def flow_yaml(value: object) -> str:
    """Return ``value`` as YAML on one line, in brackets and braces."""
    text: str = yaml.dump(
        value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1 << 20, default_flow_style=True
    )
    return text.removesuffix("...\n").strip()


def nearest_sibling(path: Path) -> str:
    """Return `` (did you mean '...'?)`` for the name in that folder closest to a path that does not exist, or ''."""
    try:
        names = sorted(entry.name for entry in path.parent.iterdir())
    except (OSError, ValueError):
        return ""
    # Searching more names would take a noticeable time.
    return nearest(path.name, names[:5000])


class _Builder:
    """Builds values from nodes, with a limit on expanded aliases, so that a small text cannot become a large value."""

    def __init__(self) -> None:
        self.lines: dict[KeyPath, int] = {}
        self.faults: list[tuple[KeyPath, str]] = []
        self._count = 0

    def build(self, node: yaml.Node, path: KeyPath) -> object:
        self._count += 1
        line = _line(node)
        self.lines.setdefault(path, line)
        if self._count > _MAX_NODES:
            raise _Refused(_TOO_MANY, line)
        if len(path) > _MAX_DEPTH:
            raise _Refused(f"nested more than {_MAX_DEPTH} levels deep; does an alias hold itself?", line)
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            return [self.build(item, (*path, index)) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path)
        self._refuse_tag(node, path)
        return None

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, object]:
        built: dict[str, object] = {}
        first_lines: dict[str, int] = {}
        for key_node, value_node in _with_commas(node):
            line = _line(key_node)
            if not isinstance(key_node, yaml.ScalarNode):
                shown = "[...]" if isinstance(key_node, yaml.SequenceNode) else "{...}"
                self.lines[(*path, shown)] = line
                self.faults.append(((*path, shown), "a list or a mapping cannot be a key; a key is a word"))
                continue
            key = key_node.value
            if key in built:
                lines = f"lines {first_lines[key]} and {line}" if first_lines[key] != line else f"line {line}"
                self.faults.append(((*path, key), f"given twice, in {lines}; keep one"))
                continue
            first_lines[key] = self.lines[(*path, key)] = line
            built[key] = self.build(value_node, (*path, key))
        return built

    def _scalar(self, node: yaml.ScalarNode, path: KeyPath) -> object:
        text: str = node.value
        kind = node.tag.removeprefix(_TAG)
        if kind == "str":
            return text
        if kind not in _CORE:
            self._refuse_tag(node, path)
            return None
        if not _CORE[kind].match(text):
            self.faults.append((path, f"{text[:_MAX_NUMBER_LENGTH]!r} is not a valid !!{kind}"))
            return None
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() == "true"
        if len(text) > _MAX_NUMBER_LENGTH:
            self.faults.append((path, f"a number of {len(text)} characters, starting {text[:20]}"))
            return None
        return _int(text) if kind == "int" else _float(text)

    def _refuse_tag(self, node: yaml.Node, path: KeyPath) -> None:
        tag = node.tag.replace(_TAG, "!!")
        self.faults.append((path, f"the tag {tag[:60]!r} is not allowed; write a plain value"))


def _with_commas(node: yaml.MappingNode) -> Iterator[tuple[yaml.Node, yaml.Node]]:
    """Yield keys and values; a number with a decimal comma or grouped digits is one text.

    In ``{lr: 0,003}`` the comma ends the value, and ``003`` is a key without a value; no key of ours looks like it.
    """
    former: tuple[yaml.Node, yaml.Node] | None = None
    for key, value in node.value:
        is_rest = isinstance(key, yaml.ScalarNode) and isinstance(value, yaml.ScalarNode) and value.value == ""
        if node.flow_style and former is not None and is_rest and _REST_OF_NUMBER.match(key.value):
            head = former[1]
            if isinstance(head, yaml.ScalarNode) and head.style is None and _HEAD_OF_NUMBER.match(head.value):
                text = f"{head.value},{key.value}"
                former = former[0], yaml.ScalarNode(_TAG + "str", text, head.start_mark, head.end_mark)
                continue
        if former is not None:
            yield former
        former = key, value
    if former is not None:
        yield former


def read_number(text: str) -> int | float | None:
    """Return the number that ``text`` is in YAML without quotes, or None."""
    if len(text) > _MAX_NUMBER_LENGTH:
        return None
    if _CORE["int"].match(text):
        return _int(text)
    return _float(text) if _CORE["float"].match(text) else None


def _int(text: str) -> int:
    if text.startswith("0o"):
        return int(text[2:], 8)
    return int(text[2:], 16) if text.startswith("0x") else int(text)


def _float(text: str) -> float:
    lowered = text.lower()
    return float(lowered.replace(".inf", "inf").replace(".nan", "nan"))


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def _prefix(source: str | None) -> str:
    return f"{source}: " if source else ""


def _explain(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    problem = " ".join((error.problem or "not valid YAML").split())
    if "'\\t'" in problem:
        return f"{where}a tab, where YAML wants spaces; replace tabs by spaces"
    if "mapping values are not allowed" in problem:
        return f"{where}a second ':' where no key can start; check the indentation, or quote the value"
    if "single document" in (error.context or ""):
        return f"{where}a second document starts here; keep one"
    context = f" ({' '.join(error.context.split())})" if error.context else ""
    return f"{where}not valid YAML: {problem}{context}"
