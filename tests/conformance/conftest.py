"""Options, parameters and fixtures of the conformance suite."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from .kit.host import Host
from .kit.lab import Lab
from .profile import ALL_VERSIONS, NEEDS, Profile, load_profile

HERE = Path(__file__).parent
PROFILE = pytest.StashKey[Profile]()
FAILED = pytest.StashKey[bool]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--cni-profile`` and ``--cni-kills``; CNI_PROFILE and CNI_KILLS serve where this file loads late."""
    group = parser.getgroup("CNI conformance")
    group.addoption(
        "--cni-profile", metavar="NAME|PATH", help="plugin to test: portwright, ptp or a TOML file"
    )
    group.addoption("--cni-kills", type=int, metavar="N", help="kill points of case 49 (default 12)")


def _option(config: pytest.Config, name: str, default: str) -> str:
    given = config.getoption(f"--cni-{name}", default=None)
    return str(given) if given is not None else os.environ.get(f"CNI_{name.upper()}", default)


def pytest_configure(config: pytest.Config) -> None:
    """Load the profile once; a wrong one is a usage error."""
    config.addinivalue_line("markers", "feature(*names): runs only for a profile that claims these features")
    try:
        config.stash[PROFILE] = load_profile(_option(config, "profile", "portwright"))
    except (OSError, ValueError) as error:
        raise pytest.UsageError(f"--cni-profile: {error}") from error


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parameters that a profile decides: variants of a need, its breakers; and every CNI version."""
    profile = metafunc.config.stash[PROFILE]
    for need in NEEDS:
        if need in metafunc.fixturenames:
            metafunc.parametrize(need, sorted(profile.needs.get(need, {})))
    if "breaker" in metafunc.fixturenames:
        metafunc.parametrize("breaker", profile.breakers, ids=[one.name for one in profile.breakers])
    if "cni_version" in metafunc.fixturenames:
        metafunc.parametrize("cni_version", ALL_VERSIONS)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark ours, leave out what needs a claim that is not made, and mark the profile's expected failures."""
    profile = config.stash[PROFILE]
    claims = profile.features | ({"daemon"} if profile.daemon else {"no_daemon"})
    # What a profile has no variant of would be a skip for want of parameters.
    empty = {need for need in NEEDS if not profile.needs.get(need)}
    if not profile.breakers:
        empty.add("breaker")
    left_out: list[pytest.Item] = []
    for item in items:
        if not item.path.is_relative_to(HERE):
            continue
        item.add_marker(pytest.mark.conformance)
        wanted = {name for marker in item.iter_markers("feature") for name in marker.args}
        wanted |= set(getattr(item, "fixturenames", ())) & empty
        if not wanted <= claims:
            left_out.append(item)
        for pattern, reason in profile.expected_failures.items():
            # A test's id has literal square brackets, which are a set of characters to fnmatch.
            if fnmatch.fnmatchcase(item.name, pattern.replace("[", "[[]")):
                item.add_marker(pytest.mark.xfail(reason=reason, strict=True))
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Remember a failure, so that the fixture can show the daemon's log."""
    report = yield
    if call.when == "call":
        item.stash[FAILED] = report.failed or hasattr(report, "wasxfail")
    return report


@pytest.fixture(scope="session")
def profile(request: pytest.FixtureRequest) -> Profile:
    """The plugin under test."""
    return request.config.stash[PROFILE]


@pytest.fixture(scope="session")
def kills(request: pytest.FixtureRequest) -> int:
    """How many kill points case 49 tries."""
    return int(_option(request.config, "kills", "12"))


@pytest.fixture(scope="session")
def shared_host(profile: Profile) -> Iterator[Host]:
    """One host for all tests that leave it as they found it."""
    host = Host(profile)
    try:
        yield host
    finally:
        host.close()


def _lab(host: Host, request: pytest.FixtureRequest) -> Iterator[Lab]:
    start = host.daemon.log.stat().st_size if host.daemon and host.daemon.log.exists() else 0
    lab = Lab(host)
    yield lab
    failed = request.node.stash.get(FAILED, False)
    if failed and host.daemon is not None:
        print(f"--- the daemon's log ---\n{host.daemon.tail(start)}")
    try:
        lab.close()
    except AssertionError:
        # The failure that has been reported is the cause; a second one for its debris tells nothing new.
        if not failed:
            raise


@pytest.fixture
def lab(shared_host: Host, request: pytest.FixtureRequest) -> Iterator[Lab]:
    """The tools of a test on the shared host; at the end everything is deleted, and nothing may be left."""
    yield from _lab(shared_host, request)


@pytest.fixture
def own_lab(profile: Profile, request: pytest.FixtureRequest) -> Iterator[Lab]:
    """The same on a host of the test's own, for tests that break the host or stop its daemon."""
    host = Host(profile)
    try:
        yield from _lab(host, request)
    finally:
        host.close()
