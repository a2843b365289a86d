"""Fixtures of the container tests alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.containers.cri_client import Cri
from tests.fix_containerd import Runtimes


@pytest.fixture
def cri(containerd: Runtimes) -> Iterator[Cri]:
    """The kubelet's view of a running containerd."""
    client = Cri(containerd)
    yield client
    client.close()
