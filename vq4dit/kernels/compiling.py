"""Python functions over arrays, compiled by numba: no compiler is needed where they run.

Compiling takes seconds, so its result is kept on disk, beside the source or in the user's cache. A copy that cannot be read, or
not be written, costs no more than compiling again.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
from pathlib import Path
from typing import Any

import numba
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.dispatcher import Dispatcher


class _KeptOnDisk(FunctionCache):
    """numba's, which takes a copy for whole, a disk for one with room, and a function for one that calls no other file's."""

    def __init__(self, function: Any):
        super().__init__(function)
        sources = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("[!.]*.py")))
        name = f"{self._impl.filename_base}-{hashlib.sha256(sources).hexdigest()[:16]}"  # other kernels have other files
        self._cache_file = IndexDataCacheFile(self._cache_path, name, self._impl.locator.get_source_stamp())

    def load_overload(self, *arguments: Any) -> Any:
        try:
            return super().load_overload(*arguments)
        except Exception:  # a damaged pickle can raise anything
            return None

    def save_overload(self, *arguments: Any) -> None:
        try:
            super().save_overload(*arguments)
        except Exception:  # the index, which is read first, is damaged; or the disk is full
            with contextlib.suppress(Exception):
                self.flush()
                super().save_overload(*arguments)


def compiled(function: Any) -> Any:
    """Run without Python's lock, and kept on disk where there is a place for it."""
    source = inspect.unwrap(function)  # the checks of types that tests add cannot be compiled
    found = numba.njit(nogil=True)(source)
    if isinstance(found, Dispatcher):  # NUMBA_DISABLE_JIT leaves functions as they are
        try:
            found._cache = _KeptOnDisk(source)
        except (RuntimeError, OSError):  # neither the package's folder nor the user's can be written
            pass
    return found
