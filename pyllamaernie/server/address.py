"""Addresses that a server may listen on."""

from __future__ import annotations

import ipaddress
import os
import socket

from pyllamaernie.errors import PyllamaernieError


def is_local(host: str) -> bool:
    """Whether only this machine can reach a server that binds to `host`."""
    if host == "localhost" or host.endswith(".sock"):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False  # a name may mean any address


def require_free_port(host: str, port: int) -> int:
    """The port, or a free one for 0. Raises: PyllamaernieError when it is taken or may not be used."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        if os.name != "nt":
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host.strip("[]"), port))
        except OSError as error:
            raise PyllamaernieError(f"{host}:{port} cannot be listened on: {error.strerror or error}") from None
        return int(probe.getsockname()[1])
