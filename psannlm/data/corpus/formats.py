"""Detection of file formats by the first bytes: text, compressed text, or a format that is not supported.

Only the beginning is judged, as git and grep do: text that contains tags further on, or a NUL, is still text.
"""

from __future__ import annotations

import re
import unicodedata

# As many bytes of a file's beginning as decide what it is.
HEAD_BYTES = 8000
# NULs that a text may hold there, such as a crawl's; they are text as written.
_STRAY_NULS = 2
_UNPACK = "unpack it, and name the folder"
_EXTRACT = "extract its text into a .txt file first"
_LEAVE_OUT = "leave it out of the corpus"
_EXPORT = "export its text to .jsonl, one JSON object a line"
_REPACK = "unpack it, or compress it with gzip or zstd"
_SKIPPABLE_ZSTANDARD = range(0x184D2A50, 0x184D2A60)
# (first bytes, what it is, what to do). Those that a text could begin with count only before bytes that no text holds.
_FORMATS = (
    (b"BZh", "bzip2 data", _REPACK),
    (b"\xfd7zXZ\x00", "xz data", _REPACK),
    (b"\x04\x22\x4d\x18", "lz4 data", _REPACK),
    (b"LZIP\x01", "lzip data", _REPACK),
    (b"\x1f\x9d", "data of compress (.Z)", _REPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (b"Rar!\x1a\x07", "a RAR archive", _UNPACK),
    (b"!<arch>\n", "an ar archive or static library", _LEAVE_OUT),
    (b"PAR1", "a Parquet file", "rename it to end in .parquet"),
    (b"ARROW1\x00\x00", "an Arrow file", "write it as .parquet"),
    (b"\xff\xff\xff\xff", "an Arrow stream or other binary data", "write its text as .parquet or .jsonl"),
    (b"ORC", "an ORC file", "write it as .parquet"),
    (b"Obj\x01", "an Avro file", "write it as .parquet"),
    (b"SQLite format 3\x00", "an SQLite database", _EXPORT),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file", _EXPORT),
    (b"\x93NUMPY", "a NumPy array", _LEAVE_OUT),
    (b"GGUF", "a GGUF model", _LEAVE_OUT),
    (b"%PDF-", "a PDF document", "extract its text first, for instance with pdftotext"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an older Office document", _EXTRACT),
    (b"\x89PNG\r\n\x1a\n", "a PNG image", _LEAVE_OUT),
    (b"\xff\xd8\xff", "a JPEG image", _LEAVE_OUT),
    (b"GIF87a", "a GIF image", _LEAVE_OUT),
    (b"GIF89a", "a GIF image", _LEAVE_OUT),
    (b"II*\x00", "a TIFF image", _LEAVE_OUT),
    (b"MM\x00*", "a TIFF image", _LEAVE_OUT),
    (b"BM", "a BMP image", _LEAVE_OUT),
    (b"RIFF", "an image, sound or film (RIFF)", _LEAVE_OUT),
    (b"OggS", "an Ogg sound or film", _LEAVE_OUT),
    (b"fLaC", "a FLAC sound", _LEAVE_OUT),
    (b"ID3", "an MP3 sound", _LEAVE_OUT),
    (b"\x1a\x45\xdf\xa3", "a Matroska film", _LEAVE_OUT),
    (b"\x7fELF", "an ELF program or library", _LEAVE_OUT),
    (b"MZ", "a Windows program or library", _LEAVE_OUT),
    (b"\xca\xfe\xba\xbe", "a Java class or macOS program", _LEAVE_OUT),
    (b"\xcf\xfa\xed\xfe", "a macOS program or library", _LEAVE_OUT),
    (b"\x00asm", "a WebAssembly program", _LEAVE_OUT),
)
_ZIP = (
    (b"word/", "a Word document (.docx)", _EXTRACT),
    (b"xl/", "an Excel workbook (.xlsx)", _EXPORT),
    (b"ppt/", "a PowerPoint presentation (.pptx)", _EXTRACT),
    (b"application/epub+zip", "an EPUB book", _EXTRACT),
    (b"application/vnd.oasis.opendocument", "an OpenDocument file", _EXTRACT),
)
_MARKS = (  # longest first: that of UTF-32 begins with that of UTF-16
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
_MARKLESS = ((4, ("utf-32-le", "utf-32-be")), (2, ("utf-16-le", "utf-16-be")))
_CONTROLS = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]")  # not those of text: tab to return, escape
_COMMENTS = rb"(?:\s|<!--.*?-->|<\?xml[^>]*\?>)*"
# <html> in prose is followed by words; in a page by its next tag.
_HTML = re.compile(_COMMENTS + rb"(?:<!doctype\s+html|<html(?:\s[^>]*)?>" + _COMMENTS + rb"<)", re.I | re.S)


def compression(head: bytes) -> str:
    """Return ``.gz`` or ``.zst`` if the bytes are the beginning of such a file, else an empty string."""
    if head[:3] == b"\x1f\x8b\x08":
        return ".gz"
    number = int.from_bytes(head[:4], "little") if len(head) >= 4 else 0
    return ".zst" if number == 0xFD2FB528 or number in _SKIPPABLE_ZSTANDARD else ""


def why_not_text(head: bytes, name: str) -> str | None:
    """Return the format of a file with the first bytes ``head`` and a remedy, or None if it may be text.

    ``name``: the file name in recommended commands.
    """
    encoding = unicode_encoding(head)
    if encoding is not None:
        return f"is {encoding.upper()}, not UTF-8; convert it: iconv -f {encoding} -t utf-8 {name} > converted.txt"
    known = _known_format(head)
    if known is not None:
        return f"is {known[0]}, not text; {known[1]}"
    n_nuls = head.count(b"\0")
    if n_nuls > _STRAY_NULS:
        return (
            f"is binary data, not text ({n_nuls:,} of its first {len(head):,} bytes are NUL); leave it out of the "
            f"corpus, or remove NULs that do not belong there: tr -d '\\000' < {name} > cleaned.txt"
        )
    return _markup(head.removeprefix(b"\xef\xbb\xbf"))


def unicode_encoding(head: bytes) -> str | None:
    """Return iconv's name of the UTF-16 or UTF-32 encoding of bytes, with or without a byte order mark, or None."""
    for mark, name in _MARKS:
        if head.startswith(mark):
            return name
    if b"\0" not in head or _is_utf_8_with_nuls(head):
        return None
    for width, codecs in _MARKLESS:
        whole = head[: len(head) // width * width]
        likely = max(codecs, key=lambda codec: _likelihood(whole, codec))
        if _likelihood(whole, likely) > 0:
            return likely.replace("-", "").replace("utf", "utf-")
    return None


def _likelihood(content: bytes, codec: str) -> float:
    """Return the fraction of ASCII characters if ``content`` can be a text in ``codec``, else 0."""
    try:
        text = content.decode(codec)
    except UnicodeDecodeError as error:
        if error.start < len(content) - 4:
            return 0.0
        text = content[: error.start].decode(codec)  # the head ends inside a character
    if any(unicodedata.category(c) in ("Cc", "Cn", "Co", "Cs") and c not in "\t\n\r\f" for c in set(text)):
        return 0.0
    n_ascii = sum(c < "\x80" for c in text)
    has_blanks = any(blank in text for blank in " \n\r\u3000")
    return n_ascii / len(text) if text and (has_blanks or n_ascii > 0.8 * len(text)) else 0.0


def _is_utf_8_with_nuls(head: bytes) -> bool:
    """Return whether bytes are UTF-8 text except for NULs."""
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:
            return False
    n_nuls = head.count(b"\0")
    return n_nuls < 0.3 * len(head) and len(_CONTROLS.findall(head)) == n_nuls


def is_binary(content: bytes) -> bool:
    """Return whether bytes that are not UTF-8 are binary data: they contain control characters."""
    return len(_CONTROLS.findall(content[:HEAD_BYTES])) > len(content[:HEAD_BYTES]) // 100


def _known_format(head: bytes) -> tuple[str, str] | None:
    if head[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        found = next(((name, remedy) for mark, name, remedy in _ZIP if mark in head), None)
        return found or ("a zip archive", _UNPACK)
    if head[257:262] == b"ustar" and b"\0" in head[:257]:
        return "a tar archive", _UNPACK
    if head[4:8] == b"ftyp" and b"\0" in head[:4]:
        return "an MP4 film or HEIF image", _LEAVE_OUT
    if head[8:10] == b'{"' and b"\0" in head[2:8]:
        return "a safetensors file", _LEAVE_OUT
    if re.match(rb"\x80[\x02-\x05](?:\x95|c|\}|\]|\()", head):
        return "a Python pickle", _LEAVE_OUT
    for magic, name, remedy in _FORMATS:
        if head.startswith(magic) and (magic == b"%PDF-" or not magic.isascii() or _CONTROLS.search(head)):
            return name, remedy
    return None


def _markup(head: bytes) -> str | None:
    as_it_is = "to train on the markup itself, put it into a .jsonl file, whose strings are taken as they are"
    if _HTML.match(head):
        return f"is an HTML page, not text; extract its text (for instance pandoc -f html -t plain); {as_it_is}"
    if re.match(rb"\s*\{\\rtf[0-9]", head):
        return f"is an RTF document, not text; extract its text (for instance pandoc -f rtf -t plain); {as_it_is}"
    return None
