"""What the lab shows of a dead guest's console."""

from __future__ import annotations

from lab.boot import CONSOLE_TAIL, last_words


def test_the_reason_above_a_long_trace_is_shown() -> None:
    """A panic whose closing line never came is still named: its first line stands above the tail, once."""
    trace = [f"[  2.0]  frame_{number}+0x5d/0xb0" for number in range(CONSOLE_TAIL + 20)]
    lines = ["[  1.0] Linux version 6.1", "[  2.0] Kernel panic - not syncing: sysrq\r", *trace]

    shown = last_words("\n".join(lines))

    assert shown == ["[  2.0] Kernel panic - not syncing: sysrq", "...", *trace[-CONSOLE_TAIL:]]


def test_a_short_console_is_shown_whole() -> None:
    """Without blank lines and carriage returns; a reason that is in the tail is not repeated."""
    assert last_words("a\r\n\r\nBUG: b\r\nc") == ["a", "BUG: b", "c"]
