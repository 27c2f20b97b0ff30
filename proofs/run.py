"""Ask ProVerif all questions, of the protocol as it is and of weakened ones, and compare the answers.

Every model asks its questions of `handshake.pvl`. A mutant is that text with something taken out of the
protocol. A proof that held for a mutant too would prove nothing, so ProVerif must find an attack on each.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

HERE: Final = Path(__file__).parent
HANDSHAKE: Final = HERE / "handshake.pvl"
MOST_SECONDS: Final = 600
"""Seconds that one model may take. The slowest takes two."""

MODELS: Final[dict[str, list[bool]]] = {
    "authentication": [True, True, True, True, False, False],
    "forward_secrecy": [True, True],
    "ephemeral_known": [True, True, True, True, True, True],
    "listener": [True],
    "guess_listening": [True],
    "selfie_mended": [True, False],
    "selfie": [False],
    "guess_active": [False],
    "leaked_before": [False, False],
}
"""What ProVerif must say of the questions of each model, in their order."""


class Mutant(NamedTuple):
    """A weakened protocol.

    Arguments:
        name: what it lacks.
        model: which finds it.
        changes: texts to be replaced, in all places where they stand, and what by.
    """

    name: str
    model: str
    changes: Sequence[tuple[str, str]]


CHANNEL_IN_THE_CLEAR: Final = ("B_shake_c2s(ee, h0)", "B_shake_c2s(basepoint, h0)")

MUTANTS: Final = [
    Mutant("h1 without h0", "authentication", [("B_open((h0, service, O))", "B_open((service, O))")]),
    Mutant("h1 without the service", "authentication", [("B_open((h0, service, O))", "B_open((h0, O))")]),
    Mutant("h1 without the service", "selfie_mended", [("B_open((h0, service, O))", "B_open((h0, O))")]),
    Mutant(
        "h1 without the user",
        "ephemeral_known",
        [("let O = (OPEN, user, limits, options) in", "let O = (OPEN, limits, options) in")],
    ),
    Mutant(
        "h1 without the client's options",
        "ephemeral_known",
        [("let O = (OPEN, user, limits, options) in", "let O = (OPEN, user, limits) in")],
    ),
    Mutant(
        "h1 without the client's limits",
        "ephemeral_known",
        [("let O = (OPEN, user, limits, options) in", "let O = (OPEN, user, options) in")],
    ),
    Mutant(
        "h2 without the server's options",
        "ephemeral_known",
        [("let A = (ACCEPTED, limits_s, options_s) in", "let A = (ACCEPTED, limits_s) in")],
    ),
    Mutant(
        "h2 without the server's limits",
        "ephemeral_known",
        [("let A = (ACCEPTED, limits_s, options_s) in", "let A = (ACCEPTED, options_s) in")],
    ),
    Mutant("h2 without h1 and the box", "ephemeral_known", [("B_accept((h1, box, A))", "B_accept(A)")]),
    Mutant(
        "a box that needs no key of the user", "authentication", [("B_box(K, h1)", "B_shake_c2s(ee, h1)")]
    ),
    Mutant(
        "a proof that needs no key of the user",
        "authentication",
        [("B_server(K, h2)", "B_accept((SERVER, h2))")],
    ),
    Mutant("a proof that is not checked", "authentication", [("if proof_s = B_server(K, h2) then", "")]),
    Mutant("hs without ee: users show", "listener", [CHANNEL_IN_THE_CLEAR]),
    Mutant("hs without ee: guesses can be tested", "guess_listening", [CHANNEL_IN_THE_CLEAR]),
    Mutant(
        "hs and fk without ee",
        "forward_secrecy",
        [
            CHANNEL_IN_THE_CLEAR,
            ("B_final_c2s(K, (session_key, ee, h2))", "B_final_c2s(K, (session_key, h2))"),
            ("B_final_s2c(K, (session_key, ee, h2))", "B_final_s2c(K, (session_key, h2))"),
        ],
    ),
    Mutant(
        "fk without the user's key and the session key",
        "ephemeral_known",
        [
            ("B_final_c2s(K, (session_key, ee, h2))", "B_shake_c2s(ee, h2)"),
            ("B_final_s2c(K, (session_key, ee, h2))", "B_shake_s2c(ee, h2)"),
        ],
    ),
    Mutant(
        "one key for both directions",
        "authentication",
        [("let s2c = B_final_s2c(", "let s2c = B_final_c2s(")],
    ),
    Mutant(
        "one nonce for all records",
        "authentication",
        [("(c2s, n1,", "(c2s, n0,"), ("(s2c, n1,", "(s2c, n0,")],
    ),
]


def ask(proverif: str, model: str, handshake: Path = HANDSHAKE) -> list[bool | None]:
    """The answers to the questions of a model, in their order; None where ProVerif could not tell."""
    done = subprocess.run(
        [proverif, "-lib", str(handshake), str(HERE / f"{model}.pv")],
        capture_output=True,
        text=True,
        timeout=MOST_SECONDS,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{model}: proverif failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    verdicts: dict[str, bool | None] = {"is true.": True, "is false.": False, "cannot be proved.": None}
    answers = [line for line in done.stdout.splitlines() if line.startswith("RESULT ") and line[7] != "("]
    return [next(value for end, value in verdicts.items() if line.endswith(end)) for line in answers]


def weaken(changes: Sequence[tuple[str, str]]) -> str:
    """The protocol with these changes."""
    text = HANDSHAKE.read_text()
    for old, new in changes:
        if old not in text:
            raise SystemExit(f"handshake.pvl does not have {old!r} any more: mend the mutant")
        text = text.replace(old, new)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--proverif", default=shutil.which("proverif"), help="the program, if not on the PATH"
    )
    proverif = parser.parse_args().proverif
    if proverif is None:
        raise SystemExit("proverif is not installed: see proofs/README.rst")
    if unchecked := {model for model, answers in MODELS.items() if True in answers} - {
        m.model for m in MUTANTS
    }:
        raise SystemExit(f"no mutant for what is proved: {unchecked}")
    failed = 0

    def judge(what: str, *, good: bool, since: float, said: list[bool | None]) -> None:
        nonlocal failed
        failed += not good
        words = ", ".join({True: "true", False: "false", None: "unknown"}[each] for each in said)
        seconds = time.perf_counter() - since
        print(f"{'good' if good else 'BAD '}  {seconds:5.1f} s  {what}: {words}", flush=True)

    for model, expected in MODELS.items():
        since = time.perf_counter()
        said = ask(proverif, model)
        judge(model, good=said == expected, since=since, said=said)
    with tempfile.TemporaryDirectory() as folder:
        handshake = Path(folder, "handshake.pvl")
        for mutant in MUTANTS:
            handshake.write_text(weaken(mutant.changes))
            since = time.perf_counter()
            said = ask(proverif, mutant.model, handshake)
            expected = MODELS[mutant.model]
            # Found is what can be attacked; not to be able to prove it is not enough.
            found = any(was and now is False for was, now in zip(expected, said, strict=True))
            judge(f"mutant: {mutant.name} ({mutant.model})", good=found, since=since, said=said)
    print(f"{len(MODELS) + len(MUTANTS) - failed} passed, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
