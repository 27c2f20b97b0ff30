"""The workshop: `nox` runs what must pass; `nox -l` lists all."""

import shutil

import nox

nox.options.sessions = ["lint", "types", "tests", "lowest", "docs", "demo", "build"]
nox.options.default_venv_backend = "venv"


@nox.session
def lint(session: nox.Session) -> None:
    """Style, and what ruff knows of mistakes."""
    session.install("-e", ".[lint]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Two type checkers, strict, and four that must take right uses of interfaces and refuse wrong ones."""
    session.install("-e", ".[types]", "nox")
    session.run("mypy")
    session.run("pyright")
    session.run("python", "typing_tests/check.py")


@nox.session
def tests(session: nox.Session) -> None:
    """All tests, those of examples with databases too, with coverage of lines and branches."""
    session.install("-e", ".[test,examples]")
    session.run("pytest", "-n", "2", "--cov", *session.posargs)


@nox.session(python=["3.11", "3.12", "3.13"])
def pythons(session: nox.Session) -> None:
    """All tests under each Python that is at hand."""
    session.install("-e", ".[test]")
    session.run("pytest", "-n", "2", *session.posargs)


@nox.session
def lowest(session: nox.Session) -> None:
    """All tests with the oldest dependencies we allow."""
    project = nox.project.load_toml("pyproject.toml")["project"]
    oldest = [requirement.replace(">=", "==") for requirement in project["dependencies"]]
    session.install(*oldest, "-e", ".[test]")
    session.run("pytest", "-n", "2", *session.posargs)


@nox.session
def interop(session: nox.Session) -> None:
    """The package against the implementation in Node.js, for which `npm` must be there."""
    session.install("-e", ".[test]")
    with session.chdir("interop/node"):
        session.run("npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", external=True)
    files = ("peer", "requests", "errors", "judges")
    tests = (f"tests/public/test_node_{file}.py" for file in files)
    session.run("pytest", *tests, *session.posargs, env={"NODE_PEER": "must run"})


@nox.session
def docs(session: nox.Session) -> None:
    """Every text is valid reStructuredText."""
    session.install("-e", ".[docs]")
    for text in (
        "README.rst",
        "CHANGELOG.rst",
        "docs/protocol.rst",
        "docs/security.rst",
        "docs/keys.rst",
        "docs/performance.rst",
        "docs/running.rst",
        "docs/blocking.rst",
        "docs/testing.rst",
        "docs/patterns.rst",
        "docs/watching.rst",
        "docs/interfaces.rst",
        "docs/architecture.rst",
        "docs/cli.rst",
        "docs/tutorial.rst",
        "benchmarks/README.rst",
        "fuzz/README.rst",
        "proofs/README.rst",
    ):
        session.run("docutils", "--strict", text, "--writer=null")


@nox.session
def demo(session: nox.Session) -> None:
    """The demo, as a newcomer runs it, and the example of channels."""
    session.install("-e", ".")
    for example in ("demo", "channels", "files"):
        session.run("python", f"examples/{example}.py")


@nox.session
def bench(session: nox.Session) -> None:
    """Measure ours and the yardsticks: two minutes, on a machine that does nothing else."""
    session.install("-e", ".[bench]")
    session.run("python", "benchmarks/run.py", *session.posargs)


@nox.session
def compare(session: nox.Session) -> None:
    """Measure all libraries: a quarter of an hour."""
    session.install("-e", ".[compare]")
    session.run("python", "benchmarks/run.py", "all", "--rounds", "5", "--seconds", "0.25", *session.posargs)


@nox.session
def soak(session: nox.Session) -> None:
    """Ask all kinds of things for an hour; `-- --seconds 600 --sealed --seed 7` changes that."""
    session.install("-e", ".")
    session.run("python", "benchmarks/soak.py", *session.posargs)


@nox.session
def ledger(session: nox.Session) -> None:
    """Kill, suspend, cut, corrupt, and compare what was asked, run and answered; `-- --requests N`."""
    session.install("-e", ".")
    session.run("python", "benchmarks/ledger.py", *session.posargs)


@nox.session
def load(session: nox.Session) -> None:
    """Measure what floods and strangers cost; `-- --only nonsense` for some strangers."""
    session.install("-e", ".")
    if not session.posargs:
        for flooders in (1, 64):
            session.run("python", "benchmarks/floods.py", "--flooders", str(flooders))
    session.run("python", "benchmarks/strangers.py", *session.posargs)


@nox.session
def proofs(session: nox.Session) -> None:
    """Have ProVerif prove what it can of the protocol, and find what was weakened."""
    if shutil.which("proverif") is None:
        session.skip("proverif is not on the PATH; proofs/README.rst tells where to find it")
    session.run("python", "proofs/run.py", *session.posargs)


@nox.session
def mutations(session: nox.Session) -> None:
    """Mutate the package for each security claim, and see its test fail; `-- NAME` for some only."""
    session.install("-e", ".[test]")
    session.run("python", "-m", "tests.support.mutations", *session.posargs)


@nox.session
def fuzz(session: nox.Session) -> None:
    """Fuzz what peers send; `-- --seconds 900 session`, or `-- --planted` to find planted bugs."""
    session.install("-e", ".[fuzz]")
    session.run("python", "-m", "fuzz.run", *session.posargs)


@nox.session
def build(session: nox.Session) -> None:
    """Build the wheel, install it alone, and use it."""
    session.install("build")
    wheels = session.create_tmp()
    session.run("python", "-m", "build", "--outdir", wheels, ".")
    session.install("--force-reinstall", "--find-links", wheels, "--no-index", "--no-deps", "bokbok-trio")
    session.install("trio", "pynacl")
    session.chdir(wheels)
    session.run("python", "-c", "import bokbok_trio.testing; print(bokbok_trio.__version__)")
    session.run("bokbok", "key", "new", "-", silent=True)
