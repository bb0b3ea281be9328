"""`scripts/serve.py`'s server for tests, in a thread of this process."""

import contextlib
import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn

from smollm_jax.commands import serve
from smollm_jax.web import server
from tests import trainer


@contextlib.contextmanager
def serving(flags: serve.Flags) -> Iterator[str]:
    """Serves a model on a free port and yields its address."""
    bound = server.bind("127.0.0.1", 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", trainer.CACHE)
        patch.delenv(serve.KEY_VARIABLE, raising=False)
        app = serve.build(flags)
    running = uvicorn.Server(uvicorn.Config(app, log_level="error", ws="none", lifespan="on", http=server.protocol()))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        while not running.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        running.should_exit = True
        thread.join()
