"""A text of any length enters; segments leave that are encoded one by one, so that memory does not grow with it.

Where a text is cut depends on nothing but the text: the same document gives the same tokens in a file of its own, as a
line among others, and whether it was at hand as a whole or streamed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

SEGMENT_BYTES = 1 << 18


def first_end(text: bytes | bytearray, limit: int = SEGMENT_BYTES) -> int:
    """Return where the first segment of ``text`` ends: ``text`` is UTF-8, and longer than ``limit`` bytes.

    The cut falls before the last newline of the segment's second half, else before its last space, else before a
    character: a segment then begins with the white space that belongs to its first word.
    """
    for boundary in (b"\n", b" "):
        at = text.rfind(boundary, limit // 2, limit)
        if at > 0:
            return at
    # Up to three bytes of one character may stand before the cut; more continuation bytes are no UTF-8 at all.
    for at in range(limit, max(0, limit - 4), -1):
        if text[at] & 0xC0 != 0x80:
            return at
    return limit


def cut(text: bytes, limit: int = SEGMENT_BYTES) -> list[bytes]:
    """Return the segments of a whole text, which together are the text."""
    parts = []
    start = 0
    while len(text) - start > limit:
        # A slice, so that a search that finds nothing looks at one segment and not at all that is left.
        end = start + first_end(text[start : start + limit + 1], limit)
        parts.append(text[start:end])
        start = end
    parts.append(text[start:] if start else text)
    return parts


def cut_stream(blocks: Iterable[bytes], limit: int = SEGMENT_BYTES) -> Iterator[tuple[bytes, bool]]:
    """Yield (segment, whether it is the last) as :func:`cut` would cut the blocks' bytes joined; holds two at most."""
    held = bytearray()
    for block in blocks:
        held += block
        while len(held) > limit:
            end = first_end(held, limit)
            yield bytes(held[:end]), False
            del held[:end]
    yield bytes(held), True
