"""One writer a folder: a trainer's run, a preparation's data set.

Standard library only: the second one is told before anything heavy is imported.
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
    """Holds a run folder, made if need be, until the process ends however it ends; raises `LockedError` if taken.

    The kernel's `flock` on `lock` is what counts; what the file says is only who to ask. A folder made here in which
    nothing was written is removed again, with the folders above it that were made here.
    """

    def __init__(self, run: Path, holder: str = "trainer"):
        self.run, self._holder = run, holder

    def __enter__(self) -> "RunLock":
        self._made = not self.run.exists()
        # Deepest first.
        self._made_above = [folder for folder in self.run.parents if not folder.exists()] if self._made else []
        while True:
            self.run.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.run / FILE, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                holder = os.pread(self._file, 4096, 0).decode(errors="replace").strip()
                os.close(self._file)
                raise LockedError(f"{self.run}: another {self._holder} is at work in it: {holder}") from error
            # One that failed may have removed, between our two calls, the file we now hold.
            if self._is_ours():
                break
            os.close(self._file)
        os.ftruncate(self._file, 0)
        who = {"pid": os.getpid(), "host": socket.gethostname()}
        os.pwrite(self._file, (json.dumps(who) + "\n").encode(), 0)
        return self

    def __exit__(self, *_: object) -> None:
        if self._made and os.listdir(self.run) == [FILE]:
            (self.run / FILE).unlink()
            self.run.rmdir()
            with contextlib.suppress(OSError):  # another run lies in it by now
                for folder in self._made_above:
                    folder.rmdir()
        os.close(self._file)

    def _is_ours(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._file), os.stat(self.run / FILE))
        except FileNotFoundError:
            return False
