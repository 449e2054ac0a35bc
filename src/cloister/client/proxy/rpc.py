"""The Open Inference Protocol over gRPC: what tritonclient[grpc] and the like speak.

Served: ServerLive, ServerReady, ModelReady, ServerMetadata, ModelMetadata, ModelInfer. gRPC itself answers
UNIMPLEMENTED to the rest. Browsers don't speak gRPC over plain TCP, so a page can't reach this.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any, Final

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from cloister.client.proxy import tensors
from cloister.client.proxy.fields import require_few
from cloister.client.proxy.forward import Forwarder, require_version, status_of, text_of
from cloister.client.proxy.messages import SERVICE, message
from cloister.client.proxy.room import MAX_REQUESTS, Place
from cloister.client.session import model_path
from cloister.core import oip
from cloister.core.protocol.limits import MAX_INNER_REQUEST
from cloister.errors import CloisterError, FormatError, NotFound

_logger = logging.getLogger("cloister.proxy")
Method = Callable[[Any, Place, Any], Awaitable[Any]]
_ROOM: Final = 1 << 20  # bytes of a message around its tensors
_MAX_MILLISECONDS: Final = 999_999_999
_CODES: Final = {
    HTTPStatus.BAD_REQUEST: grpc.StatusCode.INVALID_ARGUMENT,
    HTTPStatus.FORBIDDEN: grpc.StatusCode.PERMISSION_DENIED,
    HTTPStatus.NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: grpc.StatusCode.RESOURCE_EXHAUSTED,
    HTTPStatus.TOO_MANY_REQUESTS: grpc.StatusCode.RESOURCE_EXHAUSTED,
    HTTPStatus.BAD_GATEWAY: grpc.StatusCode.FAILED_PRECONDITION,  # asking again doesn't help
    HTTPStatus.SERVICE_UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    HTTPStatus.GATEWAY_TIMEOUT: grpc.StatusCode.DEADLINE_EXCEEDED,
}


def rpc_server(forwarder: Forwarder) -> grpc.aio.Server:
    """A server with the protocol's methods; it listens on nothing yet."""
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", MAX_INNER_REQUEST + _ROOM),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),  # a port that is taken is an error
        ],
        maximum_concurrent_rpcs=MAX_REQUESTS,
    )
    server.add_generic_rpc_handlers((_handler(forwarder),))
    return server


def _handler(forwarder: Forwarder) -> grpc.GenericRpcHandler:
    methods = Methods(forwarder)
    served: dict[str, Method] = {
        "ServerLive": methods.server_live,
        "ServerReady": methods.server_ready,
        "ServerMetadata": methods.server_metadata,
        "ModelReady": methods.model_ready,
        "ModelMetadata": methods.model_metadata,
        "ModelInfer": methods.model_infer,
    }
    handlers = {
        name: grpc.unary_unary_rpc_method_handler(
            _guarded(forwarder, message(f"{name}Request"), method),
            response_serializer=lambda answer: answer.SerializeToString(),
        )
        for name, method in served.items()
    }
    return grpc.method_handlers_generic_handler(SERVICE, handlers)


def _guarded(forwarder: Forwarder, kind: Any, method: Method) -> Callable[[bytes, Any], Awaitable[Any]]:
    """A method that takes the request's bytes, and lets only the protocol's errors out."""

    async def serve(raw: bytes, context: Any) -> Any:
        try:
            with forwarder.enter() as place:
                place.hold(len(raw))
                require_few(raw, kind.DESCRIPTOR)
                try:
                    request = kind.FromString(raw)
                except DecodeError as error:
                    raise FormatError(claim="message", expected=kind.DESCRIPTOR.name) from error
                del raw
                return await method(request, place, context)
        except CloisterError as error:
            code = _CODES.get(HTTPStatus(status_of(error)), grpc.StatusCode.INTERNAL)
            await context.abort(code, text_of(error), ((_ERROR, error.code),))
        except Exception as error:
            if isinstance(error, grpc.RpcError | grpc.aio.AbortError):
                raise
            _logger.error("a method failed: %s", type(error).__name__)
            await context.abort(grpc.StatusCode.INTERNAL, "internal: the proxy failed on this request")

    return serve


_ERROR: Final = "cloister-error"


class Methods:
    """The methods; each takes the parsed request, its place and the call's context."""

    def __init__(self, forwarder: Forwarder) -> None:
        self._forwarder = forwarder

    async def server_live(self, request: Any, place: Place, context: Any) -> Any:
        """The proxy is up."""
        return message("ServerLiveResponse")(live=True)

    async def server_ready(self, request: Any, place: Place, context: Any) -> Any:
        """A verified document is held."""
        return message("ServerReadyResponse")(ready=await self._forwarder.ready())

    async def server_metadata(self, request: Any, place: Place, context: Any) -> Any:
        """What an enclave says of itself."""
        found = await self._forwarder.server()
        return _filled(message("ServerMetadataResponse"), found, ("name", "version", "extensions"))

    async def model_ready(self, request: Any, place: Place, context: Any) -> Any:
        """Whether a model is served; one that isn't there is not ready, which is no error."""
        try:
            found = await self._forwarder.model(request.name, "ready", request.version)
        except NotFound:
            found = {}
        return message("ModelReadyResponse")(ready=found.get("ready") is True)

    async def model_metadata(self, request: Any, place: Place, context: Any) -> Any:
        """Inputs and outputs of a model."""
        found = await self._forwarder.model(request.name, "", request.version)
        fields = ("name", "versions", "platform", "inputs", "outputs")
        return _filled(message("ModelMetadataResponse"), found, fields)

    async def model_infer(self, request: Any, place: Place, context: Any) -> Any:
        """Run a model."""
        require_version(version := request.model_version)
        model = await self._forwarder.resolve(request.model_name)
        body, header_length = tensors.to_inner(request)
        place.next_body()
        place.hold(len(body))
        fields = [(b"content-type", b"application/octet-stream"), (oip.HEADER_LENGTH, header_length)]
        remaining = context.time_remaining()
        if remaining is not None:
            milliseconds = min(max(int(remaining * 1e3), 0), _MAX_MILLISECONDS)
            fields.append((b"cloister-deadline-ms", b"%d" % milliseconds))
        path = model_path(model, f"versions/{version}/infer" if version else "infer")
        inner = await self._forwarder.send(model, b"POST", path, tuple(fields), body)
        return tensors.from_inner(memoryview(inner.content), inner.field(oip.HEADER_LENGTH))


def _filled(kind: Any, found: dict[str, Any], names: tuple[str, ...]) -> Any:
    """A message from the JSON of the same form; what the message hasn't is left out."""
    try:
        return kind(**{name: found[name] for name in names if name in found})
    except (TypeError, ValueError) as error:
        raise CloisterError("the enclave's answer can't be read", code="problem") from error
