"""`bokbok call`, `follow`, `list` and `describe`: typed calls from a shell."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from bokbok_trio import Connection, Key, RequestError
from bokbok_trio._cli._schemas import MAX_DEPTH, TEMPLATE_DEPTH, Schemas
from tests.support.cli import Run, address, handler, make_handler, run, serving
from tests.support.inside import reads_arguments

__all__ = ["address", "run"]


@pytest.fixture(scope="module")
def unlisted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Run a server that lists nothing, and return its address."""
    with serving(str(tmp_path_factory.mktemp("cli") / "sock"), make_handler(listed=False)) as found:
        yield found


# ---- arguments ----


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("text=42", "'42'"),
        ("text=", "''"),
        ("text=a=b:=c", "'a=b:=c'"),
        (r"text=\@home", "'@home'"),
        ('text:="x"', "'x'"),
        ("data=grüße", repr("grüße".encode())),
        ('data:="AAE="', "b'\\x00\\x01'"),
        ("number=-5", "-5"),
        ("ratio=2", "2.0"),
        ("ratio=1e3", "1000.0"),
        ("mode=w", "'w'"),
        ("level=null", "None"),
        ("level=3", "3"),
        ('tags:=["a", "b"]', "['a', 'b']"),
        ('pair:=[1, "AA=="]', "(1, b'\\x00')"),
        ('blobs:={"x": "AA=="}', "{'x': b'\\x00'}"),
        ('stat:={"size": 1, "digest": "AA=="}', "Stat(size=1, owner=None, digest=b'\\x00')"),
        ("either=5", "'5'"),
        ("either:=5", "5"),
        ("anything=5", "'5'"),
        ('anything:={"a": [1.5, null, true]}', "{'a': [1.5, None, True]}"),
    ],
)
def test_an_argument_becomes_what_the_listing_says(run: Run, address: str, argument: str, value: str) -> None:
    ran = run("call", "--json", address, "Files.echo", argument)
    assert (ran.code, ran.err) == (0, "")
    assert list(ran.json.values()) == [value]


@pytest.mark.parametrize(
    ("argument", "error"),
    [
        ("number=x", "number: expected integer, and got 'x'"),
        ("number=1_0", "number: expected integer, and got '1_0'"),
        ("ratio=1_0", "ratio: expected number, and got '1_0'"),
        ("ratio=inf", "ratio: expected number, and got 'inf'"),
        ("level=x", "level: expected integer or null, and got 'x'"),
        ("mode=x", 'mode: expected "r" or "w", and got \'x\''),
        ("tags=a", "tags: expected a list or null, and got 'a'"),
        ("tags:=[", "tags: expected JSON: Expecting value: line 1 column 2 (char 1)"),
        ("ratio:=NaN", "ratio: JSON has no NaN"),
        ('data:="!"', "data: $: expected base64, and got '!'"),
        ('stat:={"size": 1, "digest": "!"}', "stat: $.digest: expected base64, and got '!'"),
        ('pair:=[1, "!"]', "pair: $[1]: expected base64, and got '!'"),
        ("number:=99999999999999999999", "number: can't serialize ints < -2**63"),
        ("none=1", "none: Files.echo has no such argument; it takes text, data, number, "),
        ('{"number": 1, "none": 2}', "none: Files.echo has no such argument; it takes "),
        ('{"data": "!"}', "data: $: expected base64, and got '!'"),
        ("{", "the argument: expected JSON: "),
        ('{"text": "a", "text": "b"}', "the argument: text is given twice"),
        ('anything:={"a": [{"b": 1, "b": 1}]}', "anything: b is given twice"),
        ("ratio:=1e400", "ratio: 1e400 is too large for a number"),
        ("ratio:=-1e400", "ratio: -1e400 is too large for a number"),
        pytest.param("number:=" + "9" * 5000, "number: a number of 5000 digits is too long", id="long"),
        pytest.param("tags:=" + "[" * 100_000, "tags: expected JSON: it is nested too deeply", id="deep"),
        (r'text:="\ud800"', "text: half of a surrogate pair is not text"),
        (r'blobs:={"\udfff": ""}', "blobs: half of a surrogate pair is not text"),
        ('number:="x"', "Files.echo: $.number: expected int, got str [bad-arguments]"),
    ],
)
def test_a_wrong_argument_is_named(run: Run, address: str, argument: str, error: str) -> None:
    ran = run("call", address, "Files.echo", argument)
    assert (ran.code, ran.out) == (6, "")
    assert ran.error.startswith(error)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (
            ["path"],
            "'path' is not an argument: write NAME=TEXT, NAME:=JSON or NAME=@FILE, or one JSON object",
        ),
        (["path=a", "path=b"], "path is given twice"),
        (["{}", "path=a"], "'{}' is not an argument: "),
        (["path=@-", "follow:=@-"], "the standard input can be one argument only"),
    ],
)
def test_what_is_no_argument_is_a_wrong_use(run: Run, address: str, arguments: list[str], error: str) -> None:
    ran = run("call", address, "Files.stat", *arguments)
    assert (ran.code, ran.out) == (2, "")
    assert ran.error.startswith(error)


def test_one_object_for_all_arguments(run: Run, address: str, tmp_path: Path) -> None:
    given = {"number": 3, "data": "AAE=", "mode": "w"}
    expected = {"number": "3", "data": "b'\\x00\\x01'", "mode": "'w'"}
    text = json.dumps(given)
    path = tmp_path / "arguments"
    path.write_text(text)
    assert run("call", address, "Files.echo", text).json == expected
    assert run("call", address, "Files.echo", f"@{path}").json == expected
    assert run("call", address, "Files.echo", "-", stdin=text.encode()).json == expected
    ran = run("call", address, "Files.echo", "-", stdin=b"[]")
    assert (ran.code, ran.error) == (6, "the standard input must be a JSON object of the arguments by name")
    ran = run("call", address, "Files.echo", "-", stdin=b'{"text": "\xff"}')
    assert (ran.code, ran.error) == (6, "the standard input: expected JSON: it is not text in UTF-8")


@pytest.mark.parametrize(
    ("argument", "stdin", "error"),
    [
        ("numbers:=[1, 99999999999999999999]", None, "numbers: can't serialize ints < -2**63"),
        ("numbers=@-", b"1\n99999999999999999999\n", "numbers: can't serialize ints < -2**63"),
        (r'numbers:=["\ud800"]', None, "numbers: half of a surrogate pair is not text"),
        ("numbers=@-", b'"\\ud800"\n', "numbers: half of a surrogate pair is not text"),
    ],
)
def test_an_item_that_cannot_travel_is_a_wrong_argument(
    run: Run, address: str, argument: str, stdin: bytes | None, error: str
) -> None:
    ran = run("call", address, "Files.total", argument, stdin=stdin)
    assert (ran.code, ran.out) == (6, "")
    assert ran.error.startswith(error)


def test_the_arguments_that_a_call_needs_are_named(run: Run) -> None:
    ran = run("call", "./sock")
    assert (ran.code, ran.error) == (
        2,
        "the following arguments are required: METHOD (see bokbok call --help)",
    )


def test_arguments_in_files(run: Run, address: str, tmp_path: Path) -> None:
    text, number, tags = tmp_path / "text", tmp_path / "number", tmp_path / "tags"
    text.write_bytes(b"\xfftext\n")
    number.write_text("17\n")
    tags.write_text('["a"]\n')
    ran = run(
        "call",
        address,
        "Files.echo",
        f"data=@{text}",
        f"number=@{number}",
        f"tags:=@{tags}",
        "text=@-",
        stdin=b"x\n",
    )
    assert ran.json == {"data": "b'\\xfftext\\n'", "number": "17", "tags": "['a']", "text": "'x\\n'"}
    ran = run("call", address, "Files.echo", f"text=@{text}")
    assert (ran.code, ran.error) == (6, "text: expected text in UTF-8")
    ran = run("call", address, "Files.echo", "text=@/nowhere")
    assert (ran.code, ran.error) == (1, "cannot read '/nowhere': No such file or directory")


# ---- results ----


def test_bytes_of_a_result_are_base64_or_as_they_are(run: Run, address: str) -> None:
    assert run("call", address, "Files.stat", "path=/etc").json == {
        "size": 4,
        "owner": "root",
        "digest": "/wA=",
    }
    assert run("call", address, "Files.read", "path=x").out == '"AGNvbnRlbnQK"\n'
    assert run("call", address, "Files.read", "path=x", "--raw").out == "\0content\n"
    assert run("call", address, "Files.stat", "path=x", "--raw").json["size"] == 1
    assert run("call", "--seq", address, "Files.read", "path=x").out == '\x1e"AGNvbnRlbnQK"\n'


def test_a_declared_error_has_its_fields(run: Run, address: str) -> None:
    ran = run("call", address, "Files.stat", "path=/gone")
    assert (ran.code, ran.out, ran.error) == (5, "", "NoSuchFile: /gone")
    ran = run("call", "--json", address, "Files.stat", "path=/gone")
    assert json.loads(ran.err) == {
        "error": "NoSuchFile: /gone",
        "exit": 5,
        "code": "NoSuchFile",
        "details": {"path": "/gone"},
    }
    ran = run("follow", "--json", address, "Files.lines", "path=/gone", "count=0")
    assert json.loads(ran.err)["details"] == {"path": "/gone"}
    assert run("call", "--graceful=NoSuchFile", address, "Files.stat", "path=/gone").code == 0


def test_a_method_that_is_not_there(run: Run, address: str) -> None:
    ran = run("call", address, "Files.stta")
    assert (ran.code, ran.error) == (5, "no such method: Files.stta; did you mean Files.stat? [no-method]")
    assert run("describe", address, "xyz").error == "no such method: xyz [no-method]"
    assert run("call", "--graceful", "no-method", address, "xyz").code == 0


# ---- streams ----


def test_the_items_of_a_stream_are_a_line_each(run: Run, address: str) -> None:
    for command in ("call", "follow"):
        ran = run(command, address, "Files.lines", "path=/x", "count=2")
        assert (ran.code, ran.out, ran.err) == (0, '"/x:0"\n"/x:1"\n', "")
    assert run("follow", "--seq", address, "Files.lines", "path=/x", "count=1").out == '\x1e"/x:0"\n'
    assert run("follow", "--raw", address, "Files.lines", "path=/x", "count=1").out == "/x:0\n"
    ran = run("follow", address, "Files.lines", "path=/breaks")
    assert (ran.code, ran.out.count("\n"), ran.error) == (5, 3, "it broke [broken]")
    ran = run("follow", address, "Files.stat", "path=/x")
    assert (ran.code, ran.error) == (2, "Files.stat does not stream: use bokbok call")


def test_streams_that_are_sent(run: Run, address: str, tmp_path: Path) -> None:
    path = tmp_path / "numbers"
    path.write_text("1\n\n2\n39")
    big = tmp_path / "big"
    big.write_bytes(bytes(200_000))
    assert run("call", address, "Files.upload", "name=x", f"chunks=@{big}").out == "200000\n"
    assert run("call", address, "Files.upload", "name=x", "chunks=@-", stdin=b"abc").out == "3\n"
    assert run("call", address, "Files.upload", "name=x", "chunks=abc").out == "3\n"
    assert run("call", address, "Files.upload", 'chunks:=["AAE=", "AAE="]', "name=x").out == "4\n"
    assert run("call", address, "Files.upload", "name=x", "chunks:=@-", stdin=b'"AAE="\n').out == "2\n"
    assert run("call", address, "Files.total", f"numbers=@{path}").out == "42\n"
    assert run("call", address, "Files.total", "numbers:=5").out == "5\n"
    assert run("call", address, "Files.total", '{"numbers": [1, 2]}').out == "3\n"
    assert run("call", address, "Files.joined", "words=@-", stdin=b"1\ntwo\n").out == '"1,two"\n'
    assert run("follow", address, "Files.doubled", f"numbers=@{path}").out == "2\n4\n78\n"
    assert run("call", "--timeout", 10, address, "Files.doubled", "numbers:=1").out == "2\n"


@pytest.mark.parametrize(("given", "limit"), [([], 60), (["--timeout=20"], 20), (["--timeout=0"], None)])
def test_a_method_has_the_time_that_the_command_has(
    run: Run, address: str, given: list[str], limit: float | None
) -> None:
    left = run("call", *given, address, "Files.time_left").json
    assert left is None if limit is None else 0 < left <= limit


def test_a_stream_has_no_time_limit_unless_one_is_given(run: Run, address: str) -> None:
    for command in ("call", "follow"):
        assert run(command, address, "Files.times_left").json is None
        assert 0 < run(command, "--timeout=20", address, "Files.times_left").json <= 20


def test_what_is_read_may_take_any_time(run: Run, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time limit begins when the standard input was typed."""
    limits: list[float] = []
    run_sync = trio.to_thread.run_sync

    async def spy(function: Any, *args: Any, **options: Any) -> Any:
        if reads_arguments(function):
            limits.append(trio.current_effective_deadline() - trio.current_time())
        return await run_sync(function, *args, **options)

    monkeypatch.setattr(trio.to_thread, "run_sync", spy)
    for given in ([], ["--timeout=20"]):
        assert run("call", *given, address, "Files.echo", "text=@-", stdin=b"x").json == {"text": "'x'"}
    usual, limited = limits
    assert usual == math.inf
    assert 0 < limited <= 20


@pytest.mark.parametrize(
    ("arguments", "code", "error"),
    [
        (["numbers=@/nowhere"], 1, "cannot read '/nowhere': No such file or directory"),
        (["numbers=@/dev/zero"], 6, "a line has more than 16777216 bytes"),
        (["{}", "numbers=@/"], 2, "'{}' is not an argument"),
        (["numbers=@/"], 1, "cannot read '/': Is a directory"),
        (["numbers=@-"], 6, "numbers: expected JSON: Expecting value: line 1 column 1 (char 0)"),
        (["numbers=x"], 6, "numbers: expected integer, and got 'x'"),
        (["numbers:=x"], 6, "numbers: expected JSON: Expecting value: line 1 column 1 (char 0)"),
        (
            [],
            6,
            "numbers: Files.total takes a stream of items here: numbers=@FILE, or @- for the standard input",
        ),
        (['{"numbers": 1}'], 6, "numbers: Files.total takes a stream of items here: "),
        (['numbers:=["x"]'], 6, "Files.total was sent a value that its interface does not allow: "),
    ],
)
def test_a_stream_that_is_wrong(run: Run, address: str, arguments: list[str], code: int, error: str) -> None:
    ran = run("call", address, "Files.total", *arguments, stdin=b"x\n")
    assert (ran.code, ran.out) == (code, "")
    assert ran.error.startswith(error)


def test_words_that_are_no_text(run: Run, address: str) -> None:
    ran = run("call", address, "Files.joined", "words=@-", stdin=b"\xff\n")
    assert (ran.code, ran.error) == (6, "words: expected text in UTF-8")


# ---- where nothing is listed ----


def test_a_side_that_lists_nothing_is_called_all_the_same(run: Run, unlisted: str) -> None:
    assert run("call", unlisted, "Files.stat", "path=/etc", "follow:=false").json["owner"] is None
    assert run("follow", unlisted, "Files.lines", "path=x", "count:=1").out == '"x:0"\n'
    ran = run("call", unlisted, "Files.echo", "number=5")
    assert ran.code == 6
    assert ran.error.startswith(
        "Files.echo: $.number: expected int, got str; the other side lists no interfaces, or only to users: "
        "give --user and --key-file; so NAME=TEXT was sent as text: write NAME:=JSON"
    )
    assert run("call", unlisted, "Files.stat", "path=/gone").error == "NoSuchFile: /gone"
    ran = run("list", unlisted)
    assert (ran.code, ran.out) == (5, "")
    assert ran.error == (
        "the other side lists no interfaces, or only to users: give --user and --key-file [no-method]"
    )


def test_over_plain_tcp_nothing_is_listed(run: Run) -> None:
    with serving("127.0.0.1:0", make_handler()) as address:
        ran = run("list", address)
    assert (ran.code, ran.out) == (5, "")
    assert ran.error == (
        "the other side lists no interfaces, or only to users, and a plain TCP connection has none: "
        "give --user and --key-file [no-method]"
    )


def test_a_user_to_whom_nothing_is_listed(run: Run, tmp_path: Path) -> None:
    key = Key.generate()
    key.save(tmp_path / "key")
    with serving("127.0.0.1:0", make_handler(listed=False), user_key={"ann": key}) as address:
        ran = run("list", "--user=ann", f"--key-file={tmp_path}/key", address)
    assert (ran.code, ran.error) == (5, "the other side lists no interfaces [no-method]")


def test_an_answer_that_is_none(run: Run, tmp_path: Path) -> None:
    async def lie(connection: Connection, request: list[bytes]) -> list[bytes]:
        match request:
            case [b"%call", b"Files.stat", _]:
                return [b"\xc1"]
            case [b"%call", b"Files.fail", _]:
                raise RequestError("it failed", code="%Failure", details=b"\xc1")
            case [b"%call", *_]:
                return []
        raise RequestError("no")

    with serving(str(tmp_path / "sock"), lie) as address:
        for method in ("Files.stat", "Files.other"):
            ran = run("call", address, method)
            assert (ran.code, ran.out) == (1, "")
            assert ran.error.startswith("the answer is not a value: ")
        ran = run("call", address, "Files.fail")
        assert (ran.code, ran.error) == (5, "it failed [Failure]")


def test_a_listing_that_is_none(run: Run, tmp_path: Path) -> None:
    with serving(str(tmp_path / "sock"), handler) as address:
        for command in (["list"], ["call", "x"]):
            ran = run(command[0], address, *command[1:])
            assert (ran.code, ran.out) == (1, "")
            assert ran.error.startswith("the answer is not a listing: ")


# ---- list and describe ----


def test_the_listing_for_people(run: Run, address: str) -> None:
    ran = run("list", address)
    lines = ran.out.splitlines()
    assert lines[:4] == [
        "Files",
        "    A file store.",
        "    stat(path: str, *, follow: bool = True) -> Stat",
        "        Look at a file.",
    ]
    assert "Not at what it links to" not in ran.out
    assert lines[-3:] == ["", "Bare", "    clear() -> None"]


def test_the_listing_for_programs(run: Run, address: str) -> None:
    files, _ = run("list", "--json", address).json
    assert files["name"] == "Files"
    [stat] = [each for each in files["methods"] if each["name"] == "stat"]
    assert stat["is_idempotent"]
    assert files["definitions"]["Files.stat"]["required"] == ["path"]


def test_the_listing_as_markdown(run: Run, address: str) -> None:
    ran = run("list", "--markdown", address)
    assert ran.out.startswith(
        "# Files\n\nA file store.\n\n## Files.stat\n\n"
        "```python\nstat(path: str, *, follow: bool = True) -> Stat\n```\n\n"
        "Look at a file.\n\nNot at what it links to.\n\nIt may run twice.\n\n"
        "Raises `NoSuchFile` with path (text).\n\n"
    )


def test_the_description_of_a_method_has_calls_to_fill_in(run: Run, address: str) -> None:
    ran = run("describe", address, "Files.stat")
    assert ran.out == (
        "stat(path: str, *, follow: bool = True) -> Stat\n"
        "    Look at a file.\n"
        "\n"
        "    Not at what it links to.\n"
        "    It may run twice.\n"
        "    path: text\n"
        "    follow: boolean, may be left out\n"
        "    It raises NoSuchFile with path (text)\n"
        "\n"
        f"bokbok call {address} Files.stat path=TEXT [follow=true|false]\n"
        f'bokbok call {address} Files.stat \'{{"path": "", "follow": true}}\'\n'
    )
    ran = run("describe", address, "Files.echo")
    assert (
        "[text=TEXT] [data=@FILE] [number=INTEGER] [ratio=NUMBER] [mode=r|w] [level=INTEGER] [stat:=JSON] "
        "[tags:=JSON] [pair:=JSON] [blobs:=JSON] [either=INTEGER|TEXT] [anything:=JSON]\n"
    ) in ran.out
    ran = run("describe", address, "Files.doubled")
    assert "    It takes a stream of items: integer\n    It gives a stream of items: integer\n" in ran.out
    assert f"bokbok call {address} Files.doubled numbers=@FILE\n" in ran.out


def test_an_interface_without_a_word_about_it(run: Run, address: str) -> None:
    assert run("list", "--markdown", address).out.endswith(
        "\n\n# Bare\n\n## Bare.clear\n\n```python\nclear() -> None\n```\n"
    )
    assert run("describe", address, "Bare.clear").out == (
        f"clear() -> None\n\nbokbok call {address} Bare.clear\n"
    )
    assert run("call", address, "Bare.clear").out == "null\n"
    ran = run("call", address, "Bare.clear", "x=1")
    assert (ran.code, ran.error) == (6, "x: Bare.clear has no such argument; it takes none")


def test_the_template_that_is_described_can_be_sent(run: Run, address: str) -> None:
    template = run("describe", "--json", address, "Files.echo").json["template"]
    assert template["mode"] == "r"
    ran = run("call", address, "Files.echo", json.dumps(template))
    assert ran.json.keys() == template.keys()
    template = run("describe", "--json", address, "Files.total").json["template"]
    assert run("call", address, "Files.total", json.dumps(template)).out == "0\n"


# ---- schemas, which the other side may make up ----


def names_of(*schemas: Any) -> list[str]:
    return [Schemas({}).name(each) for each in schemas]


def test_the_names_of_types() -> None:
    assert names_of(
        {"type": "string", "format": "uuid"}, {"type": "array"}, {"type": "object"}, {}, None, {"type": 3}
    ) == ["uuid", "a list", "an object", "anything", "anything", "3"]


def test_references_that_lead_nowhere_or_in_circles_allow_everything() -> None:
    schemas = Schemas({"A": {"$ref": "#/$defs/A"}, "B": 3, "D": {"anyOf": [{"$ref": "#/$defs/D"}]}})
    assert schemas.name({"$ref": "#/$defs/D"}) == "anything"
    assert schemas.from_text({"$ref": "#/$defs/D"}, "x") == "x"
    for name in "ABC":
        assert schemas.resolve({"$ref": f"#/$defs/{name}"}) == {}
    assert schemas.from_text({"$ref": "#/$defs/A"}, "5") == "5"
    assert schemas.properties({"properties": 3}) == {}
    assert schemas.from_json({"type": "array", "items": 3, "prefixItems": None}, [1]) == [1]


def test_a_template_of_what_holds_itself_ends() -> None:
    tree = {"type": "object", "properties": {"left": {"$ref": "#/$defs/Tree"}, "size": {"default": 7}}}
    schemas = Schemas({"Tree": tree})
    template = schemas.template({"$ref": "#/$defs/Tree"})
    depth = 0
    while template is not None:
        assert template["size"] == 7
        template, depth = template["left"], depth + 1
    assert depth == TEMPLATE_DEPTH + 1
    assert schemas.template({"anyOf": [{"type": "integer"}, {"type": "string"}]}) == 0
    assert schemas.template({"enum": ["x", "y"]}) == "x"
    assert schemas.template({"type": "array", "prefixItems": [{"type": "number"}, {}]}) == [0.0, None]
    deep: Any = "AA=="
    for _ in range(MAX_DEPTH + 2):
        deep = {"left": deep}
    assert schemas.from_json({"$ref": "#/$defs/Tree"}, deep) == deep


def test_the_alternative_that_fits_is_taken() -> None:
    """Several classes: the one whose tag and fields match. Other types: the one of the value's kind."""
    data = {"type": "string", "contentEncoding": "base64"}
    first = {"type": "object", "properties": {"kind": {"enum": ["a"]}, "data": data}, "required": ["kind"]}
    second = {"type": "object", "properties": {"kind": {"enum": ["b"]}, "data": {"type": "string"}}}
    either = {
        "anyOf": [{"type": "null"}, {"type": "integer"}, first, second, {"type": "array", "items": data}]
    }
    schemas = Schemas({})
    assert schemas.from_json(either, {"kind": "a", "data": "AA=="}) == {"kind": "a", "data": b"\0"}
    assert schemas.from_json(either, {"kind": "b", "data": "AA=="}) == {"kind": "b", "data": "AA=="}
    assert schemas.from_json(either, {"data": "AA=="}) == {"data": "AA=="}
    assert schemas.from_json(either, ["AA=="]) == [b"\0"]
    assert schemas.from_json({"anyOf": [{"enum": ["AA=="]}, data]}, "AA==") == "AA=="
    assert schemas.from_json({"anyOf": [{"enum": ["x"]}, {}]}, "AA==") == "AA=="
    assert schemas.from_json({"anyOf": [{"type": "integer"}, {"type": "boolean"}]}, True) is True
    assert schemas.from_json(either, 1.5) == 1.5


def test_placeholders() -> None:
    schemas = Schemas({})
    assert schemas.placeholder("x", {"type": "string", "format": "uuid"}) == "x=UUID"
    assert schemas.placeholder("x", {"enum": [1, "a"]}) == "x=1|a"
    assert schemas.placeholder("$(rm)", {"enum": [1, "$(rm)"]}) == "'$(rm)':=JSON"
    assert schemas.placeholder("x", {"type": "string", "format": "$(rm)"}) == "x:=JSON"
