# SPDX-License-Identifier: Apache-2.0
"""Connections that carry one JSON object a line, between processes that share a token.

Each side proves that it knows the token before the other side listens to it. The proof is a hash of
the token and of a number that the other side has just drawn; the token itself is never sent. From
then on each line begins with a hash of the token, of both numbers and of the line, so that nobody
between the two sides can change, repeat or add one. The lines themselves are not encrypted.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

__all__ = ["Link", "StrangerError", "connect", "name_of"]

_SENDING = 2.0  # seconds to wait for a process that does not read
_GREETING = 30.0  # seconds to wait for the greeting: another program may be listening
_LONGEST = 4096  # bytes that a stranger may send before it is disconnected
_SEAL = 32  # characters of the hash before each line


class StrangerError(Exception):
    """The other side does not know the token, or speaks another protocol."""


def name_of(ranks: tuple[int, ...]) -> str:
    """Return a short text for the ranks of a world: their number and a hash."""
    return f"{len(ranks)}:{hashlib.sha256(repr(ranks).encode()).hexdigest()[:16]}"


def proof(token: str, side: str, challenge: str, rank: int, world: str) -> str:
    """Return the proof of knowing the token, for one rank of one world (`name_of`)."""
    text = f"torchopt {side} {rank} of {world} {challenge}".encode()
    return hmac.new(token.encode(), text, "sha256").hexdigest()


class Link:
    """One end of a connection.

    Attributes:
        rank: The rank of the other side; -1 until it has proved that it belongs to the world.
        who: A description of the process on the other side; empty until then.
    """

    def __init__(self, connection: socket.socket, rank: int = -1) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(_SENDING)
        self.connection = connection
        self.rank = rank
        self.who = ""
        self.challenge = secrets.token_hex(16)
        self.early: list[bytes] = []  # lines that came with the answer to the greeting
        self._pending: list[bytes] = []  # the parts of a line whose end has not come
        self._lock = threading.Lock()
        self._key = b""  # of the seals; empty until both sides have proved that they know the token
        self._sides = ("", "")
        self._counts = [0, 0]  # sealed lines sent and received

    def send(self, message: dict[str, Any]) -> None:
        """Send a message; a closed connection is noticed when reading."""
        line = json.dumps(message, ensure_ascii=False).encode("utf-8", "surrogatepass")
        with self._lock, contextlib.suppress(OSError):
            remaining = memoryview(self._sealed(0, line) + line + b"\n")
            try:
                while remaining:
                    remaining = remaining[self.connection.send(remaining) :]
            except TimeoutError:  # a part may have been sent, which would garble the next message
                self.connection.shutdown(socket.SHUT_RDWR)

    def seal(self, token: str, challenges: str, sides: tuple[str, str]) -> None:
        """Seal all lines from now on.

        Args:
            token: The token of the world.
            challenges: The numbers that both sides have drawn.
            sides: The names of this side and of the other side.
        """
        self._key = hmac.digest(token.encode(), f"torchopt seals {challenges}".encode(), "sha256")
        self._sides = sides

    def _sealed(self, way: int, line: bytes) -> bytes:
        """Return the seal of the next line to be sent (0) or received (1)."""
        if not self._key:
            return b""
        self._counts[way] += 1
        text = f"{self._sides[way]} {self._counts[way]} ".encode() + line
        return hmac.digest(self._key, text, "sha256").hex()[:_SEAL].encode()

    def message(self, line: bytes) -> dict[str, Any]:
        """Return the message in a line that was received.

        Raises:
            StrangerError: It is no message, or not one of the other side.
        """
        if self._key:
            seal, line = line[:_SEAL], line[_SEAL:]
            if not hmac.compare_digest(seal, self._sealed(1, line)):
                raise StrangerError
        try:
            message = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise StrangerError from error
        if not isinstance(message, dict):
            raise StrangerError
        return message

    def receive(self) -> list[bytes] | None:
        """Return the lines that have come, or None at the end of the connection.

        Raises:
            StrangerError: They are too long.
        """
        try:
            received = self.connection.recv(65536)
        except OSError:
            received = b""
        if not received:
            return None
        first, *others = received.split(b"\n")
        self._pending.append(first)
        lines = []
        for part in others:
            lines.append(b"".join(self._pending))
            self._pending = [part]
        if self.rank < 0 and not lines and sum(map(len, self._pending)) > _LONGEST:
            raise StrangerError
        return lines

    def greet(self) -> None:
        """Challenge a new connection to prove that it belongs to the world."""
        self.send({"challenge": self.challenge})

    def admit(
        self, message: dict[str, Any], token: str, refusal: Callable[[int, str], str | None]
    ) -> int:
        """Return the rank of the other side, and answer its challenge.

        Args:
            message: Its answer to the greeting.
            token: The token of the world.
            refusal: Takes its rank and the name of the world that it expects; returns why it
                cannot join although it has the token, or None.

        Raises:
            StrangerError: It does not have the token, or is refused.
        """
        rank, *texts = (message.get(key) for key in ("rank", "proof", "challenge", "world"))
        if not (isinstance(rank, int) and all(isinstance(text, str) for text in texts)):
            raise StrangerError
        shown, challenge, world = map(str, texts)
        _require_equal(shown, proof(token, "member", self.challenge, rank, world))
        words = refusal(rank, world)
        self.send({"proof": proof(token, "hub", challenge, rank, world), "refused": words})
        if words is not None:
            raise StrangerError
        self.seal(token, f"{rank} {self.challenge} {challenge}", ("hub", "member"))
        self.rank, self.who = rank, str(message.get("who"))
        return rank


def connect(
    address: tuple[str, int], rank: int, ranks: tuple[int, ...], token: str, timeout: float
) -> Link:
    """Return a connection to the hub, after both sides have shown that they know the token.

    Args:
        address: Host and port.
        rank: The rank of this process.
        ranks: The ranks of the world; the first is the hub.
        token: The secret that the world shares.
        timeout: Seconds to wait for the hub.

    Raises:
        OSError: No process listens there.
        StrangerError: The listener is not the hub.
        RuntimeError: The hub refuses this process.
    """
    deadline = time.monotonic() + timeout
    world = name_of(ranks)
    connection = socket.create_connection(address, timeout=timeout)
    try:
        link = Link(connection)
        challenge = str(_first(link, min(deadline, time.monotonic() + _GREETING)).get("challenge"))
        link.connection.settimeout(_SENDING)
        link.send(
            {
                "rank": rank,
                "proof": proof(token, "member", challenge, rank, world),
                "challenge": link.challenge,
                "world": world,
                "who": f"process {os.getpid()} on {socket.gethostname()}",
            }
        )
        answer = _first(link, deadline)
        expected = proof(token, "hub", link.challenge, rank, world)
        _require_equal(str(answer.get("proof")), expected)
        if answer.get("refused") is not None:
            raise RuntimeError(str(answer["refused"]))
        link.seal(token, f"{rank} {challenge} {link.challenge}", ("member", "hub"))
        link.rank = ranks[0]
    except BaseException:
        connection.close()
        raise
    link.connection.settimeout(_SENDING)
    return link


def _first(link: Link, deadline: float) -> dict[str, Any]:
    lines: list[bytes] | None = []
    while not lines:
        link.connection.settimeout(max(0.001, deadline - time.monotonic()))
        if (lines := link.receive()) is None:
            raise StrangerError
    link.early = lines[1:]
    return link.message(lines[0])


def _require_equal(shown: str, expected: str) -> None:
    # compare_digest takes text of ASCII characters only.
    if not hmac.compare_digest(shown.encode("utf-8", "replace"), expected.encode()):
        raise StrangerError
