"""What fuzzing (`tests/fuzzing.py`) found once is refused in one line; and its targets take their valid inputs."""

from pathlib import Path

import pytest

from tests.fuzzing import TARGETS, check, seeds

CRASHES = sorted((Path(__file__).parent / "crashes").glob("*-*"))


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_takes_its_seeds_and_refuses_halves_of_them(name):
    for content in seeds(name):
        check(TARGETS[name], content)
        check(TARGETS[name], content[: len(content) // 2])
    TARGETS[name](seeds(name)[0])


@pytest.mark.parametrize("path", CRASHES, ids=lambda path: path.name)
def test_what_crashed_a_reader_once_is_refused_in_one_line(path):
    check(TARGETS[path.name.partition("-")[0]], path.read_bytes())
