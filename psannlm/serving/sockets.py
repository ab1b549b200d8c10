"""The socket that the server listens on, without torch: a port in use is reported before the seconds of its import."""

from __future__ import annotations

import errno
import os
import socket

from psannlm.errors import ConfigError

# Connections that may wait to be accepted.
_BACKLOG = 1024


def bind_socket(host: str, port: int) -> socket.socket:
    """Return a socket that is bound and does not listen yet.

    Raises:
        ConfigError: the port is in use or not allowed, or the host is no address of this machine.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise ConfigError(f"--host {host} has no address: {error.strerror}") from error
    bound = socket.socket(family, kind)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise bind_error(error, host, port) from error
    return bound


def start_listening(bound: socket.socket) -> None:
    """Let clients connect. Raises ConfigError where another process has begun to listen on the port."""
    try:
        bound.listen(_BACKLOG)
    except OSError as error:
        raise bind_error(error, *bound.getsockname()[:2]) from error


def bind_error(error: OSError, host: str, port: int) -> ConfigError:
    """Return the error that says why nothing can listen there."""
    if error.errno == errno.EADDRINUSE:
        return ConfigError(f"port {port} on {host} is in use; end what uses it, or give another --port")
    return ConfigError(f"cannot listen on {host}, port {port}: {os.strerror(error.errno or 0)}")
