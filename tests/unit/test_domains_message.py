"""What a proxy reads in DNS messages, honest and hostile ones."""

from __future__ import annotations

import contextlib
import struct

import dns.flags
import dns.message
import dns.rcode
import dns.rdata
import dns.rdataclass
import dns.rdatatype
import dns.rrset
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from portwright.domains.message import (
    MAX_RECORDS,
    BadAnswer,
    NotServed,
    Query,
    addresses,
    is_answer,
    read_query,
    refused,
)


def query_of(name: str, kind: str = "A", **options: object) -> Query:
    """A query as a stub resolver sends it."""
    return read_query(dns.message.make_query(name, kind, **options).to_wire())  # type: ignore[arg-type]


def answer_of(query: Query, *records: str, identity: int | None = None) -> bytes:
    """An answer with these records: "name ttl kind data"."""
    response = dns.message.make_response(dns.message.from_wire(query.wire))
    if identity is not None:
        response.id = identity
    for record in records:
        name, ttl, kind, data = record.split(" ", 3)
        response.answer.append(dns.rrset.from_text(name, int(ttl), "IN", kind, data))
    return response.to_wire()


def test_a_query_is_its_question() -> None:
    """Name, type and class of the one question; the message stays as it came but for its id."""
    query = query_of("WwW.Shop.Example", "AAAA", use_edns=True)

    assert query.labels == (b"www", b"shop", b"example")
    assert query.for_addresses
    sent = query.sent_as(0xBEEF)
    assert (sent[:2], sent[2:]) == (b"\xbe\xef", query.wire[2:])
    assert query.answered(sent) == query.wire
    assert not query_of("shop.example", "TXT").for_addresses


def test_an_answer_names_the_addresses_at_the_end_of_its_chain() -> None:
    """Those of the name that was asked, through its aliases, and for the least of the chain's times."""
    query = query_of("www.shop.example")
    wire = answer_of(
        query,
        "www.shop.example. 300 CNAME shop.cdn.example.",
        "shop.cdn.example. 20 CNAME edge7.cdn.example.",
        "edge7.cdn.example. 60 A 192.0.2.7",
        "edge7.cdn.example. 60 A 192.0.2.8",
        "bank.example. 5 A 203.0.113.66",
    )
    beside = answer_of(query_of("bank.example"), "shop.example. 1 A 192.0.2.1")

    assert addresses(query, wire) == (("192.0.2.7", "192.0.2.8"), 20)
    assert addresses(query_of("bank.example"), beside) == ((), 0)


def test_a_chain_of_aliases_has_an_end() -> None:
    """An alias of itself, and a chain that is too long, are no answer."""
    query = query_of("a.example")
    with pytest.raises(BadAnswer):
        addresses(query, answer_of(query, "a.example. 1 CNAME b.example.", "b.example. 1 CNAME a.example."))
    chain = [f"n{number}.example. 1 CNAME n{number + 1}.example." for number in range(40)]
    with pytest.raises(BadAnswer):
        addresses(
            query_of("n0.example"), answer_of(query_of("n0.example"), *chain, "n40.example. 1 A 192.0.2.1")
        )


def record(kind: int, data: bytes, *, name: bytes = b"\xc0\x0c", rdclass: int = 1, ttl: int = 60) -> bytes:
    """A record by the byte; its name is the one that was asked, unless it is said."""
    return name + struct.pack("!HHIH", kind, rdclass, ttl, len(data)) + data


def with_records(query: Query, *records: bytes, others: int = 0) -> bytes:
    """An answer with these records, of which the last are in its other sections."""
    counts = struct.pack("!3H", len(records) - others, 0, others)
    return query.wire[:2] + b"\x81\x80\0\1" + counts + query.wire[12:] + b"".join(records)


@pytest.mark.parametrize(("kind", "data"), [("A", b"\1\2\3\4"), ("AAAA", b"\x20\1\x0d\xb8" + bytes(12))])
def test_no_answer_changes_how_the_next_is_read(kind: str, data: bytes) -> None:
    """A record of the class ANY, or of types that nobody knows, is passed over, and kept nowhere: the reader
    remembers nothing of what strangers send."""
    query = query_of("www.shop.example", kind)
    number = {"A": 1, "AAAA": 28}[kind]
    odd = [record(number, data, rdclass=255), record(number, data, rdclass=254)]
    unknown = [record(60_000 + number, b"", rdclass=40_000 + number) for number in range(200)]
    dns.rdata._rdata_classes.pop(
        (dns.rdataclass.IN, dns.rdatatype.RdataType(number)), None
    )  # as in a process that has seen none yet
    before = len(dns.rdata._rdata_classes)

    assert addresses(query, with_records(query, *odd, *unknown, others=100)) == ((), 0)
    assert len(addresses(query, with_records(query, record(number, data)))[0]) == 1
    assert len(dns.rdata._rdata_classes) == before


def test_a_time_with_the_highest_bit_is_none() -> None:
    """Of 2^31 seconds and more the RFC says 0 (2181, 8); below it they are what they say."""
    query = query_of("www.shop.example")
    for ttl, counts in ((2**31 - 1, 2**31 - 1), (2**31, 0), (2**32 - 1, 0)):
        wire = with_records(query, record(1, b"\1\2\3\4", ttl=ttl))
        assert addresses(query, wire) == (("1.2.3.4",), counts)


def test_what_says_two_things_or_not_what_it_seems_is_bad() -> None:
    """Two aliases of one name, an address of another length, an alias that ends elsewhere, records that are
    missing, cut, too many, or not all; the same alias twice is one."""
    query = query_of("www.shop.example")
    good, alias = record(1, b"\1\2\3\4"), record(5, b"\1a\0")
    bad = {
        "two aliases": with_records(query, alias, record(5, b"\1b\0")),
        "of 5 bytes": with_records(query, record(1, b"\1\2\3\4\5")),
        "of 0 bytes": with_records(query, record(1, b"")),
        "length differ": with_records(query, record(5, b"\1a\0x")),
        "longer than its message": with_records(query, good)[:-1],
        "more than its records": with_records(query, good) + b"x",
        f"has {MAX_RECORDS + 1} records": with_records(
            query, *[good] * (MAX_RECORDS + 1), others=MAX_RECORDS
        ),
    }
    for why, wire in bad.items():
        with pytest.raises(BadAnswer, match=why):
            addresses(query, wire)
    end = record(1, b"\1\2\3\4", name=b"\1A\0")
    assert addresses(query, with_records(query, alias, alias, end)) == (("1.2.3.4",), 60)


def test_a_message_of_many_questions_is_not_read() -> None:
    """Its count alone ends it, for a query and for an answer."""
    query = query_of("www.shop.example")
    many = query.wire[:4] + b"\xff\xff" + query.wire[6:]
    with pytest.raises(NotServed) as caught:
        read_query(many)
    assert caught.value.reply is not None
    assert not is_answer(query, int.from_bytes(many[:2], "big"), many[:2] + b"\x80" + many[3:])


def test_errors_and_cut_answers_name_nobody() -> None:
    """NXDOMAIN, no data, and TC: what a sandbox has to ask again opens nothing."""
    query = query_of("a.example")
    cut = dns.message.from_wire(answer_of(query, "a.example. 60 A 192.0.2.1"))
    cut.flags |= dns.flags.TC
    missing = dns.message.make_response(dns.message.from_wire(query.wire))
    missing.set_rcode(dns.rcode.NXDOMAIN)

    assert addresses(query, answer_of(query)) == ((), 0)
    assert addresses(query, cut.to_wire()) == ((), 0)
    assert addresses(query, missing.to_wire()) == ((), 0)


def test_only_an_answer_to_what_was_sent_is_one() -> None:
    """Id, question and the answer's bit have to be right; a name's case does not matter (0x20)."""
    query = query_of("wWw.shop.eXample")
    good = answer_of(query, identity=7)

    assert is_answer(query, 7, good)
    assert is_answer(query, 7, good.replace(b"wWw", b"www"))
    assert not is_answer(query, 8, good)
    assert not is_answer(query, 7, query.sent_as(7))
    assert not is_answer(query, 7, answer_of(query_of("bank.example"), identity=7))
    assert not is_answer(query, 7, answer_of(query_of("www.shop.example", "AAAA"), identity=7))
    assert not is_answer(query, 7, good[:11])
    bare = b"\0\7\x80\x01" + bytes(8)
    assert is_answer(query, 7, bare)  # FORMERR without a question
    assert not is_answer(query, 7, b"\0\7\x80\x00" + bytes(8))


@pytest.mark.parametrize(
    ("wire", "rcode"),
    [
        (b"", None),
        (bytes(11), None),
        (b"\0\1\x80\0" + bytes(8), None),  # an answer
        (bytes(12), dns.rcode.FORMERR),  # no question
        (b"\0\1\1\0\0\2" + bytes(6) + b"\1a\0\0\1\0\1" * 2, dns.rcode.FORMERR),  # two
        (b"\0\1\1\0\0\1" + bytes(6) + b"\xc0\x0c\0\1\0\1", dns.rcode.FORMERR),  # a name that is itself
        (b"\0\1\1\0\0\1" + bytes(6) + b"\x3f" + b"a" * 9, dns.rcode.FORMERR),  # cut inside a label
        (b"\0\1\x29\0\0\1" + bytes(6) + b"\1a\0\0\6\0\1", dns.rcode.NOTIMP),  # an update
        (b"\0\1\1\0\0\1" + bytes(6) + b"\1a\0\0\xfc\0\1", dns.rcode.REFUSED),  # a zone transfer
    ],
)
def test_what_is_no_look_up_is_not_passed_on(wire: bytes, rcode: int | None) -> None:
    """Its sender hears what is wrong, under its own id; noise and answers hear nothing."""
    with pytest.raises(NotServed) as caught:
        read_query(wire)
    reply = caught.value.reply
    assert (reply is None) == (rcode is None)
    if reply is not None:
        assert (reply[:2], reply[2] & 0x80, reply[3] & 0xF) == (wire[:2], 0x80, rcode)
        assert len(reply) == 12


def test_a_refusal_has_the_question() -> None:
    """SERVFAIL with id and question of the query, which resolvers check."""
    query = query_of("wWw.shop.example", "AAAA")

    reply = dns.message.from_wire(refused(query))

    assert reply.rcode() == dns.rcode.SERVFAIL
    assert is_answer(query, int.from_bytes(query.wire[:2], "big"), refused(query))
    assert b"wWw" in refused(query)


@given(st.binary(max_size=600))
@example(b"\0\1\1\0\0\1" + bytes(6) + b"\xc0\x00\0\1\0\1")
def test_any_bytes_are_a_query_or_refused(wire: bytes) -> None:
    """Noise ends in NotServed or a query that can be refused in turn, and in nothing else."""
    with contextlib.suppress(NotServed):
        query = read_query(wire)
        assert is_answer(query, int.from_bytes(wire[:2], "big"), refused(query))


@given(st.data())
def test_a_bent_answer_is_read_or_bad(data: st.DataObject) -> None:
    """An answer with bytes changed, cut or added names addresses, or is BadAnswer, and nothing else."""
    query = query_of("www.shop.example")
    wire = bytearray(
        answer_of(
            query,
            "www.shop.example. 9 CNAME x.example.",
            "x.example. 9 A 192.0.2.1",
            "x.example. 9 A 192.0.2.2",
        )
    )
    for _ in range(data.draw(st.integers(1, 6))):
        wire[data.draw(st.integers(0, len(wire) - 1))] = data.draw(st.integers(0, 255))
    bent = bytes(wire[: data.draw(st.integers(12, len(wire)))]) + data.draw(st.binary(max_size=8))
    with contextlib.suppress(BadAnswer):
        found, _ = addresses(query, bent)
        assert len(found) <= 2
    is_answer(query, 7, bent)
