"""The BPF programs, and what their maps hold."""

from pathlib import Path

#: The switch: both programs of a representor, and every map of theirs.
OBJECT = Path(__file__).with_name("portwright.bpf.o")
