"""Parsing of recorded responses: completions, streamed or not, and everything that is not a whole one."""

from __future__ import annotations

import json
from typing import Any

import pytest

from psannlm.benchmarks.serving.exchange import Recording, parse_completion, parse_response

pytest.importorskip("h11")


def head(status: int = 200, *fields: str) -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status} Any", *fields, "", ""]).encode()


def chunked(*parts: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (*parts, b""))


def event(text: str, reason: str | None = None, **others: Any) -> bytes:
    content = {"choices": [{"text": text, "finish_reason": reason}], **others}
    return f"data: {json.dumps(content)}\n\n".encode()


STREAM = head(200, "Transfer-Encoding: chunked") + chunked(
    b": ping\r\n\r\n",
    event("é"),
    event(""),
    event(" two"),
    event("", "length", usage={"completion_tokens": 3}),
    b"data: [DONE]\n\n",
)


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_stream_is_parsed_however_it_arrives(size: int) -> None:
    chunks = [(10.0 + at, STREAM[at : at + size]) for at in range(0, len(STREAM), size)]
    answer = parse_completion(Recording(9.0, chunks, 9_999.0))
    assert (answer.text, answer.finish_reason, answer.n_tokens, answer.failure) == ("é two", "length", 3, "")
    # A part counts from when the end of its line came, before the empty line.
    first = STREAM.index(event("é")) + len(event("é"))
    assert answer.arrivals_s[0] == 1.0 + (first - 2) // size * size
    assert len(answer.arrivals_s) == 2


def test_answer_in_one_document_is_parsed() -> None:
    body = json.dumps({"choices": [{"text": "all", "finish_reason": "stop"}], "usage": {"completion_tokens": 2}})
    response = head(200, f"Content-Length: {len(body)}") + body.encode()
    answer = parse_completion(Recording(1.0, [(1.5, response)], 2.0))
    assert (answer.text, answer.finish_reason, answer.n_tokens) == ("all", "stop", 2)
    assert (answer.arrivals_s, answer.total_s, answer.failure) == ([0.5], 0.5, "")


@pytest.mark.parametrize(
    ("content", "failure"),
    [
        (b"", "connection closed before the end of the response"),
        (STREAM[:-40], "connection closed before the end of the response"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "not HTTP"),
        (head(503, "Content-Length: 2") + b"{}", "HTTP 503"),
        (head(200, "Content-Length: 5") + b"<htm>", "not a completion in JSON"),
        (head(200, "Content-Length: 2") + b"[]", "not a completion in JSON"),
        (head(200, "Content-Length: 2") + b"{}", "no finish reason"),
        (head(200, "Transfer-Encoding: chunked") + chunked(event("a"), b"data: [DONE]\n\n"), "no finish reason"),
        (head(200, "Transfer-Encoding: chunked") + chunked(b'data: {"error": {}}\n\n'), "error in the stream"),
    ],
)
def test_incomplete_answer_is_a_failure(content: bytes, failure: str) -> None:
    answer = parse_completion(Recording(0.0, [(1.0, content)] if content else [], 1.0))
    assert answer.failure.startswith(failure)


def test_failure_of_the_client_comes_first() -> None:
    answer = parse_completion(Recording(0.0, [(1.0, STREAM[:90])], 5.0, "no end within 5 s"))
    assert answer.failure == "no end within 5 s"
    assert answer.status == 200


def test_response_without_length_ends_with_the_connection() -> None:
    response = parse_response(Recording(0.0, [(1.0, head(200, "Connection: close") + b"ab"), (2.0, b"c")], 3.0))
    assert (response.body, response.failure) == (b"abc", "")
