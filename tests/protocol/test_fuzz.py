"""The targets of the fuzzer: their seeds, inputs that found a fault once, and planted bugs."""

from __future__ import annotations

from pathlib import Path

import pytest

from fuzz import packets, seeds
from fuzz.planted import PLANTED, Planted, plant
from fuzz.scripts import Fault
from fuzz.targets import TARGETS

FOUND = Path(__file__).parents[2] / "fuzz" / "found"


@pytest.mark.parametrize("target", TARGETS)
def test_seeds_and_inputs_that_found_a_fault_once(target: str) -> None:
    inputs = seeds.make_seeds()[target]
    assert len(inputs) > 10
    found = [path.read_bytes() for path in sorted((FOUND / target).glob("*"))]
    for data in (*inputs, *found):
        TARGETS[target](data)


def test_a_target_tells_of_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packets, "decode_text", lambda field: bytes(field).decode("latin-1"))
    with pytest.raises(Fault, match="is due"):
        TARGETS["packets"](b"\0\0\xff")


@pytest.mark.parametrize("planted", PLANTED, ids=lambda planted: str(planted.what))
def test_every_planted_bug_applies(planted: Planted) -> None:
    compile(plant(planted), planted.file, "exec")
    assert planted.target in TARGETS
