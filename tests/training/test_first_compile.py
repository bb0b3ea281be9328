"""What the trainer prints while it compiles the step: on a GPU a note and the duration, otherwise nothing."""

import concurrent.futures
import re
import threading

import pytest

from smollm_jax.training.run import compile_in_background


@pytest.mark.parametrize("platform", ["gpu", "cpu"])
def test_a_gpus_step_says_that_compiling_takes_long_and_once_how_long_it_took(platform, capsys):
    started, go = threading.Event(), threading.Event()

    def compile_step():
        started.set()
        assert go.wait(60)
        return lambda state, tokens: (state + tokens, threading.get_ident())

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        compiling, step = compile_in_background(pool, platform, compile_step)
        assert started.wait(60)
        before = capsys.readouterr().out
        assert not compiling.done()
        go.set()
        assert step(1, 2) == (3, threading.get_ident())  # called by the caller, not where it was compiled
        after = capsys.readouterr().out
        assert step(3, 4)[0] == 7
        assert capsys.readouterr().out == ""
    if platform == "cpu":
        assert (before, after) == ("", "")
    else:
        assert before == "compiling   the training step: one to two minutes the first time\n"
        assert re.fullmatch(r"compiled    the training step in \d+\.\d s\n", after)


def test_what_compiling_raises_reaches_whoever_waits_or_steps():
    def refused():
        raise MemoryError("too much")

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        compiling, step = compile_in_background(pool, "gpu", refused)
        for wait in (compiling.result, lambda: step(None, None)):
            with pytest.raises(MemoryError, match="too much"):
                wait()
