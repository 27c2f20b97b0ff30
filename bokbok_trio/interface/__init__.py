"""x"""

from ._calls import Call as Call, Middleware as Middleware, Proceed as Proceed
from ._codec import DecodeHook as DecodeHook, EncodeHook as EncodeHook
from ._consuming import consume as consume, with_options as with_options
from ._exposing import Exposed as Exposed, expose as expose
from ._listing import (
    InterfaceInfo as InterfaceInfo,
    MethodInfo as MethodInfo,
    list_interfaces as list_interfaces,
)
from ._marks import idempotent as idempotent, raises as raises
