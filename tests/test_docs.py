"""What README and docs show is so: Python runs, commands parse, links lead somewhere, the engine table is the registry's."""

import inspect
import re
import shlex
import tomllib
from functools import cache
from pathlib import Path

import click
import pytest

import altgrad
from altgrad import cli_listings, cli_options, optimizers, registry, testing
from altgrad.cli import cli
from altgrad.local.losses import TABLE as LOSSES
from altgrad.models import TABLE as MODELS
from altgrad.tables import engine_table

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted((ROOT / "docs").glob("*.md"))
THEIRS = ("mypackage", "two_point", "package.module")  # modules that only exist at the reader's


def fenced(page: Path, *languages: str) -> list[str]:
    """The bodies of the page's code blocks in one of the languages."""
    return [body for language, body in re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf8"), re.M | re.S) if language in languages]


@cache
def commands() -> list[tuple[str, str]]:
    """(page, line) of every altgrad command in a shell block or in code within the text, without variables before and comments behind."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf8")
        prose = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
        lines = [line for block in fenced(page, "sh") for line in block.splitlines()] + re.findall(r"`([^`\n]+)`", prose)
        for line in lines:
            match = re.match(r"""(?:eval "\$\()?((?:ALTGRAD_\w+=\S+ )*altgrad [^#)]*)""", line)
            if match:
                found.append((page.name, re.sub(r"^(ALTGRAD_\w+=\S+ )*", "", match[1]).strip()))
    return found


def parsed(line: str) -> click.Context:
    """The innermost command's context for `line`, parsed and not run; a command's bare name is a mention, which may lack arguments."""
    words = shlex.split(line)[1:]
    context = click.Context(cli, info_name="altgrad")
    command: click.Command = cli
    while isinstance(command, click.Group):
        name, command, words = command.resolve_command(context, words)
        if isinstance(command, click.Group):
            context = click.Context(command, parent=context)
    return command.make_context(name, list(words), parent=context, resilient_parsing=not words)


def known(kind: str, name: str) -> bool:
    """Whether a name in a command is one that altgrad knows, or the reader's own."""
    table = {"model": MODELS}.get(kind) or registry.table(kind)
    return name in table or name.startswith(THEIRS) or name.isupper()


# -- the README ------------------------------------------------------------------------------------------------------------------


def test_the_readmes_engine_table_is_the_registrys():
    assert engine_table() in (ROOT / "README.md").read_text(encoding="utf8")


def test_the_readmes_first_screen_has_the_two_commands_and_an_example_of_about_ten_lines():
    screen = (ROOT / "README.md").read_text(encoding="utf8").split("## ")[0]
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf8"), re.M)
    assert re.findall(r"^make (\w+)", screen, re.M) == ["demo", "test"]
    assert {"demo", "test"} <= set(targets)
    assert len(fenced(ROOT / "README.md", "python")[0].splitlines()) <= 12
    assert "not good at" in screen


def test_the_readmes_example_learns_something_in_two_passes(capsys):
    example = fenced(ROOT / "README.md", "python")[0]
    assert "10 * list" in example
    exec(compile(example.replace("10 * list", "2 * list"), "README.md", "exec"), {})
    assert float(re.search(r"tensor\(([\d.]+)\)", capsys.readouterr().out)[1]) > 0.5  # chance is 0.1


def test_every_paper_an_engine_names_is_in_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf8")
    for name in registry.names("engine"):
        rule = registry.find("engine", name)
        for paper in re.findall(r"\d{4}\.\d{5}", f"{rule.__doc__} {rule().source}"):
            assert paper in text


def test_the_readmes_extras_are_those_of_the_package():
    text = (ROOT / "README.md").read_text(encoding="utf8")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))["project"]["optional-dependencies"]
    shown = re.findall(r"^\| `(\w+)` \|", text.split("Extras:")[1].split("##")[0], re.M)
    assert set(shown) == set(extras) - {"all", "peers"}


def test_the_readmes_exit_codes_are_those_of_the_errors():
    text = (ROOT / "README.md").read_text(encoding="utf8").split("## Exit codes")[1].split("##")[0]
    shown = {int(code) for row in re.findall(r"^\| ([\d, ]+) \|", text, re.M) for code in row.split(",")}
    classes = [cls for _, cls in inspect.getmembers(altgrad.errors, inspect.isclass) if issubclass(cls, altgrad.errors.AltgradError)]
    assert shown == {0, 130, 143} | {cls.exit_code for cls in classes}


# -- every page ------------------------------------------------------------------------------------------------------------------

BLOCKS = [(page.name, number, block) for page in PAGES for number, block in enumerate(fenced(page, "python")) if (page.name, number) != ("README.md", 0)]


@pytest.mark.parametrize(("page", "number", "block"), BLOCKS, ids=[f"{page}-{number}" for page, number, _ in BLOCKS])
def test_python_of_a_page_runs(page, number, block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some write files
    exec(compile(block, page, "exec"), {"__name__": f"{page}-{number}"})


def test_the_engine_that_the_docs_write_keeps_every_claim():
    space: dict = {"__name__": "two_point"}
    exec(compile(fenced(ROOT / "docs" / "writing-an-engine.md", "python")[0], "two_point.py", "exec"), space)
    results = testing.run(space["TwoPoint"]())
    assert results
    assert [result for result in results if not result.passed] == []


def test_commands_are_found():
    shown = {line.split()[1] for _, line in commands() if len(line.split()) > 1}
    assert set(cli.commands) <= shown | {"optimizers", "problems", "models"}
    assert len(commands()) > 30


@pytest.mark.parametrize(("page", "line"), sorted(set(commands())), ids=lambda value: value.replace(" ", "_"))
def test_command_of_a_page_parses(page, line):
    given = parsed(line).params
    if "engine" in given and given["engine"] is None and given.get("problem"):
        given["engine"] = registry.preferred(given["problem"])["engine"]
    for kind in ("problem", "model", "engine"):
        if given.get(kind) is not None:
            assert known(kind, given[kind])
    if given.get("engine") in registry.table("engine"):
        registry.engine(given["engine"], registry.split_pairs(given.get("engine_setting") or ()))
    if given.get("model") in MODELS:
        registry.build(MODELS[given["model"]], registry.split_pairs(given.get("model_setting") or ()), "model")
    for text in re.split(r",(?![^\[]*\])", given.get("engines") or ""):
        if text and not text.startswith(THEIRS):
            cli_options.chosen(text).build()
    if given.get("optimizer"):
        optimizers.find(given["optimizer"])
    if line.startswith("altgrad describe") and given.get("name") and not given["name"].isupper() and not given["name"].startswith(THEIRS):
        cli_listings.described(given["name"])


def test_a_command_with_an_unknown_option_or_setting_would_be_noticed():
    with pytest.raises(click.UsageError):
        parsed("altgrad train --enginee forward")
    with pytest.raises(click.UsageError):
        parsed("altgrad trane")
    with pytest.raises(altgrad.errors.SettingError):
        test_command_of_a_page_parses("", "altgrad train -s tangent=4")


def test_relative_links_lead_somewhere():
    broken = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf8")):
            if not target.startswith(("http:", "https:", "#")) and not (page.parent / target.split("#")[0]).exists():
                broken.append(f"{page.name}: {target}")
    assert broken == []


def test_paths_in_code_exist():
    for page in PAGES:
        for path in re.findall(r"`((?:altgrad|tests|benchmarks|examples|docs)/[\w/.]+\.py)`", page.read_text(encoding="utf8")):
            assert (ROOT / path).exists() or path == "altgrad/engines/two_point.py"


def test_settings_that_the_docs_name_exist():
    fields = {row["name"] for kind in ("engine", "problem") for name in registry.names(kind) for row in registry.describe_settings(registry.find(kind, name))}
    fields |= {row["name"] for kind in MODELS.values() for row in registry.describe_settings(kind)}
    fields |= {row["name"] for loss in LOSSES.values() for row in registry.describe_settings(loss)}
    for page in PAGES:
        for settings in re.findall(r"`((?:(?:-s )?[a-z_]+=[a-zA-Z0-9-]+ ?)+)`", page.read_text(encoding="utf8")):
            for pair in settings.replace("-s ", "").split():
                assert pair.split("=")[0] in fields | {"epochs", "forwards", "seconds"}, f"{page.name}: {pair}"


# -- docstrings ------------------------------------------------------------------------------------------------------------------

PUBLIC = [name for name in altgrad.__all__ if name != "__version__"]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_has_a_docstring_that_tells_of_its_arguments(name):
    thing = getattr(altgrad, name)
    told = inspect.getdoc(thing) or ""
    assert told
    assert not told.startswith(f"{name}(")  # the one that Python makes up for a dataclass or a NamedTuple
    if inspect.isclass(thing) and issubclass(thing, tuple):
        told += " ".join(re.findall(r"^    (\w+): .*#", inspect.getsource(thing), re.M))  # fields with a comment of their own
    for other in PUBLIC:
        if f"arguments as in `{other}`" in told:
            told += inspect.getdoc(getattr(altgrad, other)) or ""
    enumeration = inspect.isclass(thing) and issubclass(thing, altgrad.Needs.__base__ | altgrad.Bias.__base__)
    taken = {} if enumeration else inspect.signature(thing).parameters
    plain = {"name"}  # says itself
    assert [argument for argument in taken if argument not in plain and not re.search(rf"\b{argument}\b", told)] == []
