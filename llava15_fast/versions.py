"""Supported versions of the dependencies, checked before these are imported.

Otherwise an unsupported version would show as an import error about some name, which does not tell what to install.
"""

from __future__ import annotations

import importlib.metadata
import logging
import platform
from importlib.util import find_spec

from packaging.specifiers import SpecifierSet

logger = logging.getLogger("llava15_fast")

DECLARED = {"python": ">=3.11", "torch": ">=2.11,<2.16", "triton": ">=3.6,<3.10", "transformers": ">=5.17,<5.25"}
"""The installation's requirements; repeated here because an uninstalled checkout has no metadata."""


def installed(package: str) -> str | None:
    try:
        return platform.python_version() if package == "python" else importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def is_inside(version: str, declared: str) -> bool:
    """Pre-releases and local builds (+cu130) are judged by their version number."""
    return SpecifierSet(declared).contains(version, prereleases=True)


def check_versions() -> None:
    """Raises ImportError if a package is missing or older than declared; warns about newer ones."""
    # Sources on the path have no metadata.
    found = {package: version for package in DECLARED if (version := installed(package)) or find_spec(package) is None}
    lowest = {package: declared.split(",")[0] for package, declared in DECLARED.items()}
    if old := [package for package, version in found.items() if not version or not is_inside(version, lowest[package])]:
        needed = ", ".join(f"{package}{DECLARED[package]}" for package in old)
        present = ", ".join(f"{package} {version or 'is missing'}" for package, version in found.items())
        raise ImportError(f"llava15_fast needs {needed}; here: {present}")
    for package, version in found.items():
        if version and not is_inside(version, DECLARED[package]):
            logger.warning("%s %s is newer than what this was tested with: %s", package, version, DECLARED[package])
