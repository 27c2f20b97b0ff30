"""One small file for each library that is measured, and `base`, what they have in common."""

import pkgutil

from .base import Adapter

WHERE = {
    "bare": "bare:Bare",
    "bare pipelined": "bare:Pipelined",
    "bare TLS": "bare_tls:BareTLS",
    "bokbok plain": "bokbok:Plain",
    "bokbok sealed": "bokbok:Sealed",
    "typed plain": "bokbok_typed:TypedPlain",
    "typed sealed": "bokbok_typed:TypedSealed",
    "grpc.aio": "grpc_aio:GrpcAio",
    "RPyC": "rpyc_sync:Rpyc",
    "aiorpcX/uvloop": "aiorpcx_uvloop:AiorpcX",
    "Pyro5": "pyro:Pyro",
    "pycapnp": "capnp_asyncio:Pycapnp",
    "Twisted AMP": "twisted_amp:TwistedAMP",
    "zerorpc": "zerorpc_gevent:Zerorpc",
}
"""The name of each adapter, as tables show it, and its class. What all are compared to comes first."""

YARDSTICK = "bare"
OURS = ("bare", "bare pipelined", "bare TLS", "bokbok plain", "bokbok sealed", "typed plain", "typed sealed")


def load(name: str) -> Adapter:
    """Import an adapter, and with it its library."""
    adapter: type[Adapter] = pkgutil.resolve_name(f"adapters.{WHERE[name]}")
    return adapter()
