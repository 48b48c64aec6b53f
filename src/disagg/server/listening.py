"""The server's socket: taken before anything slow is imported or started, so that a taken port is told at once."""

import errno
import socket

from disagg.errors import InputError

_UNREAD_BYTES = (
    1 << 18
)  # that the kernel keeps for a client: left to itself it is megabytes, which hide that nobody reads
_UNREAD_S = 30  # a client that takes no data for so long is cut off by the kernel


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises InputError when the address cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(
            socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNREAD_S * 1000
        )  # accepted sockets inherit it
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNREAD_BYTES)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        wrong_host = isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL
        option = "--host, an address of this machine" if wrong_host else "--port"
        reason = error.strerror or error
        raise InputError(f"Cannot listen on {host}:{port}: {reason}. Choose another {option}.") from None
    return listener
