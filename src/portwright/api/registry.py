"""The contract's table, and the dispatch from a request to the handler of its method.

A method is declared where its parameters are, in :mod:`portwright.api.methods`::

    @method("port.show", result=Port)
    class PortShowParams(Params[Port]):
        "Show one port."
        port: str

and served by an object that has a coroutine function (or, for a stream, an async generator
function) named like the method with ``_`` for ``.``::

    async def port_show(self, params: PortShowParams, request: Request) -> Port: ...

    Server(path, Registry(handlers, cni=handle_cni).dispatch)
"""

from __future__ import annotations

import inspect
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

import msgspec

from portwright.api.errors import ProtocolError
from portwright.api.request import Request
from portwright.model.errors import InvalidInput, NotFound

PROTOCOL: Final = 1
#: What a dispatch gives: bytes for a C request, an async iterator for a stream, else JSON-able.
Answer = object
Result = TypeVar("Result")
ParamsT = TypeVar("ParamsT", bound="type[Params[Any]]")


class Params(
    msgspec.Struct, Generic[Result], frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """Base of every method's parameters; ``Result`` is what the method returns (or streams)."""


@dataclass(frozen=True, slots=True)
class Method:
    """A method of the contract. ``results`` are the types it may return, or its events' type.

    ``fds`` describes the descriptors that have to come with it, in order. ``large``: whether its request
    may be as long as :data:`portwright.api.frames.MAX_LARGE`.
    """

    name: str
    params: type[Params[Any]]
    results: tuple[Any, ...]
    doc: str
    fds: tuple[str, ...]
    stream: bool
    large: bool = False


#: Every declared method, by name. Complete once portwright.api.methods is imported.
CONTRACT: Final[dict[str, Method]] = {}


def method(
    name: str, *results: object, fds: tuple[str, ...] = (), stream: bool = False, large: bool = False
) -> Callable[[ParamsT], ParamsT]:
    """Declare the decorated Params class as the parameters of method ``name``.

    The class's docstring is the method's. Raises TypeError if the name is taken.
    """

    def declare(params: ParamsT) -> ParamsT:
        if name in CONTRACT:
            raise TypeError(f"method {name} is declared twice")
        doc = inspect.cleandoc(params.__doc__ or "")
        CONTRACT[name] = Method(name, params, results, doc, fds, stream, large)
        return params

    return declare


@method("introspect", dict[str, object])
class IntrospectParams(Params[dict[str, object]], frozen=True, kw_only=True):
    """Describe the protocol: every method with its parameters and results as JSON schemas."""


class Registry:
    """Binds the contract's methods to the handlers of one object, and dispatches to them.

    Raises TypeError, naming them all, if handlers are missing.
    """

    def __init__(
        self,
        handlers: object,
        *,
        cni: Callable[[Request], Awaitable[bytes]] | None = None,
        version: str,
        contract: Mapping[str, Method] = CONTRACT,
    ) -> None:
        self._contract = contract
        self._cni = cni
        self._version = version
        self._handlers: dict[str, Callable[[Any, Request], Any]] = {"introspect": self._introspect}
        missing = []
        for name in contract:
            if name in self._handlers:
                continue
            handler = getattr(handlers, name.replace(".", "_"), None)
            if handler is None:
                missing.append(name)
            else:
                self._handlers[name] = handler
        if missing:
            raise TypeError(f"{type(handlers).__name__} has no handler for {', '.join(missing)}")

    async def dispatch(self, request: Request) -> Answer:
        """Serve one request: what :class:`portwright.api.server.Server` calls.

        Raises NotFound for an unknown method, InvalidInput naming the field for wrong parameters
        or missing descriptors, and what the handler raises.
        """
        if request.kind == "C":
            if self._cni is None:
                raise ProtocolError("this socket does not serve CNI")
            return await self._cni(request)
        declared = self._contract.get(request.method)
        if declared is None:
            raise NotFound("method", request.method)
        if request.large and not declared.large:
            raise ProtocolError(f"{declared.name} takes no large request; send it as one of kind J")
        params = convert_params(declared.params, request.params)
        if len(request.fds) < len(declared.fds):
            need = declared.fds[len(request.fds)]
            raise InvalidInput("fds", len(request.fds), f"{declared.name} needs {need} as a file descriptor")
        outcome = self._handlers[declared.name](params, request)
        if isinstance(outcome, AsyncIterator):
            return outcome
        answer: Answer = await outcome
        return answer

    async def _introspect(self, _params: IntrospectParams, _request: Request) -> dict[str, object]:
        return describe(self._version, self._contract)


def describe(version: str, contract: Mapping[str, Method] = CONTRACT) -> dict[str, object]:
    """Return the self-description: protocol and daemon version, and the methods sorted by name."""
    methods = []
    for name in sorted(contract):
        entry = contract[name]
        methods.append(
            {
                "name": name,
                "doc": entry.doc,
                "stream": entry.stream,
                "large": entry.large,
                "fds": list(entry.fds),
                "params": _schema(entry.params),
                "results": [_schema(result) for result in entry.results],
            }
        )
    return {"protocol": PROTOCOL, "version": version, "methods": methods}


def _schema(kind: object) -> dict[str, object]:
    """Return the JSON schema of ``kind``; ``object`` is any value."""
    return msgspec.json.schema(kind, schema_hook=lambda _anything: {"description": "any value"})


_WHERE = re.compile(r"^(?P<why>.*?)(?: - at `(?P<path>[^`]*)`)?$", re.DOTALL)
_NAMED = re.compile(r"(?:missing required|contains unknown) field `(?P<name>[^`]*)`")


def convert_params(kind: type[Params[Any]], params: Mapping[str, object]) -> Params[Any]:
    """Return ``params`` as ``kind``, strictly: no unknown field at any depth, no coercion of types.

    Raises InvalidInput whose ``field`` is the dotted path of the first wrong one.
    """
    try:
        value: Params[Any] = msgspec.convert(params, kind)
    except msgspec.ValidationError as error:
        found = _WHERE.match(str(error))
        why, path = (found["why"], found["path"] or "$") if found else (str(error), "$")
        field = path.removeprefix("$").removeprefix(".")
        named = _NAMED.search(why)
        if named:
            field = f"{field}.{named['name']}" if field else named["name"]
        raise InvalidInput(field or "params", _at(params, field), why) from None
    # The model's structs are read from the store too, and there an unknown field may be a newer
    # version's; from a caller it is a misspelt wish that must not be ignored.
    unknown = _unknown(value, params, "")
    if unknown is not None:
        raise InvalidInput(unknown, _at(params, unknown), "unknown field")
    return value


def _at(value: object, field: str) -> object:
    """Return what is at the dotted path ``field``, or None where it leads nowhere."""
    for key, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", field):
        if index and isinstance(value, (list, tuple)) and int(index) < len(value):
            value = value[int(index)]
        elif key and isinstance(value, Mapping) and key in value:
            value = value[key]
        else:
            return None
    return value


def _unknown(made: object, given: object, path: str) -> str | None:
    """Return the path of the first field of ``given`` that the struct made of it does not have."""
    if isinstance(made, msgspec.Struct) and isinstance(given, Mapping):
        for key, value in given.items():
            here = f"{path}.{key}" if path else str(key)
            if key not in made.__struct_encode_fields__:
                return here
            deeper = _unknown(getattr(made, key), value, here)
            if deeper is not None:
                return deeper
    elif isinstance(made, (list, tuple)) and isinstance(given, (list, tuple)):
        for index, (item, value) in enumerate(zip(made, given, strict=True)):
            deeper = _unknown(item, value, f"{path}[{index}]")
            if deeper is not None:
                return deeper
    return None
