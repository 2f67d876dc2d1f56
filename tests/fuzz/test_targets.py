"""Honest files are taken by the readers that are fuzzed, and what fuzzers and attackers have found is refused."""

from pathlib import Path

import pytest
from targets import TARGETS, run

FINDS = sorted(path for path in (Path(__file__).parent / "finds").glob("*/*") if path.is_file())


@pytest.mark.parametrize("name", TARGETS)
def test_honest_files_are_taken(name):
    target = TARGETS[name]
    seeds = target.seeds()
    assert seeds and all(run(target, seed) for seed in seeds)


@pytest.mark.parametrize("name", TARGETS)
def test_other_bytes_are_refused_by_a_documented_error(name):
    for content in (b"", b"[]", b"\0" * 100, b"[" * 1000):
        assert not run(TARGETS[name], content)


@pytest.mark.parametrize("path", FINDS, ids=[f"{path.parent.name} {path.name}" for path in FINDS])
def test_finds_of_the_fuzzer_are_taken_or_refused_by_a_documented_error(path):
    run(TARGETS[path.parent.name], path.read_bytes())
