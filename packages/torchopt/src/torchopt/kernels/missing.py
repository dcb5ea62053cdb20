# SPDX-License-Identifier: Apache-2.0
"""The stand-in for the extension if it cannot be imported."""

from __future__ import annotations

from typing import Any, NoReturn

from torchopt.errors import KernelUnavailableError

__all__ = ["MissingExtension", "why_missing"]


class MissingExtension:
    """No kernels: everything runs on plain torch operations, and asking for a kernel raises.

    Attributes:
        import_error: Why the extension could not be imported.
        WITH_CUDA: False.
        WITH_OPENMP: False.
    """

    WITH_CUDA = False
    WITH_OPENMP = False

    def __init__(self, import_error: ImportError) -> None:
        self.import_error = (
            f"the compiled extension torchopt._C could not be imported ({import_error})"
        )

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise KernelUnavailableError(f"torchopt._C.{name}: {self.import_error}")


def why_missing(extension: Any) -> str | None:
    """Return why the extension is missing, or None if it was imported."""
    return extension.import_error if isinstance(extension, MissingExtension) else None
