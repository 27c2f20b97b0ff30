"""Mutations of the package. Each breaks a claim of ``docs/security.rst``, and a test must find it.

``nox -s mutations`` makes a copy of the package for each, mutates it, runs that one test and sees it fail. So
the test performs the attack, and does not pass by luck. ``nox -s mutations -- NAME...`` tries some only.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, NamedTuple

ROOT: Final = Path(__file__).parents[2]
PACKAGE: Final = "bokbok_trio"
MOST_SECONDS: Final = 30
"""Seconds that a test may take. If a mutation makes the test hang, the test has found it."""


class Mutation(NamedTuple):
    """A change of the package that a test must find.

    Arguments:
        name: the name in the security text.
        file: the file of the package that it changes.
        old: a text that is in the file exactly once.
        new: the text that replaces it.
        test: the file and function of the test that must find it.
    """

    name: str
    file: str
    old: str
    new: str
    test: str


MUTATIONS: Final = [
    # ---- nobody without the user's key gets in ----
    Mutation(
        "any-key-fits",
        "_keys.py",
        "        return self._raw\n",
        "        return bytes(KEY_SIZE)\n",
        "public/test_server_admission.py::test_users_get_in_with_a_key_of_theirs_only",
    ),
    Mutation(
        "h1-without-service",
        "_protocol/key_schedule.py",
        "h0 + bytes((len(service),)) + service + open_packet)",
        "h0 + open_packet)",
        "public/test_server_admission.py::test_services_must_agree",
    ),
    Mutation(
        "busy-before-key",
        "_stream/establish.py",
        "                place.note_failure()\n",
        "                if (full := admit(None)) is not None:\n"
        "                    raise await _refuse(stream, full) from None\n",
        "public/test_server_admission.py::test_without_the_key_nobody_is_told_that_the_server_is_full",
    ),
    Mutation(
        "h1-unchecked",
        "_protocol/handshake.py",
        "if hmac.compare_digest(opened[KEY_SIZE:], self._h1) and at < len(own):",
        "if at < len(own):",
        "protocol/test_handshake_messages.py::test_a_box_under_the_right_key_must_hold_the_hash",
    ),
    Mutation(
        "h1-without-user",
        "_protocol/handshake.py",
        "self._service, encode_packet(*fields))",
        "self._service, encode_packet(*fields[2:]))",
        "protocol/test_handshake_attacks.py::test_a_box_for_one_user_opens_for_no_other_with_the_same_key",
    ),
    # ---- nobody without the user's key poses as the server ----
    Mutation(
        "proof-unchecked",
        "_protocol/handshake.py",
        "        if not hmac.compare_digest(proof, make_proof(self.key, h2)):\n",
        "        if len(proof) != KEY_SIZE:\n",
        "public/test_client.py::test_a_fake_server_is_found_out",
    ),
    Mutation(
        "proof-without-key",
        "_protocol/key_schedule.py",
        'return keyed_hash(32, key.raw, b"bokbok1 server", h2)',
        'return keyed_hash(32, b"", b"bokbok1 server", h2)',
        "protocol/test_handshake_messages.py::test_a_server_that_only_knows_another_key_proves_nothing",
    ),
    Mutation(
        "limits-before-proof",
        "_protocol/handshake.py",
        "                final_keys = self._check_proof([max_message_size, max_requests, options], proof)\n"
        "                peer_options = decode_options(options)\n",
        "                peer_options = decode_options(options)\n"
        "                final_keys = self._check_proof([max_message_size, max_requests, options], proof)\n",
        "protocol/test_handshake_messages.py::test_nothing_is_believed_before_the_proof",
    ),
    # ---- nobody in the middle ----
    Mutation(
        "h1-without-hellos",
        "_protocol/key_schedule.py",
        "h0 + bytes((len(service),)) + service + open_packet)",
        "bytes((len(service),)) + service + open_packet)",
        "public/test_attacks.py::test_an_impostor_between_the_two_can_pass_on_neither_box_nor_proof",
    ),
    Mutation(
        "h2-without-h1",
        "_protocol/key_schedule.py",
        'return keyed_hash(32, b"", b"bokbok1 accept", h1 + box + accepted_packet)',
        'return keyed_hash(32, b"", b"bokbok1 accept", accepted_packet)',
        "protocol/test_handshake_attacks.py::test_a_recorded_server_session_does_not_open_again",
    ),
    # ---- nobody changes the options of the handshake ----
    Mutation(
        "h1-without-options",
        "_protocol/handshake.py",
        "self._service, encode_packet(*fields))",
        "self._service, encode_packet(*fields[:4]))",
        "protocol/test_handshake_messages.py::test_options_are_bound_by_the_hashes",
    ),
    Mutation(
        "options-before-box",
        "_protocol/handshake.py",
        "        self._claimed_options = decode_options(options)\n",
        "        self._claimed_options = self.peer_options = decode_options(options)\n",
        "protocol/test_handshake_messages.py::test_options_are_not_believed_before_the_box_has_opened",
    ),
    # ---- nobody reads ----
    Mutation(
        "nonce-repeats",
        "_stream/records.py",
        "        self._counter += 1\n",
        "        self._counter = (self._counter + 1) % 3\n",
        "stream/test_records.py::test_no_nonce_is_used_twice_under_a_key",
    ),
    Mutation(
        "one-key-both-ways",
        "_protocol/key_schedule.py",
        "return cls(derived[:KEY_SIZE], derived[KEY_SIZE:])",
        "return cls(derived[:KEY_SIZE], derived[:KEY_SIZE])",
        "public/test_attacks.py::test_a_record_out_of_its_place_ends_the_connection",
    ),
    Mutation(
        "child-keeps-keys",
        "_fork.py",
        "            resource.abandon()\n",
        "            pass\n",
        "connection/test_fork.py::test_it_seals_and_opens_nothing",
    ),
    # ---- nothing is altered, reordered, repeated, reflected or cut short unnoticed ----
    Mutation(
        "records-out-of-place",
        "_stream/records.py",
        "        return crypto_secretbox_open(box, self._nonce(), self._key)",
        "        for count in range(self._counter + 3):\n"
        "            try:\n"
        "                nonce = count.to_bytes(_NONCE_SIZE, 'big')\n"
        "                opened = crypto_secretbox_open(bytes(box), nonce, self._key)\n"
        "            except CryptoError:\n"
        "                continue\n"
        "            self._counter = count + 1\n"
        "            return opened\n"
        "        return crypto_secretbox_open(bytes(box), self._nonce(), self._key)",
        "public/test_attacks.py::test_a_record_out_of_its_place_ends_the_connection",
    ),
    Mutation(
        "seal-unchecked",
        "_stream/records.py",
        "        return crypto_secretbox_open(box, self._nonce(), self._key)",
        "        stream = crypto_secretbox(bytes(len(box) - MAC_SIZE), self._nonce(), self._key)[MAC_SIZE:]\n"
        "        return bytes(one ^ other for one, other in zip(box[MAC_SIZE:], stream))",
        "public/test_attacks.py::test_no_changed_byte_of_a_record_is_told_to_a_user",
    ),
    Mutation(
        "cut-is-an-end",
        "_stream/records.py",
        '            raise self._broken("the stream was cut short: it ended without an end record")',
        "            self.has_ended = True",
        "public/test_attacks.py::test_an_end_that_nobody_sealed_is_no_end",
    ),
    Mutation(
        "end-unsealed",
        "_stream/records.py",
        "            plaintext = None\n",
        '            plaintext = b"" if size == MAC_SIZE else None\n',
        "stream/test_secretbox_stream.py::test_an_empty_record_must_be_sealed_to_be_an_end",
    ),
    Mutation(
        "failed-record-is-skipped",
        "_stream/records.py",
        "        self.failure = reason\n",
        "",
        "stream/test_records.py::test_a_failed_record_ends_receiving_though_good_ones_follow",
    ),
    Mutation(
        "own-hello-comes-back",
        "_protocol/handshake.py",
        "        if theirs == self._public:\n",
        "        if False:\n",
        "protocol/test_handshake_messages.py::test_our_own_key_is_refused",
    ),
    # ---- a silent drop is noticed in time ----
    Mutation(
        "silence-is-fine",
        "_connection/watchdog.py",
        "        if now >= stuck_at or is_asked:\n",
        "        if now >= stuck_at:\n",
        "connection/test_watchdog.py::test_a_peer_that_falls_silent_is_lost_in_time",
    ),
    # ---- a recorded session cannot be replayed ----
    Mutation(
        "secret-is-kept",
        "_protocol/handshake.py",
        'self._secret = randomness(EPHEMERAL_SIZE) if sealed else b""',
        'self._secret = bytes(31) + self.side[:1].encode() if sealed else b""',
        "public/test_attacks.py::test_a_recorded_session_gets_in_nowhere",
    ),
    # ---- recordings stay unreadable when a user's key leaks later ----
    Mutation(
        "keys-without-ee",
        "_protocol/key_schedule.py",
        'keyed_hash(64, ee, b"bokbok1 shake", h0)',
        'keyed_hash(64, b"", b"bokbok1 shake", h0)',
        "protocol/test_handshake_attacks.py::test_a_recording_stays_unreadable_to_who_has_the_key_later",
    ),
    # ---- a listener learns neither the user name nor its length ----
    Mutation(
        "no-pad",
        "_protocol/handshake.py",
        "fields[-1] = bytes(OPEN_SIZE - len(encode_packet(*fields, bytes(BOX_SIZE))))",
        'fields[-1] = b""',
        "protocol/test_handshake.py::test_open_is_512_bytes_whatever_the_name_the_limits_and_the_options",
    ),
    Mutation(
        "open-in-the-clear",
        "_stream/establish.py",
        "                await send_packet(stream, handshake.open())\n",
        "                await send_packet(fast, handshake.open())\n",
        "stream/test_establish_attacked.py::test_a_listener_sees_neither_the_user_name_nor_its_length",
    ),
    # ---- an unknown user and a wrong key look the same ----
    Mutation(
        "refused-at-once",
        "_stream/establish.py",
        "                if handshake.sealed:  # a peer that the system names has nothing to guess\n",
        "                if handshake.sealed and keys:\n",
        "stream/test_establish_refused.py::test_every_refusal_of_a_user_looks_the_same_and_comes_at_the_same_time",
    ),
    Mutation(
        "tries-tell",
        "_protocol/handshake.py",
        "        for at in range(MAX_KEYS):\n",
        "        for at in range(max(1, len(own))):\n",
        "protocol/test_handshake.py::test_whoever_does_not_get_in_takes_the_same_path",
    ),
    # ---- a keyed client never talks plain, a keyed server never answers plain ----
    Mutation(
        "client-talks-plain",
        "_stream/establish.py",
        "        user=user, key=key, service=service, limits",
        '        user=None, key=None, service="", limits',
        "public/test_server_admission.py::test_nothing_falls_back",
    ),
    Mutation(
        "server-answers-plain",
        "_stream/establish.py",
        "sealed=user_key is not None, service",
        "sealed=False, service",
        "public/test_server_admission.py::test_nothing_falls_back",
    ),
    # ---- a stranger costs the server little ----
    Mutation(
        "reads-all",
        "_stream/secretbox.py",
        "await self._transport.receive_some(HEADER_SIZE + opener.max_record_size)",
        "await self._transport.receive_some(2**20)",
        "stream/test_secretbox_stream.py::test_reads_ask_for_no_more_than_a_record_of_the_limit",
    ),
    Mutation(
        "any-number-of-keys",
        "_protocol/handshake.py",
        "        own = keys[:MAX_KEYS]\n        for at in range(MAX_KEYS):\n",
        "        own = keys\n        for at in range(max(MAX_KEYS, len(own))):\n",
        "protocol/test_handshake.py::test_no_more_than_max_keys_are_tried",
    ),
    Mutation(
        "timeout-forgotten",
        "_stream/establish.py",
        "    scope.deadline = began + settings.handshake_timeout\n",
        "",
        "stream/test_establish_fails.py::test_a_peer_that_stalls_at_any_call_is_given_the_timeout",
    ),
    Mutation(
        "anybody-is-displaced",
        "_places.py",
        "        return self._by_size[self.largest].draw()\n",
        "        return next(iter(self._crowds.values()))\n",
        "public/test_places.py::test_room_is_made_within_the_source_that_has_most_of_those_who_may_be_displaced",
    ),
    Mutation(
        "looked-up-is-displaced",
        "_places.py",
        'only in `take_turn`."""\n        self._exit()\n',
        'only in `take_turn`."""\n',
        "public/test_herd.py::test_a_newcomer_displaces_nobody_whose_user_is_looked_up",
    ),
    # ---- a channel holds no more than its credit ----
    Mutation(
        "credit-unchecked",
        "_protocol/flow_control.py",
        "        if self.receive_credit <= 0:\n",
        "        if False:\n",
        "connection/test_channel_packets.py::test_a_lying_peer_loses_the_connection",
    ),
    Mutation(
        "items-cost-nothing",
        "_protocol/flow_control.py",
        "        self.receive_credit -= size + ITEM_COST\n",
        "        self.receive_credit -= size\n",
        "protocol/test_second_implementation.py::test_both_count_the_credit_of_the_second_implementations_items_alike",
    ),
    # ---- one connection holds no more than its budget, and does not hold up others ----
    Mutation(
        "budget-unchecked",
        "_protocol/remote_requests.py",
        "        if not others or self._held_total <= self.budget.requests:\n",
        "        if True:\n",
        "protocol/test_budget.py::test_a_peer_that_sends_too_much_is_refused_and_may_ask_again",
    ),
    Mutation(
        "slow-reader-stays",
        "_connection/watchdog.py",
        "            return sent < waiting_then and sent < self._least_rate * (now - since)\n",
        "            return False\n",
        "protocol/test_budget.py::test_a_peer_that_reads_too_slowly_is_lost",
    ),
    Mutation(
        "all-at-once",
        "_protocol/packets.py",
        "            if count == MAX_AT_ONCE:\n",
        "            if count == 2**30:\n",
        "protocol/test_interpreter.py::test_very_many_packets_are_decoded_some_at_a_time",
    ),
    Mutation(
        "nonsense-unbounded",
        "_protocol/interpreter.py",
        "        self._ignored += 1\n",
        "",
        "protocol/test_interpreter.py::test_packets_that_mean_nothing_are_bounded",
    ),
    # ---- no key material is shown ----
    Mutation(
        "key-shows-itself",
        "_keys.py",
        '        return "<Key>"\n',
        '        return f"<Key {self._raw!r}>"\n',
        "public/test_keys.py::test_a_key_does_not_show_itself",
    ),
    Mutation(
        "keys-show-themselves",
        "_protocol/key_schedule.py",
        '        return "<DirectionKeys>"\n',
        '        return f"<DirectionKeys {self.c2s!r}>"\n',
        "protocol/test_handshake_attacks.py::test_nothing_secret_shows_in_a_repr_an_error_or_a_log",
    ),
    Mutation(
        "error-shows-key",
        "_protocol/handshake.py",
        'raise AuthenticationError("the server did not prove that it knows the key")',
        'raise AuthenticationError(f"the server did not prove that it knows the key {self.key.raw!r}")',
        "public/test_attacks.py::test_no_key_shows_in_anything_that_a_program_keeps",
    ),
    Mutation(
        "closed-keeps-keys",
        "_stream/secretbox.py",
        "            self._drop_keys(_CLOSED)\n",
        "            pass\n",
        "connection/test_connection_end.py::test_a_connection_that_is_kept_has_no_keys_any_more",
    ),
    Mutation(
        "key-is-pickled",
        "_keys.py",
        '        raise TypeError("a key is not pickled: pass the path of its file, and load it there")\n',
        "        return Key, (self._raw,)\n",
        "public/test_keys.py::test_a_key_is_not_pickled",
    ),
    # ---- on a plain UNIX-domain socket, only those get in whom `peer_user` names ----
    Mutation(
        "nameless-get-in",
        "_stream/identify.py",
        '    raise AuthenticationError(f"peer_user has no name for {credentials}")\n',
        '    return ""\n',
        "public/test_server_admission.py::test_whom_peer_user_does_not_name_is_refused_before_all_else",
    ),
]


def mutate(mutation: Mutation) -> str:
    """Return the mutated text of the file of a mutation.

    Raises:
        ValueError: the text is not in it exactly once.
    """
    text = (ROOT / PACKAGE / mutation.file).read_text(encoding="utf-8")
    if text.count(mutation.old) != 1:
        raise ValueError(
            f"{mutation.name}: {mutation.file} has {mutation.old!r} {text.count(mutation.old)} times"
        )
    return text.replace(mutation.old, mutation.new)


def run_tests(mutation: Mutation | None, tests: list[str]) -> tuple[int, str]:
    """Run tests on a mutated copy. Return pytest's exit code and output; the code is 1 if the tests hang."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for folder in (PACKAGE, "tests", "docs"):
            shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", root)
        if mutation is not None:
            (root / PACKAGE / mutation.file).write_text(mutate(mutation), encoding="utf-8")
        try:
            done = subprocess.run(
                [sys.executable, "-m", "pytest", "-q", "-x", *(f"tests/{test}" for test in tests)],
                cwd=root,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=MOST_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return 1, "it hangs"
    return done.returncode, done.stdout + done.stderr


def attempt(mutation: Mutation) -> bool:
    """Whether the test finds the mutation."""
    since = time.perf_counter()
    code, said = run_tests(mutation, [mutation.test])
    found = code == 1  # 2 and more: the test did not run at all
    seconds = time.perf_counter() - since
    line = f"{'found ' if found else 'MISSED'} {seconds:5.1f} s  {mutation.name}: {mutation.test}"
    print(line if found else f"{line}\n{said[-2000:]}", flush=True)  # noqa: T201
    return found


def main() -> None:
    names = sys.argv[1:] or [mutation.name for mutation in MUTATIONS]
    chosen = [mutation for mutation in MUTATIONS if mutation.name in names]
    if len(chosen) != len(names):
        raise SystemExit(f"the names are {', '.join(mutation.name for mutation in MUTATIONS)}")
    code, said = run_tests(None, sorted({mutation.test for mutation in chosen}))
    if code:
        raise SystemExit(f"the tests fail without any mutation:\n{said[-4000:]}")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = sum(pool.map(attempt, chosen))
    print(f"{found} passed, {len(chosen) - found} failed")  # noqa: T201
    sys.exit(found < len(chosen))


if __name__ == "__main__":
    main()
