"""One writer per folder: a lock on a trainer's run folder or on a data set under preparation.

Standard library only, so that a second process fails before anything heavy is imported.
"""

import contextlib
import fcntl
import json
import os
import socket
from pathlib import Path

from smollm_jax.errors import LockedError

FILE = "lock"


class RunLock:
    """Holds the lock of a folder, which is created if needed; raises `LockedError` if another process holds it.

    The lock is the kernel's `flock` on the file `lock`, so it ends with the process, however that ends; the content of
    the file only tells who holds it. A folder created here in which nothing was written is removed again, with the
    parent folders created here.
    """

    def __init__(self, run: Path, holder: str = "trainer"):
        self.run, self._holder = run, holder

    def __enter__(self) -> "RunLock":
        self._created = not self.run.exists()
        # Deepest first.
        self._created_parents = [folder for folder in self.run.parents if not folder.exists()] if self._created else []
        while True:
            self.run.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.run / FILE, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                holder = os.pread(self._file, 4096, 0).decode(errors="replace").strip()
                os.close(self._file)
                raise LockedError(f"{self.run}: in use by another {self._holder}: {holder}") from error
            # Another process may have removed the file between our two calls, in `__exit__`.
            if self._is_ours():
                break
            os.close(self._file)
        os.ftruncate(self._file, 0)
        owner = {"pid": os.getpid(), "host": socket.gethostname()}
        os.pwrite(self._file, (json.dumps(owner) + "\n").encode(), 0)
        return self

    def __exit__(self, *_: object) -> None:
        if self._created and os.listdir(self.run) == [FILE]:
            (self.run / FILE).unlink()
            self.run.rmdir()
            with contextlib.suppress(OSError):  # another run is in it by now
                for folder in self._created_parents:
                    folder.rmdir()
        os.close(self._file)

    def _is_ours(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._file), os.stat(self.run / FILE))
        except FileNotFoundError:
            return False
