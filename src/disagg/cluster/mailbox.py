"""How processes talk: everyone has one inbox, everyone can write to any inbox by its owner's name.

The inboxes are ZeroMQ PULL sockets in a folder that only this user can enter, so who can send is decided by the file
system. A name contains its epoch ("D0.1"), so a restarted worker has a new inbox and nothing old arrives in it.
Messages from one sender to one receiver keep their order; between senders there is none.
"""

import contextlib
from pathlib import Path
from typing import Any

import msgspec
import zmq

from disagg.clock import WallClock
from disagg.cluster.messages import Message, decode, encode

FRONT = "front"  # the inbox of the front end
_NAP_S = 50e-6
_MOST_AT_ONCE = 1_000  # messages taken per call, so that a flood cannot keep a worker from its next step


class Mailbox:
    """One process's inbox and its connections to others."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._clock = WallClock()
        self._context = zmq.Context()
        self._inbox = self._socket(zmq.PULL)
        self._inbox.bind(self._address(name))
        self._outboxes: dict[str, zmq.Socket[bytes]] = {}
        self._poller = zmq.Poller()
        self._poller.register(self._inbox, zmq.POLLIN)

    def watch(self, fd: int) -> None:
        """Let `receive` return early when this file descriptor becomes readable."""
        self._poller.register(fd, zmq.POLLIN)

    def unwatch(self, fd: int) -> None:
        """Undo `watch`."""
        self._poller.unregister(fd)

    def send(self, to: str, message: Message) -> None:
        """Hand over one message. To a reader that is gone it is lost, and nothing blocks."""
        outbox = self._outboxes.get(to)
        if outbox is None:
            outbox = self._outboxes[to] = self._socket(zmq.PUSH)
            outbox.connect(self._address(to))
        with contextlib.suppress(zmq.Again):
            outbox.send(encode(message), zmq.NOBLOCK)

    def forget(self, to: str) -> None:
        """Close the connection to a process that is gone; what it did not read is dropped."""
        if (outbox := self._outboxes.pop(to, None)) is not None:
            outbox.close(0)

    def receive(self, timeout_s: float) -> tuple[list[Any], list[int]]:
        """Messages that are here, after waiting up to `timeout_s` for the first, and the watched fds now readable.

        A message that cannot be decoded is no message of this version and is dropped.
        """
        ready = self._wait(timeout_s)
        messages: list[Any] = []
        if ready.pop(self._inbox, None):
            with contextlib.suppress(zmq.Again):
                while len(messages) < _MOST_AT_ONCE:
                    data = self._inbox.recv(zmq.NOBLOCK)
                    with contextlib.suppress(msgspec.ValidationError):
                        messages.append(decode(data))
        return messages, [fd for fd in ready if isinstance(fd, int)]

    def close(self) -> None:
        """Drop what was not sent or read."""
        self._inbox.close(0)
        for name in list(self._outboxes):
            self.forget(name)
        self._context.term()

    def _wait(self, timeout_s: float) -> dict[Any, int]:
        """ZeroMQ waits in whole milliseconds, too coarse for an arrival time: the rest is waited in short naps."""
        until = self._clock.now() + timeout_s
        ready = dict(self._poller.poll(int(max(0.0, timeout_s) * 1e3)))
        while not ready and (left := until - self._clock.now()) > 0:
            self._clock.sleep_until(self._clock.now() + min(left, _NAP_S))
            ready = dict(self._poller.poll(0))
        return ready

    def _socket(self, kind: int) -> "zmq.Socket[bytes]":
        socket: zmq.Socket[bytes] = self._context.socket(kind)
        socket.setsockopt(zmq.SNDHWM, 0)  # a token must never be dropped because its reader is a little late
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.setsockopt(zmq.LINGER, 0)
        return socket

    def _address(self, name: str) -> str:
        return f"ipc://{self._folder}/{name}"
