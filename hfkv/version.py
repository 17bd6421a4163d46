"""This package's version, and the versions of transformers that it is made for."""

import logging

import transformers
from packaging.version import Version

__version__ = "0.1.0"

OLDEST_TRANSFORMERS = "5.15"
NEWEST_TESTED = "5.23"


def check_transformers(found: str = transformers.__version__) -> None:
    """Raise ImportError for a transformers that cannot work; say so once for one that is newer than any tested."""
    version = Version(found)
    if version < Version(OLDEST_TRANSFORMERS):
        raise ImportError(
            f"hfkv needs transformers >= {OLDEST_TRANSFORMERS}, < 6, found {found}: pip install -U transformers"
        )
    if version.release[:2] > Version(NEWEST_TESTED).release[:2]:
        logging.getLogger("hfkv").warning("transformers %s is newer than any tested (%s)", found, NEWEST_TESTED)
