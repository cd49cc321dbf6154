"""Files that are read again at the moment they are needed, if they are other ones by then. Certificates are renewed
while those who show them run; connections that stand stay as they are.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from services.common.config import ConfigError

log = logging.getLogger(__name__)

T = TypeVar("T")

_Version = tuple[tuple[int, int, int], ...]


class Renewed(Generic[T]):
    """What some files hold. Looking costs a stat of each; safe from any thread."""

    def __init__(self, paths: Sequence[Path], read: Callable[[], T]) -> None:
        """`read` makes it of the files and raises ConfigError if they cannot be used, as this does."""
        self._paths = tuple(paths)
        self._read = read
        self._lock = threading.Lock()
        self._version = self._look()
        self._content = read()

    def get(self) -> T:
        """The newest content that could be used. Of others the log says why they could not."""
        with self._lock:
            if (version := self._look()) != self._version:
                # First: files that are bad are not tried again until they change.
                self._version = version
                self._renew()
            return self._content

    def _renew(self) -> None:
        names = ", ".join(map(str, self._paths))
        try:
            self._content = self._read()
        except ConfigError as error:
            log.error("%s changed, and what was there before goes on: %s", names, error)
        else:
            log.info("%s changed and are read again", names)

    def _look(self) -> _Version:
        return tuple(map(_version, self._paths))


def _version(path: Path) -> tuple[int, int, int]:
    """Another one when the file is another one; zeros if it is not there."""
    try:
        state = path.stat()
    except OSError:
        return (0, 0, 0)
    return (state.st_mtime_ns, state.st_size, state.st_ino)
