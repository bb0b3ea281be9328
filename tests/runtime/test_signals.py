"""When a signal is noticed, and what further signals do; `test_survival.py` has their effect on a run."""

import signal
import subprocess
import sys

from tests.trainer import ROOT


def test_a_signal_is_noticed_before_the_next_step_even_when_no_other_thread_runs():
    program = """
import signal, sys
from smollm_jax.runtime.signals import StopSignal
stop = StopSignal().install()
sys.setswitchinterval(60)
signal.raise_signal(signal.SIGTERM)
print(bool(stop))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert result.stdout == "True\n", result.stderr


def test_signals_within_a_second_count_once_and_a_later_one_ends_the_process():
    """`timeout` and `kill -- -GROUP` send the same signal twice."""
    program = """
import signal, time
from smollm_jax.runtime.signals import StopSignal
stop = StopSignal().install()
for _ in range(5):
    signal.raise_signal(signal.SIGTERM)
    time.sleep(0.1)
print(bool(stop))
time.sleep(2)
print("counted once")
signal.raise_signal(signal.SIGINT)
time.sleep(60)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (result.stdout, result.returncode) == ("True\ncounted once\n", 128 + signal.SIGINT), result.stderr
    assert result.stderr.startswith("SIGTERM: ")
    assert len(result.stderr.splitlines()) == 1
