"""The rig that the tests of the guard share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.dataplane.rig import Rig, loaded


@pytest.fixture(scope="module")
def module_rig() -> Iterator[Rig]:
    """One for the module."""
    with loaded() as made:
        yield made


@pytest.fixture
def rig(module_rig: Rig) -> Rig:
    """The module's, without a translated flow; only counters go on."""
    module_rig.set_state(0)
    return module_rig
