"""The tests: unit, netns, dataplane, containers, lab, faults."""
