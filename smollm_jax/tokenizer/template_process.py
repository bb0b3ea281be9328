"""Renders chat templates in another process, so that a stranger's template cannot hang this one or fill its memory.

What is bounded: the processor time of a rendering (`CPU_SECONDS`), the memory of the process that renders
(`MEMORY_BYTES`, by RLIMIT_AS), and the length of the text. The limits are the kernel's, so they hold for every loop,
operator, method and filter that Jinja has. The process starts with the first conversation and serves all later ones;
one that was ended by a limit is replaced.
"""

import atexit
import json
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import jinja2

from smollm_jax.errors import InputFileError

CPU_SECONDS = 5
MEMORY_BYTES = 1 << 30
MAX_CHARACTERS = 32 << 20


class TemplateProcess:
    """A process that renders one template at a time; other threads wait for their turn."""

    def __init__(self, cpu_seconds: int = CPU_SECONDS, memory_bytes: int = MEMORY_BYTES):
        self._limits = (cpu_seconds, memory_bytes, MAX_CHARACTERS)
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0  # the id of the process that started it

    def render(self, source: str, path: str, variables: dict[str, Any]) -> str:
        """The text of a template that was read from `path`, for variables of plain Python values.

        Raises `InputFileError` if the template does not compile or exceeds a limit, and otherwise what it raises: a
        `TypeError` or `jinja2.UndefinedError`, or a `RuntimeError` with the message of any other error.
        """
        content = pickle.dumps((source, path, variables))
        with self._lock:
            try:
                reply = self._exchange(content)
            except BaseException:  # such as Ctrl-C: the reply would be taken for that of the next request
                self.close()
                raise
            if reply is None:
                self.close()
        kind, text = ("MemoryError", "") if reply is None else reply
        if kind == "text":
            return text
        if kind == "InputFileError":
            raise InputFileError(text)
        if kind == "MemoryError":
            seconds, memory, characters = self._limits
            raise InputFileError(
                f"{path}: chat_template: takes more than {seconds} s, {memory >> 20:,} MiB or {characters:,} characters"
            )
        raise {"TypeError": TypeError, "UndefinedError": jinja2.UndefinedError}.get(kind, RuntimeError)(text)

    def _exchange(self, content: bytes) -> tuple[str, str] | None:
        """The reply to a request; None if the process ended instead."""
        if self._process is None or self._owner != os.getpid():  # a fork shares the pipes of its parent
            self._process = self._start()
        requests, replies = self._process.stdin, self._process.stdout
        assert requests is not None
        assert replies is not None
        try:
            requests.write(len(content).to_bytes(8, "little") + content)
            requests.flush()
        except BrokenPipeError:
            return None
        size = int.from_bytes(replies.read(8), "little")
        reply = replies.read(size)
        return tuple(json.loads(reply)) if size and len(reply) == size else None

    def _start(self) -> subprocess.Popen[bytes]:
        root = str(Path(__file__).parents[2])
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
        atexit.register(self.close)
        self._owner = os.getpid()
        return subprocess.Popen(
            [sys.executable, "-m", "smollm_jax.tokenizer.template_worker", *map(str, self._limits)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # Ctrl-C in a terminal does not reach it
        )

    def close(self) -> None:
        """Ends the process, if this process started it."""
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            process.kill()
            process.communicate()


PROCESS = TemplateProcess()
