"""DNS messages, as far as a proxy has to understand them: what is asked, and whom an answer names.

A message is passed on byte for byte, but for its id. dnspython reads headers, questions and names: a chain
of compression pointers goes backwards and is short (since 2.9), and what is none raises DNSException, and
nothing else. Of records only those are read that count, and never as dnspython's own: it keeps a class for
each type and class of record that it ever saw, for ever, so that a stranger could fill the memory, and one
record of the class ANY made it take every later address of that type for opaque data.
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

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
#: Records of an answer that are looked at, in all sections, and aliases of a name, one after the other.
MAX_RECORDS, MAX_ALIASES = 512, 16
#: Whole zones are no look-ups, and come in many messages.
_TRANSFERS = {dns.rdatatype.AXFR, dns.rdatatype.IXFR}
#: The bytes of an address, by the type of its record.
_ADDRESSES: dict[int, int] = {dns.rdatatype.A: 4, dns.rdatatype.AAAA: 16}
_QR = 0x80
_OPCODE_AND_RD = 0x79
#: type and class at a question's end
_QUESTION = 4
#: type, class, TTL, length of the data (RFC 1035, 4.1.3)
_RECORD = struct.Struct("!HHIH")
#: A TTL with the highest bit counts as 0 (RFC 2181, 8).
_TTL_SIGN = 1 << 31


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
    if _opcode(wire) != dns.opcode.QUERY:
        raise NotServed(refusal(wire, dns.rcode.NOTIMP))
    if _questions(wire) != 1:
        raise NotServed(refusal(wire, dns.rcode.FORMERR))
    try:
        message = dns.message.from_wire(wire, question_only=True)
    except dns.exception.DNSException:
        raise NotServed(refusal(wire, dns.rcode.FORMERR)) from None
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
    if _opcode(wire) != dns.opcode.QUERY or _questions(wire) > 1:
        return False
    if not _questions(wire):
        return _rcode(wire) != dns.rcode.NOERROR
    try:
        message = dns.message.from_wire(wire, question_only=True)
    except dns.exception.DNSException:
        return False
    asked = message.question[0]
    return (asked.name, asked.rdtype, asked.rdclass) == (
        query.name,
        query.rdtype,
        query.rdclass,
    )


def addresses(query: Query, wire: bytes) -> tuple[tuple[str, ...], int]:
    """The addresses that an answer (``is_answer``) gives the name that was asked, and for how many seconds.

    Those at the end of its chain of aliases alone: what else an answer holds was not asked for. The seconds
    are the least along the chain. None where there is none, where the answer was cut short (it is to be asked
    for again, by TCP), or is an error. Raises BadAnswer.
    """
    if not query.for_addresses or _rcode(wire) != dns.rcode.NOERROR or wire[2] << 8 & dns.flags.TC:
        return (), 0
    try:
        aliases, found = _said(query, wire)
    except (dns.exception.DNSException, struct.error) as error:
        raise BadAnswer(str(error) or type(error).__name__) from error
    name, ttl, passed = query.name, _TTL_SIGN, 0
    while name not in found:
        if name not in aliases:
            return (), 0
        passed += 1
        if passed > MAX_ALIASES:
            raise BadAnswer(f"a name has more than {MAX_ALIASES} aliases, one after the other")
        name, least = aliases[name]
        ttl = min(ttl, least)
    return tuple(dict.fromkeys(address for address, _ in found[name])), min(
        ttl, *(least for _, least in found[name])
    )


_Aliases: TypeAlias = dict[dns.name.Name, tuple[dns.name.Name, int]]
_Found: TypeAlias = dict[dns.name.Name, list[tuple[str, int]]]


def _said(query: Query, wire: bytes) -> tuple[_Aliases, _Found]:
    """The aliases and the addresses of an answer's first section, by their names, with their seconds."""
    aliases: _Aliases = {}
    found: _Found = {}
    for name, rdtype, ttl, start, size in _records(wire):
        if rdtype == dns.rdatatype.CNAME:
            target, used = dns.name.from_wire(wire, start)
            if used != size:
                raise BadAnswer("an alias and its length differ")
            known, least = aliases.setdefault(name, (target, ttl))
            if known != target:
                raise BadAnswer("a name has two aliases")
            aliases[name] = target, min(least, ttl)
        elif rdtype == query.rdtype:
            if size != _ADDRESSES[rdtype]:
                raise BadAnswer(f"an address of {size} bytes")
            found.setdefault(name, []).append((str(ipaddress.ip_address(wire[start : start + size])), ttl))
    return aliases, found


def _records(wire: bytes) -> Iterator[tuple[dns.name.Name, int, int, int, int]]:
    """(name, type, TTL, start and length of the data) of the Internet's records in an answer's first section.

    The others are passed over, but have to end where the message does.
    """
    answers, *others = struct.unpack_from("!3H", wire, 6)
    if answers + sum(others) > MAX_RECORDS:
        raise BadAnswer(f"an answer has {answers + sum(others)} records, at most {MAX_RECORDS} are read")
    at = HEADER + dns.name.from_wire(wire, HEADER)[1] + _QUESTION
    for number in range(answers + sum(others)):
        name, used = dns.name.from_wire(wire, at)
        rdtype, rdclass, ttl, size = _RECORD.unpack_from(wire, at + used)
        start = at + used + _RECORD.size
        at = start + size
        if at > len(wire):
            raise BadAnswer("a record is longer than its message")
        if number < answers and rdclass == dns.rdataclass.IN:
            yield name, rdtype, 0 if ttl & _TTL_SIGN else ttl, start, size
    if at != len(wire):
        raise BadAnswer("there is more than its records")


def _opcode(wire: bytes) -> int:
    return wire[2] >> 3 & 0xF


def _rcode(wire: bytes) -> int:
    return wire[3] & 0xF


def _questions(wire: bytes) -> int:
    return int.from_bytes(wire[4:6], "big")
