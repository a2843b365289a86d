"""What each hypervisor can do: the page is the data's, and so is each refusal."""

from __future__ import annotations

from pathlib import Path

import pytest

from portwright.model.errors import NotSupported
from portwright.vmm import matrix
from portwright.vmm.firecracker.capabilities import FEATURES

PAGE = Path(__file__).parents[2] / "docs" / "support-matrix.md"


def test_the_page_is_the_data() -> None:
    """`python -m portwright.vmm.matrix > docs/support-matrix.md` was run after the last change."""
    assert PAGE.read_text() == matrix.page()


@pytest.mark.parametrize("name", matrix.ROWS)
def test_what_is_never_had_is_refused_with_the_way_out(name: str) -> None:
    """Of each feature, model and hypervisor: refused where the page says no, with what it says instead."""
    for vmm in matrix.VMMS:
        for model in matrix.MODELS:
            found = matrix.cell(name, vmm, model)
            if found.since is not None:
                matrix.require(name, vmm, model)
                continue
            assert found.instead, (name, vmm, model)
            with pytest.raises(NotSupported) as caught:
                matrix.require(name, vmm, model)
            assert caught.value.model == vmm
            assert caught.value.way_out == found.instead


def test_firecrackers_rows_are_its_drivers() -> None:
    """A version in the page is the one by which the driver refuses."""
    shared = {row.firecracker for row in matrix.ROWS.values() if isinstance(row.firecracker, str)}
    assert shared <= FEATURES.keys()
    assert matrix.cell("mtu", "firecracker", "tcfilter").since == str(FEATURES["mtu"].since) == "1.16"
    assert matrix.cell("plug", "firecracker", "tcfilter").since == "1.16, with --enable-pci"
    assert matrix.cell("multi-queue", "firecracker", "tcfilter").since is None


@pytest.mark.parametrize("model", ["macvtap", "tap"])
def test_models_without_a_named_tap_of_the_sandbox_are_not_firecrackers(model: str) -> None:
    """They are refused, and every feature on them."""
    with pytest.raises(NotSupported, match=rf"ports of model {model}: .*--model tcfilter"):
        matrix.require_model("firecracker", model)
    assert all(matrix.cell(name, "firecracker", model).since is None for name in matrix.ROWS)
