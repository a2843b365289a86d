"""``make prove PART=port``: what this project claims, tried on the real thing, one line a claim.

A *part* is one issue's list of claims; :mod:`prove.port` is the first. Each of its proofs runs
something that exists for its own sake (the demo, a test suite, the benchmark), reads the outcome
from a machine-readable place (exit status, junit, JSON), and says ``PASS`` or ``FAIL``, the claim and its
figure. A proof that can't be run is a FAIL: nothing here is skipped.
"""
