"""The raw functions of libbpf: types, and nothing else.

Every function that our binding uses is declared here once, with its argument and
result types. A function that the installed libbpf lacks, or the whole library when
it is missing, becomes a stub that raises :class:`LibbpfTooOld` when *called*: so
importing never fails, and the error names the version that would do.

Contract of the functions, since libbpf 1.0: those that return an ``int`` return
``-errno`` on failure, those that return a pointer return NULL and set errno, which
:func:`ctypes.get_errno` reads. All release the GIL while they run.

What libbpf wants to tell a person never reaches stderr: it is kept, per thread, for
:func:`captured_messages`.

Opts structs are size-versioned: each starts with its own size, the library
takes what is missing as zero. We declare them only as far as we use them, so one
layout serves libbpf 1.0 and anything newer.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable, Iterator
from ctypes import (
    CFUNCTYPE,
    POINTER,
    Structure,
    c_bool,
    c_char_p,
    c_int,
    c_size_t,
    c_uint32,
    c_uint64,
    c_void_p,
)
from typing import Any, ClassVar, Final

from portwright.model.errors import KernelTooOld

ENOTSUPP: Final = 524
"""The kernel's internal "not supported", which BPF map operations leak to us."""


class LibbpfTooOld(KernelTooOld):
    """The installed libbpf lacks ``feature`` (a function), or there is no libbpf at all."""

    code: ClassVar[str] = "libbpf-too-old"

    def __init__(self, feature: str, need: str, have: str) -> None:
        super().__init__(feature, need, have)
        self.args = (f"{feature} needs {need}; this system has {have} (Debian: apt install libbpf1)",)


class OpenOpts(Structure):
    """``struct bpf_object_open_opts``, up to object_name."""

    _fields_ = (("sz", c_size_t), ("object_name", c_char_p))


class MapCreateOpts(Structure):
    """``struct bpf_map_create_opts`` of libbpf 1.0."""

    _fields_ = (
        ("sz", c_size_t),
        ("btf_fd", c_uint32),
        ("btf_key_type_id", c_uint32),
        ("btf_value_type_id", c_uint32),
        ("btf_vmlinux_value_type_id", c_uint32),
        ("inner_map_fd", c_uint32),
        ("map_flags", c_uint32),
        ("map_extra", c_uint64),
        ("numa_node", c_uint32),
        ("map_ifindex", c_uint32),
    )


class BatchOpts(Structure):
    """``struct bpf_map_batch_opts``."""

    _fields_ = (("sz", c_size_t), ("elem_flags", c_uint64), ("flags", c_uint64))


class QueryOpts(Structure):
    """``struct bpf_prog_query_opts``, up to prog_cnt, padded to 8 bytes."""

    _fields_ = (
        ("sz", c_size_t),
        ("query_flags", c_uint32),
        ("attach_flags", c_uint32),
        ("prog_ids", POINTER(c_uint32)),
        ("prog_cnt", c_uint32),
        ("_pad", c_uint32),
    )


class TestRunOpts(Structure):
    """``struct bpf_test_run_opts``."""

    __test__ = False
    _fields_ = (
        ("sz", c_size_t),
        ("data_in", c_void_p),
        ("data_out", c_void_p),
        ("data_size_in", c_uint32),
        ("data_size_out", c_uint32),
        ("ctx_in", c_void_p),
        ("ctx_out", c_void_p),
        ("ctx_size_in", c_uint32),
        ("ctx_size_out", c_uint32),
        ("retval", c_uint32),
        ("repeat", c_int),
        ("duration", c_uint32),
        ("flags", c_uint32),
        ("cpu", c_uint32),
        ("batch_size", c_uint32),
    )


class LinkCreateOpts(Structure):
    """``struct bpf_link_create_opts``, up to flags, padded to 8 bytes."""

    _fields_ = (("sz", c_size_t), ("flags", c_uint32), ("_pad", c_uint32))


class MapInfo(Structure):
    """``struct bpf_map_info``, up to map_extra (Linux 5.16)."""

    _fields_ = (
        ("type", c_uint32),
        ("id", c_uint32),
        ("key_size", c_uint32),
        ("value_size", c_uint32),
        ("max_entries", c_uint32),
        ("map_flags", c_uint32),
        ("name", ctypes.c_char * 16),
        ("ifindex", c_uint32),
        ("btf_vmlinux_value_type_id", c_uint32),
        ("netns_dev", c_uint64),
        ("netns_ino", c_uint64),
        ("btf_id", c_uint32),
        ("btf_key_type_id", c_uint32),
        ("btf_value_type_id", c_uint32),
        ("_pad", c_uint32),
        ("map_extra", c_uint64),
    )


class ProgInfo(Structure):
    """``struct bpf_prog_info``, up to name."""

    _fields_ = (
        ("type", c_uint32),
        ("id", c_uint32),
        ("tag", ctypes.c_ubyte * 8),
        ("jited_prog_len", c_uint32),
        ("xlated_prog_len", c_uint32),
        ("jited_prog_insns", c_uint64),
        ("xlated_prog_insns", c_uint64),
        ("load_time", c_uint64),
        ("created_by_uid", c_uint32),
        ("nr_map_ids", c_uint32),
        ("map_ids", c_uint64),
        ("name", ctypes.c_char * 16),
    )


class LinkInfoRaw(Structure):
    """``struct bpf_link_info``: the head, then the union as bytes that its type gives meaning."""

    _fields_ = (
        ("type", c_uint32),
        ("id", c_uint32),
        ("prog_id", c_uint32),
        ("_pad", c_uint32),
        ("union", ctypes.c_ubyte * 48),
    )


try:
    _LIB: ctypes.CDLL | None = ctypes.CDLL("libbpf.so.1", use_errno=True)
except OSError:
    _LIB = None

_libc = ctypes.CDLL(None, use_errno=True)


def _version() -> str:
    """``libbpf 1.1``, or what is wrong."""
    if _LIB is None:
        return "no libbpf.so.1"
    return f"libbpf {_LIB.libbpf_major_version()}.{_LIB.libbpf_minor_version()}"


LIBBPF_VERSION: Final = _version()


def _stub(name: str, since: str) -> Callable[..., Any]:
    """Stand in for a function that isn't there: raises, naming the version that has it."""

    def missing(*_args: object) -> Any:
        raise LibbpfTooOld(name, f"libbpf >= {since}", LIBBPF_VERSION)

    missing.__name__ = name
    return missing


def _bind(name: str, since: str, restype: Any, *argtypes: Any) -> Callable[..., Any]:
    """The function ``name`` with its types, or the stub when the library lacks it."""
    try:
        if _LIB is None:
            return _stub(name, since)
        function = getattr(_LIB, name)
    except AttributeError:
        return _stub(name, since)
    function.argtypes = argtypes
    function.restype = restype
    return function  # type: ignore[no-any-return]


# -- objects: ELF to maps and programs -------------------------------------------------------------
object_open_mem = _bind("bpf_object__open_mem", "1.0", c_void_p, c_void_p, c_size_t, POINTER(OpenOpts))
object_load = _bind("bpf_object__load", "1.0", c_int, c_void_p)
object_close = _bind("bpf_object__close", "1.0", None, c_void_p)
object_next_map = _bind("bpf_object__next_map", "1.0", c_void_p, c_void_p, c_void_p)
object_next_program = _bind("bpf_object__next_program", "1.0", c_void_p, c_void_p, c_void_p)
object_btf = _bind("bpf_object__btf", "1.0", c_void_p, c_void_p)

map_name = _bind("bpf_map__name", "1.0", c_char_p, c_void_p)
map_type = _bind("bpf_map__type", "1.0", c_uint32, c_void_p)
map_key_size = _bind("bpf_map__key_size", "1.0", c_uint32, c_void_p)
map_value_size = _bind("bpf_map__value_size", "1.0", c_uint32, c_void_p)
map_max_entries = _bind("bpf_map__max_entries", "1.0", c_uint32, c_void_p)
map_flags = _bind("bpf_map__map_flags", "1.0", c_uint32, c_void_p)
map_inner = _bind("bpf_map__inner_map", "1.0", c_void_p, c_void_p)
map_is_internal = _bind("bpf_map__is_internal", "1.0", c_bool, c_void_p)
map_initial_value = _bind("bpf_map__initial_value", "1.0", c_void_p, c_void_p, POINTER(c_size_t))
map_fd = _bind("bpf_map__fd", "1.0", c_int, c_void_p)
map_set_max_entries = _bind("bpf_map__set_max_entries", "1.0", c_int, c_void_p, c_uint32)
map_set_pin_path = _bind("bpf_map__set_pin_path", "1.0", c_int, c_void_p, c_char_p)
map_reuse_fd = _bind("bpf_map__reuse_fd", "1.0", c_int, c_void_p, c_int)

program_name = _bind("bpf_program__name", "1.0", c_char_p, c_void_p)
program_section_name = _bind("bpf_program__section_name", "1.0", c_char_p, c_void_p)
program_type = _bind("bpf_program__type", "1.0", c_uint32, c_void_p)
program_set_type = _bind("bpf_program__set_type", "1.0", c_int, c_void_p, c_uint32)
program_set_expected_attach_type = _bind(
    "bpf_program__set_expected_attach_type", "1.0", c_int, c_void_p, c_uint32
)
program_fd = _bind("bpf_program__fd", "1.0", c_int, c_void_p)

btf_find_by_name_kind = _bind("btf__find_by_name_kind", "1.0", c_int, c_void_p, c_char_p, c_uint32)
btf_type_by_id = _bind("btf__type_by_id", "1.0", c_void_p, c_void_p, c_uint32)
btf_str_by_offset = _bind("btf__str_by_offset", "1.0", c_char_p, c_void_p, c_uint32)

# -- maps ------------------------------------------------------------------------------------------
bpf_map_create = _bind(
    "bpf_map_create", "1.0", c_int, c_int, c_char_p, c_uint32, c_uint32, c_uint32, POINTER(MapCreateOpts)
)
bpf_map_lookup_elem = _bind("bpf_map_lookup_elem", "1.0", c_int, c_int, c_void_p, c_void_p)
bpf_map_update_elem = _bind("bpf_map_update_elem", "1.0", c_int, c_int, c_void_p, c_void_p, c_uint64)
bpf_map_delete_elem = _bind("bpf_map_delete_elem", "1.0", c_int, c_int, c_void_p)
bpf_map_get_next_key = _bind("bpf_map_get_next_key", "1.0", c_int, c_int, c_void_p, c_void_p)
bpf_map_update_batch = _bind(
    "bpf_map_update_batch", "1.0", c_int, c_int, c_void_p, c_void_p, POINTER(c_uint32), POINTER(BatchOpts)
)
bpf_map_delete_batch = _bind(
    "bpf_map_delete_batch", "1.0", c_int, c_int, c_void_p, POINTER(c_uint32), POINTER(BatchOpts)
)
bpf_map_lookup_batch = _bind(
    "bpf_map_lookup_batch",
    "1.0",
    c_int,
    c_int,
    c_void_p,
    c_void_p,
    c_void_p,
    c_void_p,
    POINTER(c_uint32),
    POINTER(BatchOpts),
)
bpf_map_get_fd_by_id = _bind("bpf_map_get_fd_by_id", "1.0", c_int, c_uint32)
num_possible_cpus = _bind("libbpf_num_possible_cpus", "1.0", c_int)

# -- programs and links ----------------------------------------------------------------------------
bpf_prog_load = _bind("bpf_prog_load", "1.0", c_int, c_int, c_char_p, c_char_p, c_void_p, c_size_t, c_void_p)
bpf_prog_get_fd_by_id = _bind("bpf_prog_get_fd_by_id", "1.0", c_int, c_uint32)
bpf_prog_test_run_opts = _bind("bpf_prog_test_run_opts", "1.0", c_int, c_int, POINTER(TestRunOpts))
bpf_prog_query_opts = _bind("bpf_prog_query_opts", "1.0", c_int, c_int, c_int, POINTER(QueryOpts))
bpf_link_create = _bind("bpf_link_create", "1.0", c_int, c_int, c_int, c_int, POINTER(LinkCreateOpts))
bpf_link_update = _bind("bpf_link_update", "1.0", c_int, c_int, c_int, c_void_p)
bpf_link_detach = _bind("bpf_link_detach", "1.0", c_int, c_int)
bpf_link_get_fd_by_id = _bind("bpf_link_get_fd_by_id", "1.0", c_int, c_uint32)
bpf_obj_pin = _bind("bpf_obj_pin", "1.0", c_int, c_int, c_char_p)
bpf_obj_get = _bind("bpf_obj_get", "1.0", c_int, c_char_p)
bpf_obj_get_info_by_fd = _bind("bpf_obj_get_info_by_fd", "1.0", c_int, c_int, c_void_p, POINTER(c_uint32))

# -- ring buffer -----------------------------------------------------------------------------------
RingSampleFn = CFUNCTYPE(c_int, c_void_p, c_void_p, c_size_t)
ring_buffer_new = _bind("ring_buffer__new", "1.0", c_void_p, c_int, RingSampleFn, c_void_p, c_void_p)
ring_buffer_free = _bind("ring_buffer__free", "1.0", None, c_void_p)
ring_buffer_consume = _bind("ring_buffer__consume", "1.0", c_int, c_void_p)
ring_buffer_epoll_fd = _bind("ring_buffer__epoll_fd", "1.0", c_int, c_void_p)


# -- what libbpf says ------------------------------------------------------------------------------
# libbpf_print_fn_t takes a va_list. In memory it is an array of 24 bytes on x86-64 and a structure of
# 32 on arm64; as an argument both ABIs pass a pointer to it, so a void pointer serves both. Formatting
# consumes it, hence the copy before the first try. (32 bytes are on the caller's stack in both cases.)
_VA_LIST_SIZE: Final = 32
_WARN, _INFO = 0, 1
_PrintFn = CFUNCTYPE(c_int, c_int, c_void_p, c_void_p)
_vsnprintf = _libc.vsnprintf
_vsnprintf.argtypes = (c_void_p, c_size_t, c_void_p, c_void_p)
_vsnprintf.restype = c_int


class _Said(threading.local):
    """Per thread: where the running call's messages go, or None when nobody listens."""

    messages: list[str] | None = None


_said = _Said()


def _print(level: int, fmt: int, args: int) -> int:
    """Keep a warning or an information of libbpf; debug is dropped before it costs anything."""
    if level > _INFO or (messages := _said.messages) is None:
        return 0
    spare = ctypes.create_string_buffer(ctypes.string_at(args, _VA_LIST_SIZE), _VA_LIST_SIZE)
    text = ctypes.create_string_buffer(1024)
    length: int = _vsnprintf(text, len(text), fmt, args)
    if length >= len(text):
        text = ctypes.create_string_buffer(length + 1)
        _vsnprintf(text, len(text), fmt, spare)
    messages.append(text.value.decode(errors="replace"))
    return length


_print_callback = _PrintFn(_print)  # referenced for as long as the library may call it
_bind("libbpf_set_print", "1.0", c_void_p, _PrintFn)(_print_callback) if _LIB is not None else None


@contextlib.contextmanager
def captured_messages() -> Iterator[list[str]]:
    """Collect this thread's warnings and informations of libbpf, in the order it said them."""
    before = _said.messages
    messages: list[str] = []
    _said.messages = messages
    try:
        yield messages
    finally:
        _said.messages = before
