"""The fixtures, and the recipes of docs/testing.rst as they stand."""

from __future__ import annotations

import importlib.metadata

import pytest

import bokbok_trio.pytest_plugin  # noqa: F401  (or pytester would import it anew for each run)
from tests.support.helpers import documented_code


def recipes() -> dict[str, str]:
    """The files of the documentation, by their names."""
    return {code.split()[1]: code for code in documented_code("testing.rst")}


def make_project(pytester: pytest.Pytester, **files: str) -> None:
    pytester.makeini(
        "[pytest]\n"
        "trio_mode = true\n"
        "filterwarnings =\n"
        "    error\n"
        "    ignore:Module already imported:pytest.PytestAssertRewriteWarning\n"  # by the tests around these
    )
    pytester.makepyfile(**files)


def test_the_recipes_work(pytester: pytest.Pytester) -> None:
    blocks = recipes()
    assert len(blocks) == 8
    make_project(pytester, **{name.removesuffix(".py"): code for name, code in blocks.items()})
    tests = sum(code.count("def test_") for code in blocks.values())
    pytester.runpytest_inprocess("-q").assert_outcomes(passed=tests)


PLUGIN = 'pytest_plugins = ["bokbok_trio.pytest_plugin"]'


def test_what_the_fixtures_opened_is_closed_when_the_test_has_ended(
    pytester: pytest.Pytester,
) -> None:
    make_project(
        pytester,
        conftest=PLUGIN,
        test_it="""
            import pytest, trio
            from bokbok_trio.testing import open_connection_pair

            story = []

            async def close(connection):
                story.append(connection.side)

            async def test_first(bokbok_pair, bokbok_server):
                client, server = await bokbok_pair(client_close_handler=close, server_close_handler=close)
                again, _ = await bokbok_pair(client_close_handler=close)
                server = await bokbok_server(users=None, close_handler=close)
                assert server.keys == {}
                assert not client.closed and not again.closed
                assert story == []

            async def test_second():
                assert sorted(story) == ["client", "client", "server"]
        """,
    )
    pytester.runpytest_inprocess("-q", "-p", "no:randomly").assert_outcomes(passed=2)


def test_a_test_that_fails_fails_as_itself(pytester: pytest.Pytester) -> None:
    make_project(
        pytester,
        conftest=PLUGIN,
        test_it="""
            async def test_it(bokbok_pair):
                client, server = await bokbok_pair()
                await client.request(["x"])

            async def test_arguments(bokbok_pair):
                await bokbok_pair(colour="green")
        """,
    )
    result = pytester.runpytest_inprocess("-q")
    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines_random(["*RemoteError*no-handler*", "*unexpected keyword argument 'colour'"])


def test_a_test_that_is_not_async_is_told_so(pytester: pytest.Pytester) -> None:
    make_project(pytester, conftest=PLUGIN, test_it="def test_it(bokbok_pair): pass")
    result = pytester.runpytest_inprocess("-q")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*Trio fixtures can only be used by Trio tests*"])


def test_without_a_word_for_it_pytest_loads_nothing() -> None:
    names = [entry.value for entry in importlib.metadata.entry_points(group="pytest11")]
    assert any("pytest_trio" in name for name in names)
    assert not [name for name in names if "bokbok" in name]
