"""Which versions this package was made for, looked at before anything of them is imported.

An import that fails on a name which another release has tells nobody what to install.
"""

from __future__ import annotations

import importlib.metadata
import logging
import platform
from importlib.util import find_spec

from packaging.specifiers import SpecifierSet

logger = logging.getLogger("llava15_fast")

DECLARED = {"python": ">=3.11", "torch": ">=2.11,<2.16", "triton": ">=3.6,<3.10", "transformers": ">=5.17,<5.25"}
"""What the installation asks for; a checkout that was never installed has no metadata to read it from."""


def installed(package: str) -> str | None:
    if package == "python":
        return platform.python_version()
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def is_inside(package: str, version: str) -> bool:
    return SpecifierSet(DECLARED[package]).contains(version, prereleases=True)


def check_versions() -> None:
    """Raises ImportError where a package is missing or older than what is declared; a newer one is told and tried."""
    found = {package: installed(package) for package in DECLARED}
    # Sources on the path have no metadata.
    found = {package: version for package, version in found.items() if version or find_spec(package) is None}
    old = [package for package, version in found.items() if version is None or not _is_new_enough(package, version)]
    if old:
        needed = ", ".join(f"{package}{DECLARED[package]}" for package in old)
        present = ", ".join(f"{package} {version or 'is missing'}" for package, version in found.items())
        raise ImportError(f"llava15_fast needs {needed}; here: {present}")
    for package, version in found.items():
        if not is_inside(package, version):
            logger.warning("%s %s is newer than what this was tested with: %s", package, version, DECLARED[package])


def _is_new_enough(package: str, version: str) -> bool:
    lowest = DECLARED[package].split(",")[0]
    return SpecifierSet(lowest).contains(version, prereleases=True)
