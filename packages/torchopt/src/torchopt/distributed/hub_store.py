# SPDX-License-Identifier: Apache-2.0
"""torch's store of a world on several machines, in the memory of rank 0.

It uses the connections to rank 0, so only processes that know the token of the world read or write
it. torch's own `TCPStore` answers everyone who can connect to its port.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, ClassVar, NoReturn

import torch.distributed as dist

__all__ = ["HubStore"]


_dist: Any = dist  # torch documents `Store`, but exports no type for it


class HubStore(_dist.Store):  # type: ignore[misc]
    """A store that asks the hub; its methods are those that torch's bindings look for.

    torch holds only the C++ part of it, whose methods call these. So no store is ever freed.

    Args:
        ask: `Rendezvous.ask`.
        timeout: Seconds to wait for a key.
    """

    _all: ClassVar[list[HubStore]] = []

    def __init__(self, ask: Callable[..., Any], timeout: float) -> None:
        super().__init__()
        self._ask_hub = ask
        self._all.append(self)
        self.set_timeout(timedelta(seconds=timeout))

    def leave(self) -> None:
        """Refuse all questions from now on: this process has left the world."""
        self._ask_hub = _refused

    def _ask(self, what: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return self._ask_hub(what, *args, **kwargs)
        except ConnectionError as error:
            raise dist.DistNetworkError(str(error)) from error

    def set(self, key: str, value: str | bytes) -> None:
        """Set a value."""
        self._ask("set", {key: _text(value)})

    def get(self, key: str) -> bytes:
        """Return a value; wait until it is there."""
        return self.multi_get([key])[0]

    def add(self, key: str, value: int) -> int:
        """Add to a number and return the sum."""
        return int(self._ask("add", key, value))

    def compare_set(
        self, key: str, expected_value: str | bytes, desired_value: str | bytes
    ) -> bytes:
        """Set a value if it is the expected one; return the value afterwards."""
        return _bytes(self._ask("exchange", key, _text(expected_value), _text(desired_value)))

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Wait until all keys are there."""
        self._found(keys, timeout)

    def check(self, keys: list[str]) -> bool:
        """Return whether all keys are there."""
        return bool(self._ask("check", [*keys]))

    def append(self, key: str, value: str | bytes) -> None:
        """Append to a value."""
        self._ask("append", key, _text(value))

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """Return values; wait until all are there."""
        return [_bytes(x) for x in self._found(keys, None)]

    def multi_set(self, keys: list[str], values: list[str | bytes]) -> None:
        """Set values."""
        self._ask("set", {key: _text(x) for key, x in zip(keys, values, strict=True)})

    def has_extended_api(self) -> bool:
        """Return that there are `append`, `multi_get` and `multi_set`."""
        return True

    def deleteKey(self, key: str) -> bool:  # noqa: N802 - torch's name
        """Delete a value; return whether there was one."""
        return bool(self._ask("delete", key))

    def getNumKeys(self) -> int:  # noqa: N802 - torch's name
        """Return the number of keys."""
        return int(self._ask("count"))

    def clone(self) -> HubStore:
        """Return this store, which several threads may use."""
        return self

    def _found(self, keys: list[str], timeout: timedelta | None) -> Any:
        seconds = (self.timeout if timeout is None else timeout).total_seconds()
        late = f"expected the keys {keys} in the store within {seconds:g} s"
        try:
            return self._ask("get", [*keys], timeout=seconds, late=late)
        except TimeoutError as error:
            raise dist.DistStoreError(late) from error


def _refused(what: str, *args: Any, **kwargs: Any) -> NoReturn:
    raise ConnectionError(
        f"expected the store of an open world, found one that this process has left ({what}); open "
        "another world"
    )


def _text(value: str | bytes) -> str:
    return (value.encode() if isinstance(value, str) else value).decode("latin-1")


def _bytes(text: str) -> bytes:
    return text.encode("latin-1")
