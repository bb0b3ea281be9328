"""What a test run prints at its end, and the order in which files are handed to the workers."""

import os
import re
from collections import defaultdict

import pytest

# The files that take longest after LADDER, longest first, so that no worker is left alone with one of them at the end.
LONGEST = [
    "parity_tests/test_mutants.py",  # in `make parity`
    "tests/web/test_browser.py",
    "parity_tests/test_12_finetuning.py",
    "tests/training/test_train.py",
    "tests/finetuning/test_finetune.py",
    "tests/generation/test_generate.py",
    "tests/finetuning/test_preferences.py",
    "tests/training/test_resume.py",
    "parity_tests/test_7_training.py",
    "tests/model/test_model.py",
    "tests/training/test_survival.py",
    "tests/web/test_app.py",
    "parity_tests/test_8_generation.py",
    "parity_tests/test_11_evaluation.py",
    "parity_tests/test_4_modules.py",
    "tests/generation/test_engine.py",
    "tests/generation/test_slots.py",
    "tests/serve/test_serve.py",
    "tests/commands/test_chat.py",
    "tests/parallel/test_sharding.py",
    "tests/runs/test_store.py",
    "parity_tests/test_conversion.py",
    "tests/generation/test_quantized.py",
]
# One worker computes the float64 truth for all of these.
LADDER = ["parity_tests/test_1_float64.py", "parity_tests/test_2_float32.py"]
LADDER += ["parity_tests/test_3_bfloat16.py", "parity_tests/test_5_gradients.py"]


def place(nodeid: str) -> str:
    """The rung of the ladder or the package that a test belongs to, as the summary shows it."""
    folder, _, remainder = nodeid.partition("/")
    file = remainder.partition("::")[0]
    if folder == "parity_tests":
        rung = re.fullmatch(r"test_(\d+)_(\w+)\.py", file)
        return f"rung {rung[1]} {rung[2]}" if rung else f"parity {file[len('test_') : -len('.py')].replace('_', ' ')}"
    return file.partition("/")[0] if "/" in file else "project"


def sort_key(name: str) -> tuple:
    """Sorts rungs by number, then the other parity tests, then packages."""
    words = name.split()
    kind = {"rung": 0, "parity": 1}.get(words[0], 2)
    return kind, int(words[1]) if kind == 0 else 0, name


def pytest_collection_modifyitems(items):
    rank = {file: index for index, file in enumerate([*LADDER, *LONGEST])}
    items.sort(key=lambda item: rank.get(item.nodeid.partition("::")[0], len(rank)))  # stable


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        """A worker has all tests of a file, and one worker all files of LADDER."""

        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            return "ladder" if file in LADDER else file

    return ByFile(config, log)


def pytest_terminal_summary(terminalreporter):
    """Prints a line per rung and package, what was not checked and why, and the three slowest tests."""
    seconds, outcomes, tests = defaultdict(float), defaultdict(lambda: defaultdict(int)), defaultdict(float)
    skipped = defaultdict(int)
    for outcome, reports in terminalreporter.stats.items():
        for report in reports:
            if not isinstance(report, pytest.TestReport):  # of a file that cannot be imported, or a warning
                continue
            name = place(report.nodeid)
            seconds[name] += report.duration
            tests[report.nodeid] += report.duration
            if outcome in ("passed", "failed", "error"):  # reports of a passed setup or teardown stand under ""
                outcomes[name][outcome] += 1
            elif outcome == "skipped":
                reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
                skipped[f"{name}: {reason.removeprefix('Skipped: ')}"] += 1
    if not tests:
        return
    write = terminalreporter.write_line
    terminalreporter.section("what this run showed")
    for name in sorted(outcomes, key=sort_key):
        bad = sum(count for outcome, count in outcomes[name].items() if outcome != "passed")
        failed = f", {bad} FAILED" if bad else ""
        write(f"{name:<24}{outcomes[name]['passed']:>6} claims hold{failed:<12}{seconds[name]:>8.0f} s")
    if os.environ.get("SMOLLM_WITHOUT_TORCH"):
        write("not checked: what needs PyTorch, parity_tests among it; make test without TORCH=0 installs it")
    for reason, count in skipped.items():
        write(f"not checked: {count} tests of {reason}")
    slowest = sorted(tests, key=tests.get, reverse=True)[:3]
    write("slowest: " + "; ".join(f"{nodeid} {tests[nodeid]:.0f} s" for nodeid in slowest))
