"""Fuzz one target, which libFuzzer is told of on the command line: see `fuzz.run`."""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["bokbok_trio", "tests"]):
    from fuzz.targets import TARGETS

if __name__ == "__main__":
    target = TARGETS[sys.argv[1]]
    atheris.Setup([sys.argv[0], *sys.argv[2:]], target)
    atheris.Fuzz()
