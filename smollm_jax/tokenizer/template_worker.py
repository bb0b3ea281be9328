"""The process that renders chat templates for `template_process`, under limits on its time and memory.

It reads requests from stdin, each 8 bytes of length and a pickle, and writes replies to stdout, each 8 bytes of length
and JSON. A loop that does not end and a text that outgrows the memory end here, whatever the template computes them by.
"""

import json
import os
import pickle
import resource
import signal
import sys
import time
from typing import Any

import jinja2

from smollm_jax.errors import InputFileError
from smollm_jax.tokenizer.template_environment import compile_template


def main() -> None:
    cpu_seconds, memory_bytes, max_characters = map(int, sys.argv[1:])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    _limit(resource.RLIMIT_AS, memory_bytes)
    _limit(resource.RLIMIT_CORE, 0)
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while header := sys.stdin.buffer.read(8):
        source, path, variables = pickle.loads(sys.stdin.buffer.read(int.from_bytes(header, "little")))
        # SIGXCPU kills the process when it has used so many more seconds.
        _limit(resource.RLIMIT_CPU, int(time.process_time()) + 1 + cpu_seconds)
        content = json.dumps(_render(source, path, variables, max_characters)).encode()
        replies.write(len(content).to_bytes(8, "little") + content)
        replies.flush()


def _limit(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _render(source: str, path: str, variables: dict[str, Any], max_characters: int) -> tuple[str, str]:
    """The kind of the result, "text" or an error's class, and the text or the error's message."""
    try:
        text = compile_template(source, path).render(variables)
        return ("text", text) if len(text) <= max_characters else ("MemoryError", "")
    except Exception as error:  # a template can raise anything
        kinds = (InputFileError, TypeError, jinja2.UndefinedError, MemoryError)
        kind = next((kind.__name__ for kind in kinds if isinstance(error, kind)), "Exception")
        return kind, str(error) or repr(error)


if __name__ == "__main__":
    main()
