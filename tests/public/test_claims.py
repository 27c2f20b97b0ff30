"""Each claim of the security text has a test, and a mutation that this test finds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ..support.mutations import MUTATIONS, Mutation, mutate

TESTS = Path(__file__).parents[1]
TEXT = (TESTS.parent / "docs" / "security.rst").read_text(encoding="utf-8")
LINE = re.compile(
    r"^- ``(\w+/test_\w+\.py::test_\w+)``(?:\s+\(finds ((?:``[a-z0-9-]+``(?:, )?)+)\))?$", re.MULTILINE
)


def test_the_tests_named_in_the_security_text_exist() -> None:
    named = [line[1] for line in LINE.finditer(TEXT)]
    assert len(named) == TEXT.count("::test_") >= 10
    for test in named:
        file, name = test.split("::")
        source = (TESTS / file).read_text(encoding="utf-8")
        assert re.search(rf"^(?:async )?def {name}\(", source, re.MULTILINE), test


def test_every_claim_has_a_mutation_that_its_test_finds() -> None:
    claims = TEXT[TEXT.index("What is claimed\n") : TEXT.index("What is not claimed\n")]
    for claim in re.split(r"^-+$", claims, flags=re.MULTILINE)[1:]:
        assert "(finds ``" in claim, claim
    told = {
        (name, line[1])
        for line in LINE.finditer(claims)
        for name in re.findall(r"``([a-z0-9-]+)``", line[2] or "")
    }
    assert told == {(mutation.name, mutation.test) for mutation in MUTATIONS}
    assert len(told) == len(MUTATIONS)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: str(mutation.name))
def test_every_mutation_applies(mutation: Mutation) -> None:
    compile(mutate(mutation), mutation.file, "exec")
