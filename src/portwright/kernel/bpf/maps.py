"""Maps: typed access to the tables that programs and Portwright share.

Keys and values are plain ``bytes`` in the kernel's layout. Their lengths are checked
here on each call, because the kernel trusts the map's sizes and would read past a short
buffer. Buffers are made per call, so that one map may be used from several threads.
"""

from __future__ import annotations

import ctypes
import errno
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple, NoReturn, Self

from portwright.kernel.bpf import _libbpf
from portwright.kernel.bpf._fd import OwnedFd, failed, object_info
from portwright.kernel.bpf._libbpf import ENOTSUPP, BatchOpts, MapCreateOpts, MapInfo
from portwright.kernel.bpf.enums import BPF_ANY, PERCPU_TYPES, MapType
from portwright.kernel.bpf.spec import MapSpec

_lookup_elem = _libbpf.bpf_map_lookup_elem
_update_elem = _libbpf.bpf_map_update_elem
_delete_elem = _libbpf.bpf_map_delete_elem

_BUCKET_TYPES: Final = frozenset(
    {
        MapType.HASH,
        MapType.PERCPU_HASH,
        MapType.LRU_HASH,
        MapType.LRU_PERCPU_HASH,
        MapType.HASH_OF_MAPS,
    }
)
"""Maps that the kernel reads in batches by bucket number: a deletion can't make it start anew."""

_CHUNK_BYTES: Final = 1 << 20
_CHUNK_ENTRIES: Final = 4096
_NO_BATCH: Final = frozenset({-ENOTSUPP, -errno.EOPNOTSUPP})


@functools.cache
def possible_cpus() -> int:
    """How many slots a per-CPU value has (/sys/devices/system/cpu/possible). Fixed at boot."""
    count: int = _libbpf.num_possible_cpus()
    if count < 0:
        failed(count, "count the possible CPUs")
    return count


class Packed(NamedTuple):
    """Entries as the kernel takes them: the keys one after the other, and so the values."""

    keys: bytes
    values: bytes
    number: int

    @classmethod
    def of(cls, entries: Iterable[tuple[bytes, bytes]]) -> Self:
        """These entries, whose keys are of one length, and whose values are."""
        pairs = list(entries)
        return cls(b"".join([key for key, _ in pairs]), b"".join([value for _, value in pairs]), len(pairs))

    def pairs(self) -> Iterator[tuple[bytes, bytes]]:
        """Each entry."""
        return zip(*(self._cut(block) for block in (self.keys, self.values)), strict=True)

    def _cut(self, block: bytes) -> list[bytes]:
        size = len(block) // (self.number or 1)
        return [block[at : at + size] for at in range(0, len(block), size or 1)]


class Map(OwnedFd):
    """A map of the kernel, held by a descriptor of our own.

    ``name`` is the name in the program's source where the map came from a collection, and
    the kernel's (cut to 15 bytes) where it was opened by pin or id. Sizes are in bytes.
    """

    __slots__ = ("_raw_t", "flags", "id", "key_size", "max_entries", "name", "percpu", "type", "value_size")
    _KIND = "map"
    _NOUN = "map"

    def __init__(self, fd: int, name: str | None = None) -> None:
        """Take over ``fd``, which must be a map's; it is closed when reading its info fails."""
        super().__init__(fd)
        info = MapInfo()
        try:
            object_info(fd, info, "a map")
        except BaseException:
            self.close()
            raise
        self.id: int = info.id
        self.name: str = info.name.decode() if name is None else name
        self.type = MapType(info.type)
        self.key_size: int = info.key_size
        self.value_size: int = info.value_size
        self.max_entries: int = info.max_entries
        self.flags: int = info.map_flags
        self.percpu = self.type in PERCPU_TYPES
        raw_size = self._stride() * possible_cpus() if self.percpu else self.value_size
        self._raw_t = ctypes.c_char * raw_size

    @classmethod
    def create(cls, spec: MapSpec) -> Self:
        """A new, empty map after ``spec``. Maps of maps take their template from ``spec.inner``.

        The map has no BTF: fine for all but maps that hold spin locks, timers or kptrs.
        """
        opts = MapCreateOpts(sz=ctypes.sizeof(MapCreateOpts), map_flags=spec.flags)
        template = cls.create(spec.inner) if spec.inner is not None else None
        try:
            if template is not None:
                opts.inner_map_fd = template.fd
            name = spec.name.encode()[:15]
            fd: int = _libbpf.bpf_map_create(
                spec.type, name, spec.key_size, spec.value_size, spec.max_entries, ctypes.byref(opts)
            )
        finally:
            if template is not None:
                template.close()
        if fd < 0:
            failed(fd, f"create the map {spec.name}", f"{spec.type.name}, {spec.max_entries} entries")
        return cls(fd, spec.name)

    # -- one entry ---------------------------------------------------------------------------------

    def lookup(self, key: bytes) -> bytes | None:
        """The value of ``key``, or None. A map of maps gives the inner map's id (native u32)."""
        if len(key) != self.key_size or self.percpu:
            self._misuse(key, None)
        return self._lookup(key)

    def lookup_percpu(self, key: bytes) -> list[bytes] | None:
        """The value of ``key`` on each possible CPU, by CPU number, or None."""
        if len(key) != self.key_size or not self.percpu:
            self._misuse(key, None)
        raw = self._lookup(key)
        return None if raw is None else self._split(raw)

    def _lookup(self, key: bytes) -> bytes | None:
        value = self._raw_t()
        ret = _lookup_elem(self._fd, key, value)
        if ret < 0:
            self._absent(ret, "look up in")
            return None
        return value.raw

    def update(self, key: bytes, value: bytes, flags: int = BPF_ANY) -> None:
        """Set ``key`` to ``value``; atomic for one entry of a hash.

        KernelFailed: EEXIST under BPF_NOEXIST, ENOENT under BPF_EXIST, E2BIG when full.
        Into a map of maps, ``value`` is the inner map's descriptor as a native u32.
        """
        if len(key) != self.key_size or self.percpu or len(value) != self.value_size:
            self._misuse(key, value)
        ret = _update_elem(self._fd, key, value, flags)
        if ret < 0:
            self._failed(ret, f"update {self!r}", f"key {key.hex(' ')}")

    def update_percpu(self, key: bytes, values: Sequence[bytes], flags: int = BPF_ANY) -> None:
        """Set ``key`` on every possible CPU: ``values`` has one per CPU, by CPU number."""
        if len(key) != self.key_size or not self.percpu:
            self._misuse(key, None)
        raw = self._join(values)
        ret = _update_elem(self._fd, key, raw, flags)
        if ret < 0:
            self._failed(ret, f"update {self!r}", f"key {key.hex(' ')}")

    def delete(self, key: bytes) -> bool:
        """Remove ``key``; False when it was absent. Arrays refuse (KernelFailed EINVAL)."""
        if len(key) != self.key_size:
            self._misuse(key, None)
        ret = _delete_elem(self._fd, key)
        if ret < 0:
            self._absent(ret, "delete from")
            return False
        return True

    # -- many entries ------------------------------------------------------------------------------

    def update_batch(self, entries: Iterable[tuple[bytes, bytes]]) -> None:
        """Set all ``entries``, in one system call where the kernel has batches for this type.

        Not atomic: on KernelFailed the entries before the failing one are set, and
        ``detail`` says how many. Where a key is given twice, the later value wins.
        """
        pairs = list(entries)
        for key, value in pairs:
            if len(key) != self.key_size or self.percpu or len(value) != self.value_size:
                self._misuse(key, value)
        self.update_packed(Packed.of(pairs))

    def update_packed(self, entries: Packed) -> None:
        """The same of entries that are packed already. ValueError where their sizes are not the map's."""
        wanted = (entries.number * self.key_size, entries.number * self.value_size)
        if self.percpu or (len(entries.keys), len(entries.values)) != wanted:
            raise ValueError(f"{self!r}: {entries.number} entries of other sizes, or the map is per CPU")
        if not entries.number:
            return
        count = ctypes.c_uint32(entries.number)
        opts = BatchOpts(sz=ctypes.sizeof(BatchOpts))
        ret = _libbpf.bpf_map_update_batch(
            self._fd, entries.keys, entries.values, ctypes.byref(count), ctypes.byref(opts)
        )
        if ret in _NO_BATCH:
            for key, value in entries.pairs():
                self.update(key, value)
        elif ret < 0:
            self._failed(ret, f"update {self!r}", f"{count.value} of {entries.number} entries were set")

    def delete_batch(self, keys: Iterable[bytes]) -> None:
        """Remove all ``keys``; those that are absent are no error. Not atomic."""
        wanted = list(keys)
        for key in wanted:
            if len(key) != self.key_size:
                self._misuse(key, None)
        opts = BatchOpts(sz=ctypes.sizeof(BatchOpts))
        at = 0
        while at < len(wanted):
            count = ctypes.c_uint32(len(wanted) - at)
            block = b"".join(wanted[at:])
            ret = _libbpf.bpf_map_delete_batch(self._fd, block, ctypes.byref(count), ctypes.byref(opts))
            if ret >= 0:
                return
            if ret == -errno.ENOENT and self._fd >= 0:
                at += count.value + 1  # the kernel stops at an absent key: go on behind it
            elif ret in _NO_BATCH:
                for key in wanted[at:]:
                    self.delete(key)
                return
            else:
                self._failed(ret, f"remove keys of {self!r}", f"{at + count.value} of {len(wanted)} handled")

    def keys(self) -> Iterator[bytes]:
        """The keys, under the same guarantees as :meth:`items`."""
        return (key for key, _ in self._entries())

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """The entries, each key at most once; always ends.

        What is there from start to end is given; what comes or goes meanwhile may be. The
        caller may delete and add during the iteration.
        """
        if self.percpu:
            raise ValueError(f"{self!r} is per CPU: use items_percpu()")
        return self._entries()

    def items_percpu(self) -> Iterator[tuple[bytes, list[bytes]]]:
        """The entries with a value per possible CPU, under the same guarantees as :meth:`items`."""
        if not self.percpu:
            raise ValueError(f"{self!r} is not per CPU: use items()")
        return ((key, self._split(raw)) for key, raw in self._entries())

    # -- how iteration stays bounded ---------------------------------------------------------------
    #
    # The kernel continues from a key that it is given (BPF_MAP_GET_NEXT_KEY, and the batch reads of
    # everything but hashes). When that key is gone by then it starts at the first again, so a reader that
    # just follows could run in circles for as long as another deletes. Hashes are therefore read by
    # bucket, which has no such weakness; for the others keys already given are remembered, and the number
    # of steps is limited by the size of the map.

    def _entries(self) -> Iterator[tuple[bytes, bytes]]:
        """Every (key, raw value)."""
        key_size, raw_size = self.key_size, ctypes.sizeof(self._raw_t)
        chunk = max(16, min(self.max_entries, _CHUNK_ENTRIES, _CHUNK_BYTES // (key_size + raw_size)))
        token = ctypes.create_string_buffer(max(key_size, 4))
        keys, values = (ctypes.create_string_buffer(chunk * size) for size in (key_size, raw_size))
        opts = BatchOpts(sz=ctypes.sizeof(BatchOpts))
        seen: set[bytes] | None = None if self.type in _BUCKET_TYPES else set()
        started, budget, ret = False, 4 * self.max_entries + 64, 0
        while ret != -errno.ENOENT and budget > 0:
            count = ctypes.c_uint32(chunk)
            ret = _libbpf.bpf_map_lookup_batch(
                self.fd,
                token if started else None,
                token,
                keys,
                values,
                ctypes.byref(count),
                ctypes.byref(opts),
            )
            if ret == -errno.ENOSPC:  # one bucket holds more than the buffers: the kernel gave nothing
                chunk *= 2
                keys, values = (ctypes.create_string_buffer(chunk * size) for size in (key_size, raw_size))
                continue
            if ret in _NO_BATCH and not started:
                yield from self._walk()
                return
            # EINTR: the kernel gave up on a key that was deleted under its hands; take what it has.
            if ret < 0 and ret not in (-errno.ENOENT, -errno.EINTR):
                self._failed(ret, f"read {self!r}")
            started = started or count.value > 0
            budget -= max(count.value, 1)
            all_keys, all_values = keys.raw[: count.value * key_size], values.raw[: count.value * raw_size]
            for index in range(count.value):
                key = all_keys[index * key_size : (index + 1) * key_size]
                if seen is not None:
                    if key in seen:
                        continue
                    seen.add(key)
                yield key, all_values[index * raw_size : (index + 1) * raw_size]

    def _walk(self) -> Iterator[tuple[bytes, bytes]]:
        """Every (key, raw value), key by key, for types without batches."""
        seen: set[bytes] = set()
        current: bytes | None = None
        following = (ctypes.c_char * self.key_size)()
        for _ in range(4 * self.max_entries + 64):
            ret = _libbpf.bpf_map_get_next_key(self.fd, current, following)
            if ret == -errno.ENOENT:
                return
            if ret < 0:
                self._failed(ret, f"read {self!r}")
            current = following.raw
            if current in seen:
                continue
            seen.add(current)
            value = self._raw_t()
            if _lookup_elem(self.fd, current, value) >= 0:
                yield current, value.raw

    # -- sizes -------------------------------------------------------------------------------------

    def _stride(self) -> int:
        """Bytes from one CPU's slot to the next: the kernel rounds up to 8."""
        return (self.value_size + 7) & ~7

    def _split(self, raw: bytes) -> list[bytes]:
        size, stride = self.value_size, self._stride()
        return [raw[at : at + size] for at in range(0, len(raw), stride)]

    def _join(self, values: Sequence[bytes]) -> bytes:
        if len(values) != possible_cpus():
            raise ValueError(f"{self!r}: {len(values)} values given for {possible_cpus()} possible CPUs")
        for value in values:
            if len(value) != self.value_size:
                self._misuse(None, value)
        return b"".join([value.ljust(self._stride(), b"\0") for value in values])

    def _absent(self, ret: int, what: str) -> None:
        if ret != -errno.ENOENT:
            self._failed(ret, f"{what} {self!r}")

    def _misuse(self, key: bytes | None, value: bytes | None) -> NoReturn:
        """Say what is wrong with a call's arguments: a bug of the caller's."""
        if key is not None and len(key) != self.key_size:
            raise ValueError(f"{self!r}: the key has {len(key)} bytes and needs {self.key_size}")
        if value is not None and len(value) != self.value_size:
            raise ValueError(f"{self!r}: the value has {len(value)} bytes and needs {self.value_size}")
        raise ValueError(f"{self!r} is {'' if self.percpu else 'not '}per CPU: use the other method")
