"""When a signal is noticed, and what further ones mean; what becomes of a run, `test_survival.py` shows."""

import signal
import subprocess
import sys

from tests.trainer import ROOT


def test_a_signal_is_noticed_before_the_next_step_also_when_no_other_thread_gets_its_turn():
    asked = """
import signal, sys
from smollm_jax.runtime.signals import Stop
stop = Stop().listen()
sys.setswitchinterval(60)
signal.raise_signal(signal.SIGTERM)
print(bool(stop))
"""
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout == "True\n", done.stderr


def test_signals_within_a_second_are_one_wish_and_a_later_one_ends_the_process():
    """As `timeout` and `kill -- -GROUP` send the same signal twice."""
    asked = """
import signal, time
from smollm_jax.runtime.signals import Stop
stop = Stop().listen()
for _ in range(5):
    signal.raise_signal(signal.SIGTERM)
    time.sleep(0.1)
print(bool(stop))
time.sleep(2)
print("was heard once")
signal.raise_signal(signal.SIGINT)
time.sleep(60)
"""
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (done.stdout, done.returncode) == ("True\nwas heard once\n", 128 + signal.SIGINT), done.stderr
    assert done.stderr.startswith("SIGTERM: ")
    assert len(done.stderr.splitlines()) == 1
