"""One of the two processes of a measurement; `pair` starts them.

python benchmarks/peer.py server ADAPTER     prints its address, and serves
python benchmarks/peer.py client ADAPTER     reads what to run, a line of JSON each, and prints the result
"""

import ctypes
import json
import resource
import signal
import sys
import traceback
from dataclasses import asdict
from functools import partial
from typing import Any

import adapters
from adapters.base import Adapter, Unsupported
from scenarios import SCENARIOS, Client, scale, transfer

MORE_SCENARIOS: dict[str, Any] = {"scale": scale, "transfer": transfer}
"""Those of `scaling.py`, which take arguments."""

PR_SET_PDEATHSIG = 1


async def run_scenarios(adapter: Adapter) -> None:
    """Run what standard input says; between two lines nothing is open, so the event loop may block."""
    for line in sys.stdin:
        order = json.loads(line)
        scenario = (SCENARIOS | MORE_SCENARIOS)[order["scenario"]]
        client = Client(adapter, order["address"], order["server"], order["seconds"])
        try:
            answer = asdict(await scenario(client, **order["arguments"]))
        except Exception as exc:  # noqa: BLE001  (it is reported, whatever it is)
            reason = find_reason(exc)
            answer = {"unsupported": reason} if reason else {"error": traceback.format_exc()}
        print(json.dumps(answer), flush=True)


def find_reason(exc: BaseException) -> str | None:
    """The message of an `Unsupported`, which an event loop may have put into a group."""
    if isinstance(exc, BaseExceptionGroup):
        return next(filter(None, map(find_reason, exc.exceptions)), None)
    return str(exc) if isinstance(exc, Unsupported) else None


def main(side: str, name: str) -> None:
    """Be one side."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # never outlive the driver
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    adapter = adapters.load(name)
    announce = partial(print, flush=True)
    adapter.run(partial(adapter.serve, announce) if side == "server" else partial(run_scenarios, adapter))


if __name__ == "__main__":
    main(*sys.argv[1:])
