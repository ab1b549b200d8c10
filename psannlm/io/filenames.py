r"""File names that are not UTF-8, and their representation in UTF-8 files that psannlm writes.

A name on Linux is bytes. Python holds a byte of it that is not UTF-8 as a lone surrogate, U+DC80 to U+DCFF (PEP 383),
and opens the file by that text. UTF-8 has no form for a surrogate, so text files hold its escape: the byte 0xE9 of a
name is written ``\udce9``. JSON, and YAML in double quotes, read the escape as the same text and open the same file.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Character class of the surrogates that represent undecodable bytes of file names (surrogateescape).
UNDECODABLE = "\udc80-\udcff"


def utf8(text: str) -> bytes:
    r"""Return ``text`` in UTF-8, each lone surrogate as its escape ``\udcXX``. All other text is encoded as it is."""
    return text.encode("utf-8", "backslashreplace")


def can_be_in_name(character: str) -> bool:
    """Return whether ``character`` can be in a file name: Unicode except NUL, and surrogates of undecodable bytes."""
    if "\ud800" <= character <= "\udfff":
        return "\udc80" <= character <= "\udcff"
    return character != "\0"


@contextmanager
def utf8_path(path: Path) -> Iterator[Path]:
    """Yield a path in UTF-8 that opens the same file for reading, for libraries that need one.

    Raises:
        OSError: the file cannot be opened.
    """
    if str(path).isascii() or not any("\ud800" <= character <= "\udfff" for character in str(path)):
        yield path
        return
    with open(path, "rb") as file:
        yield Path(f"/dev/fd/{file.fileno()}")
