# SPDX-License-Identifier: Apache-2.0
"""The PEP 517 build backend of optree: scikit-build-core, after fetching the Abseil headers.

Building a wheel, an sdist or an editable install calls :func:`vendor.ensure` and then
scikit-build-core. ``pip`` is a build requirement only if Abseil still has to be downloaded, so a
build from an sdist needs neither pip in its environment nor a network.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import vendor
from scikit_build_core import build as _skbuild

if TYPE_CHECKING:
    from typing_extensions import TypeAlias

    Settings: TypeAlias = "dict[str, Any] | None"

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

prepare_metadata_for_build_editable = _skbuild.prepare_metadata_for_build_editable
prepare_metadata_for_build_wheel = _skbuild.prepare_metadata_for_build_wheel


def _fetcher() -> list[str]:
    return ["pip"] if vendor.missing() else []


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    """Return scikit-build-core's requirements, plus pip while Abseil is absent."""
    return [*_skbuild.get_requires_for_build_wheel(config_settings), *_fetcher()]


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    """Return scikit-build-core's requirements, plus pip while Abseil is absent."""
    return [*_skbuild.get_requires_for_build_editable(config_settings), *_fetcher()]


def get_requires_for_build_sdist(config_settings: Settings = None) -> list[str]:
    """Return scikit-build-core's requirements, plus pip while Abseil is absent."""
    return [*_skbuild.get_requires_for_build_sdist(config_settings), *_fetcher()]


def build_wheel(
    wheel_directory: str,
    config_settings: Settings = None,
    metadata_directory: str | None = None,
) -> str:
    """Build a wheel into ``wheel_directory`` and return its file name."""
    vendor.ensure()
    return _skbuild.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str,
    config_settings: Settings = None,
    metadata_directory: str | None = None,
) -> str:
    """Build an editable wheel into ``wheel_directory`` and return its file name."""
    vendor.ensure()
    return _skbuild.build_editable(wheel_directory, config_settings, metadata_directory)


def build_sdist(sdist_directory: str, config_settings: Settings = None) -> str:
    """Build an sdist, Abseil included, into ``sdist_directory`` and return its file name."""
    vendor.ensure()
    return _skbuild.build_sdist(sdist_directory, config_settings)
