"""No test reaches another machine: a connection to anything but this one fails the test that asked for it.

Gloo and TCPStore, which connect ranks on this machine, are C++ and stay as they are; what Python opens is watched.
"""

from __future__ import annotations

import ipaddress
import socket
from typing import Any

REACHED: list[str] = []
"""What the running test reached for; a library may swallow the error."""
_connect, _connect_ex, _resolve = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo


def watch() -> None:
    """From now on, connect to this machine only."""
    socket.socket.connect = _watched(_connect)  # pyright: ignore[reportAttributeAccessIssue]
    socket.socket.connect_ex = _watched(_connect_ex)  # pyright: ignore[reportAttributeAccessIssue]
    socket.getaddrinfo = _resolved


def is_here(host: Any) -> bool:
    """Whether a name or an address is this machine's."""
    name = host.decode() if isinstance(host, bytes) else host
    if name in (None, "", "localhost", socket.gethostname()):
        return True
    try:
        address = ipaddress.ip_address(str(name).partition("%")[0])
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def _check(host: Any) -> None:
    if not is_here(host):
        REACHED.append(str(host))
        raise AssertionError(f"a test reached for {host}; nothing in fkernel needs another machine")


def _watched(connect: Any) -> Any:
    def watched(self: socket.socket, address: Any) -> Any:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            _check(address[0])
        return connect(self, address)

    return watched


def _resolved(host: Any, *args: Any, **more: Any) -> Any:
    _check(host)
    return _resolve(host, *args, **more)
