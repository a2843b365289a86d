"""What can go wrong between us and a Firecracker process. Each leaf says whether it may have been done."""

from __future__ import annotations

from portwright.model.errors import PortwrightError


class VmmUnavailable(PortwrightError):
    """Nothing answers on Firecracker's socket. Nothing was sent."""

    code = "vmm-unavailable"

    def __init__(self, socket: str, why: str) -> None:
        super().__init__(f"no Firecracker on {socket} ({why}); is the process running, with this --api-sock?")
        self.socket = socket
        self.why = why


class VmmRefused(PortwrightError):
    """Firecracker answered with an error: it did not do what was asked.

    ``request`` is the verb and the path, ``asked`` the body as JSON ('' without one, and for MMDS, whose
    contents may be secret), ``fault_message`` Firecracker's own sentence.
    """

    code = "vmm-refused"

    def __init__(self, request: str, asked: str, status: int, fault_message: str) -> None:
        with_body = f" {asked}" if asked else ""
        super().__init__(f"Firecracker refused {request}{with_body} ({status}): {fault_message}")
        self.request = request
        self.asked = asked
        self.status = status
        self.fault_message = fault_message


class VmmLost(PortwrightError):
    """The socket closed between request and answer. The request may have been carried out."""

    code = "vmm-lost"

    def __init__(self, request: str, why: str) -> None:
        super().__init__(
            f"Firecracker went away before it answered {request} ({why}); look before you repeat it"
        )
        self.request = request
        self.why = why


class VmmTimeout(PortwrightError):
    """No whole answer in time. The request may still be carried out."""

    code = "vmm-timeout"

    def __init__(self, request: str, seconds: float) -> None:
        super().__init__(f"no answer to {request} within {seconds:g} s; it may still be carried out")
        self.request = request
        self.seconds = seconds


class VmmProtocol(PortwrightError):
    """What came back is no answer: not HTTP, too long, or not what the API description promises.

    The request may have been carried out.
    """

    code = "vmm-protocol"

    def __init__(self, request: str, why: str) -> None:
        super().__init__(f"the answer to {request} can't be used: {why}")
        self.request = request
        self.why = why


class VmmState(PortwrightError):
    """The guest is in a state in which this is not possible. Nothing was changed."""

    code = "vmm-state"

    def __init__(self, what: str, state: str, required: str) -> None:
        super().__init__(f"{what}: the guest is {state}; this needs it {required}")
        self.what = what
        self.state = state
        self.required = required


class InexactLimit(PortwrightError):
    """A burst that no token bucket has at this rate. ``nearest``: bursts, in bits, that one has."""

    code = "inexact-limit"

    def __init__(self, field: str, rate: int, burst: int, nearest: tuple[int, ...]) -> None:
        near = " or ".join(str(bits) for bits in nearest)
        super().__init__(
            f"limits.{field}: no token bucket of Firecracker has {burst} bits at exactly {rate} bit/s; "
            f"nearest are {near} bits, or 0 for ours to choose"
        )
        self.field = field
        self.rate = rate
        self.burst = burst
        self.nearest = nearest
