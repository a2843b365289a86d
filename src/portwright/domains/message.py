"""DNS messages, as far as a proxy has to understand them: what is asked, and whom an answer names.

A message is passed on byte for byte, but for its id. dnspython reads it, which is bounded by the message
(a compression pointer only goes backwards) and raises DNSException, and nothing else, for what is none.
"""

from __future__ import annotations

import ipaddress
from typing import NamedTuple

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.opcode
import dns.rcode
import dns.rdataclass
import dns.rdatatype

from portwright.domains.names import Labels

#: A header (RFC 1035, 4.1.1); what is shorter is no message.
HEADER = 12
#: Whole zones are no look-ups, and come in many messages.
_TRANSFERS = {dns.rdatatype.AXFR, dns.rdatatype.IXFR}
_ADDRESSES = {dns.rdatatype.A, dns.rdatatype.AAAA}
_QR = 0x80
_OPCODE_AND_RD = 0x79


class NotServed(Exception):
    """A query that is not passed on; ``reply`` is what its sender hears, None: nothing."""

    def __init__(self, reply: bytes | None) -> None:
        super().__init__("not served")
        self.reply = reply


class BadAnswer(Exception):
    """An answer that can't be read, or says two things at once."""


class Query(NamedTuple):
    """One question (RFC 1035, 4.1.2), and the message that it came in."""

    wire: bytes
    name: dns.name.Name
    rdtype: int
    rdclass: int

    @property
    def labels(self) -> Labels:
        """The name, for comparing."""
        return tuple(label.lower() for label in self.name.labels if label)

    @property
    def for_addresses(self) -> bool:
        """Whether its answer names addresses: A or AAAA, of the Internet."""
        return self.rdclass == dns.rdataclass.IN and self.rdtype in _ADDRESSES

    def sent_as(self, identity: int) -> bytes:
        """The message under another id."""
        return identity.to_bytes(2, "big") + self.wire[2:]

    def answered(self, answer: bytes) -> bytes:
        """The answer under the asker's id."""
        return self.wire[:2] + answer[2:]


def read_query(wire: bytes) -> Query:
    """The one question of a query. Raises NotServed for everything else, with the answer for its sender.

    A message that can't be told from noise, and what is an answer itself, gets none: it would be another's.
    """
    if len(wire) < HEADER or wire[2] & _QR:
        raise NotServed(None)
    try:
        message = dns.message.from_wire(wire, question_only=True)
        opcode = message.opcode()
    except dns.exception.DNSException:
        raise NotServed(refusal(wire, dns.rcode.FORMERR)) from None
    if opcode != dns.opcode.QUERY:
        raise NotServed(refusal(wire, dns.rcode.NOTIMP))
    if len(message.question) != 1:
        raise NotServed(refusal(wire, dns.rcode.FORMERR))
    asked = message.question[0]
    if asked.rdtype in _TRANSFERS:
        raise NotServed(refusal(wire, dns.rcode.REFUSED))
    return Query(wire, asked.name, asked.rdtype, asked.rdclass)


def refusal(wire: bytes, rcode: int) -> bytes:
    """The answer to a query's header that says no: its id, opcode and RD, an rcode, and no sections."""
    return wire[:2] + bytes((_QR | wire[2] & _OPCODE_AND_RD, rcode)) + bytes(8)


def refused(query: Query, rcode: int = dns.rcode.SERVFAIL) -> bytes:
    """The same to a query that was read, with its question, which resolvers look for."""
    response = dns.message.QueryMessage(id=int.from_bytes(query.wire[:2], "big"))
    response.flags = dns.flags.QR | (query.wire[2] << 8 & dns.flags.RD)
    response.set_rcode(dns.rcode.Rcode(rcode))
    response.find_rrset(
        response.question,
        query.name,
        dns.rdataclass.RdataClass(query.rdclass),
        dns.rdatatype.RdataType(query.rdtype),
        create=True,
        force_unique=True,
    )
    return response.to_wire()


def is_answer(query: Query, identity: int, wire: bytes) -> bool:
    """Whether a message answers what was sent under this id: same id, same question, names in any case.

    An error may come without the question (RFC 1035, 4.1.1: the server could not read it).
    """
    if len(wire) < HEADER or not wire[2] & _QR or int.from_bytes(wire[:2], "big") != identity:
        return False
    try:
        message = dns.message.from_wire(wire, question_only=True)
        if not message.question:
            return message.rcode() != dns.rcode.NOERROR
    except dns.exception.DNSException:
        return False
    asked = message.question[0]
    return len(message.question) == 1 and (asked.name, asked.rdtype, asked.rdclass) == (
        query.name,
        query.rdtype,
        query.rdclass,
    )


def addresses(query: Query, wire: bytes) -> tuple[tuple[str, ...], int]:
    """The addresses that an answer gives the name that was asked, and for how many seconds.

    Those at the end of its chain of aliases alone: what else an answer holds was not asked for. The seconds
    are the least along the chain. None where there is none, where the answer was cut short (it is to be asked
    for again, by TCP), or is an error. Raises BadAnswer.
    """
    try:
        message = dns.message.from_wire(wire)
        if message.rcode() != dns.rcode.NOERROR or message.flags & dns.flags.TC:
            return (), 0
        if not isinstance(message, dns.message.QueryMessage):
            raise BadAnswer("no answer to a query")
        chain = message.resolve_chaining()
    except dns.exception.DNSException as error:
        raise BadAnswer(str(error) or type(error).__name__) from error
    if chain.answer is None or not query.for_addresses:
        return (), 0
    found = dict.fromkeys(str(ipaddress.ip_address(record.address)) for record in chain.answer)
    return tuple(found), chain.minimum_ttl
