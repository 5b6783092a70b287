"""A file, local or on a bucket, to be read at any place."""

import contextlib
import io
from typing import Any

from etils import epath

from offsetjax.storage.retry import retried


class Opened(io.RawIOBase):
    """A file, local or on a bucket, to be read at any place; what fails for a moment is tried again."""

    def __init__(self, path: epath.Path):
        super().__init__()
        self._path, self._at = path, 0
        self._file: Any = None
        self.size = int(retried(lambda: path.stat().length, str(path)))

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """The place of the next byte."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Goes to a place."""
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        """The next bytes; fewer where the file ends."""
        data = retried(lambda: self._read(size), str(self._path))
        self._at += len(data)
        return data

    def _read(self, size: int) -> bytes:
        try:
            if self._file is None:
                self._file = self._path.open("rb")
            self._file.seek(self._at)
            return self._file.read(size)
        except Exception:
            self._close()  # the next try opens it anew
            raise

    def _close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(Exception):
                file.close()

    def close(self) -> None:
        """Closes it."""
        self._close()
        super().close()
