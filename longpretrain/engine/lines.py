"""JSON objects, one a line, over sockets and pipes: how a rank, its sentinel and the hub talk."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from typing import Any

Message = dict[str, Any]

_SEND_S = 1.0
"""For an end that does not read: what watches others must not wait for them."""
_LONGEST = 1 << 20
"""Bytes of a message: what is longer is a stranger's."""


class Lines:
    """One end. What cannot be sent is dropped: the other end is gone, and whoever waits for it
    notices its silence.

    Args:
        reader: descriptor to read from.
        writer: descriptor to write to.
        connection: the socket behind both, if it is one.
    """

    def __init__(self, reader: int, writer: int, connection: socket.socket | None = None) -> None:
        self.reader = reader
        self._writer, self._connection = writer, connection
        self._rest = b""

    @classmethod
    def over(cls, connection: socket.socket) -> Lines:
        """Of a connection."""
        connection.settimeout(_SEND_S)
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return cls(connection.fileno(), connection.fileno(), connection)

    def send(self, message: Message) -> None:
        """One message."""
        data = (json.dumps(message) + "\n").encode()
        with contextlib.suppress(OSError):
            if self._connection is not None:
                self._connection.sendall(data)
            else:
                os.write(self._writer, data)

    def receive(self) -> list[Message] | None:
        """What has come, once the reader is ready; None at the end."""
        try:
            data = os.read(self.reader, 1 << 16)
        except BlockingIOError:
            return []
        except OSError:
            return None
        if not data:
            return None
        *whole, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _LONGEST:
            return None
        found = []
        for line in whole:
            with contextlib.suppress(ValueError, RecursionError):  # a stranger's, at an open port
                message = json.loads(line)
                if isinstance(message, dict):
                    found.append(message)
        return found

    def close(self) -> None:
        """Ends a connection."""
        if self._connection is not None:
            self._connection.close()
