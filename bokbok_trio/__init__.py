"""Requests between two Trio programs, in both directions of one connection, encrypted with a shared key.

`open_connection` dials, `open_reconnecting` dials again when a connection is lost, and `serve` and
`open_server` accept. A `Connection` sends requests, and its handlers answer those of the peer. These are the
exceptions::

    BokbokError
     ├── AddressError            (a ValueError)
     ├── HandshakeError
     │    ├── AuthenticationError
     │    └── ConnectionRefused
     ├── ConnectionClosed        (a trio.ClosedResourceError)
     ├── ConnectionLost          (a trio.BrokenResourceError)
     ├── ProtocolError
     ├── MessageTooLarge
     ├── RemoteError
     └── RequestError
"""

from ._addresses import (
    Address as Address,
    TCPAddress as TCPAddress,
    UnixAddress as UnixAddress,
)
from ._client import open_connection as open_connection
from ._combined import (
    CombinedHandler as CombinedHandler,
    add_handler as add_handler,
    find_handler as find_handler,
)
from ._connection.channel import Channel as Channel
from ._connection.connection import Connection as Connection
from ._connection.current import CurrentRequest as CurrentRequest, current_request as current_request
from ._errors import (
    AddressError as AddressError,
    AuthenticationError as AuthenticationError,
    BokbokError as BokbokError,
    ConnectionClosed as ConnectionClosed,
    ConnectionLost as ConnectionLost,
    ConnectionRefused as ConnectionRefused,
    HandshakeError as HandshakeError,
    MessageTooLarge as MessageTooLarge,
    ProtocolError as ProtocolError,
    RemoteError as RemoteError,
    RequestError as RequestError,
)
from ._keyring import Keyring as Keyring
from ._keys import Key as Key, passphrase_to_key as passphrase_to_key
from ._reconnecting import (
    ReconnectingConnection as ReconnectingConnection,
    open_reconnecting as open_reconnecting,
)
from ._server import (
    Server as Server,
    open_server as open_server,
    serve as serve,
)
from ._settings import Settings as Settings
from ._sockets import PeerCredentials as PeerCredentials
from ._statistics import (
    ConnectionStatistics as ConnectionStatistics,
    ServerStatistics as ServerStatistics,
)
from ._types import (
    ChannelHandler as ChannelHandler,
    ConnectionHandler as ConnectionHandler,
    Context as Context,
    Field as Field,
    Fields as Fields,
    PeerUser as PeerUser,
    RequestHandler as RequestHandler,
    UserKey as UserKey,
)

__version__ = "0.1.0"

# Tracebacks, reprs and pickles show the public name and not the file.
for _public in list(globals().values()):
    if getattr(_public, "__module__", "").startswith("bokbok_trio."):
        _public.__module__ = "bokbok_trio"
