"""What the pages name is there: sections, links, keys with their defaults, commands with their options."""

import contextlib
import functools
import importlib
import importlib.util
import inspect
import io
import pathlib
import re
import shlex
import sys

import pytest

import z1_jax
from z1_jax.config.command_line import parse_command_line
from z1_jax.config.schema import Config, flat
from z1_jax.study import __main__ as study
from z1_jax.study.config import parse_study

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "policies/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
CODE = sorted(p for top in ("envs", "z1_jax", "benchmarks", "examples") for p in (ROOT / top).rglob("*.py"))
REFERENCE = re.compile(r"\(method: sections? ([^)]*)\)")
KEYS = flat(Config())
SECTIONS = sorted({key.split(".")[0] for key in KEYS if "." in key})


def headings(path: pathlib.Path) -> list[str]:
    """The headings of a page, without their marks; not the comments of its code."""
    prose = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)
    return [line.lstrip("#").strip() for line in prose.splitlines() if re.match(r"#{1,6} ", line)]


def anchor(heading: str) -> str:
    """The name that GitHub gives to a heading's place."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def commands(path: pathlib.Path) -> list[str]:
    """Shell commands of a page's code blocks and inline code, each in one line."""
    text = path.read_text()
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.M | re.S)
    blocks = [code for language, code in fenced if language in ("", "bash", "sh")]
    blocks += re.findall(r"(?:^    .*\n)+", text, flags=re.M)
    inline = re.findall(r"`((?:JAX_\S+ )*python -m (?:z1_jax|envs)[^`]*)`", text.replace("\n", " "))
    lines = "\n".join(blocks).replace("\\\n", "").splitlines() + inline
    return [line.strip() for line in lines if "python -m " in line or "python benchmarks/" in line]


def test_citation_names_the_version():
    told = (ROOT / "CITATION.cff").read_text()
    assert f"version: {z1_jax.__version__}\n" in told and "arXiv:2606.31846" in told


def test_references_to_the_method_lead_to_a_section():
    sections = {heading.split(".")[0] for heading in headings(ROOT / "docs/method.md") if heading[0].isdigit()}
    assert sections == set("12345678")
    found = 0
    for path in CODE:
        for numbers in REFERENCE.findall(path.read_text()):
            assert re.fullmatch(r"\d((,| and) \d)*", numbers), f"{path}: (method: section {numbers})"
            missing = set(re.findall(r"\d", numbers)) - sections
            assert not missing, f"{path}: docs/method.md has no section {', '.join(sorted(missing))}"
            found += 1
    assert found >= 10  # the code does refer


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)|src(?:set)?=\"([^\"]+)\"", page.read_text()):
        link = target[0] or target[1]
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        file, _, place = link.partition("#")
        path = page.parent / file if file else page
        assert path.exists(), f"{page.name}: {link}"
        if place:
            assert place in map(anchor, headings(path)), f"{page.name}: {link}"


def test_pages_that_the_code_names_exist():
    for path in CODE:
        for name in re.findall(r"docs/[\w-]+\.md", path.read_text()):
            assert (ROOT / name).is_file(), f"{path}: {name}"


def shown(value: object) -> str:
    return {True: "true", False: "false"}.get(value, str(value)) if isinstance(value, bool) else str(value)


def same(default: object, told: str) -> bool:
    """Whether a page's default is the schema's."""
    if isinstance(default, float):
        return float(told) == default
    if isinstance(default, list):
        return ",".join(default) == told.replace(" ", "")
    return shown(default) == told


def test_tables_of_keys_tell_the_defaults():
    """Rows "| `key`, `key` | value, value | …" below a header whose second column is called default."""
    checked = 0
    for page in PAGES:
        column = None
        for line in page.read_text().splitlines():
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]
            if not line.startswith("|"):
                column = None
            elif cells[0] == "key":
                column = 1 if cells[1] == "default" else None
            elif column and "`" in cells[0]:
                keys, first = [], ""
                for name in re.findall(r"`([^`]+)`", cells[0]):
                    keys.append(first.rpartition(".")[0] + name if name.startswith(".") else name)
                    first = keys[-1]
                told = cells[1].split(", ") if len(keys) > 1 else [cells[1]]
                told *= len(keys) if len(told) == 1 else 1
                for key, value in zip(keys, told, strict=True):
                    assert key in KEYS, f"{page.name}: {key}"
                    assert same(KEYS[key], value.strip("`")), f"{page.name}: {key} is {KEYS[key]}, not {value}"
                    checked += 1
    assert checked > 50


def test_every_number_that_an_iteration_logs_is_documented():
    told = set(re.findall(r"`([^`]+)`", (ROOT / "docs/switches.md").read_text()))
    logged = set()
    for name in ("diagnostics", "trainer", "loop"):
        source = (ROOT / f"z1_jax/rl/{name}.py").read_text()
        logged |= set(re.findall(r'"([a-z_]+/[a-z_]+)"', source))
    logged = {name for name in logged if not name.startswith(("selective/", "update/"))}  # of a decision; of evidence
    assert len(logged) > 20 and logged <= told, logged - told


def test_keys_that_pages_name_exist():
    name = re.compile(rf"`(?:--config\.)?((?:{'|'.join(SECTIONS)})(?:\.[a-z_0-9]+)+)(?:=[^`]*)?`")
    for page in PAGES:
        for key in name.findall(page.read_text()):
            inner = any(known.startswith(key + ".") for known in KEYS)
            file = key.endswith((".md", ".py", ".json", ".safetensors", ".model"))
            assert key in KEYS or inner or file, f"{page.name}: {key}"


@functools.cache
def options_of(module: str, *arguments: str) -> frozenset[str]:
    """The options that a command's --help tells."""
    spec = importlib.util.find_spec(module)
    loaded = importlib.import_module(f"{module}.__main__" if spec.submodule_search_locations else module)
    takes_argv = any(p.default is p.empty for p in inspect.signature(loaded.main).parameters.values())
    argv, out = [module, *arguments, "--help"], io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        pytest.raises(SystemExit),
    ):
        patch.setattr(sys, "argv", argv)
        loaded.main(argv) if takes_argv else loaded.main()
    return frozenset(re.findall(r"--[a-z][a-z-]*", out.getvalue()))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_have_their_modules_presets_keys_and_options(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for line in commands(page):
        module, _, rest = re.split(r"python3? (?:-O )?(?:-m )?", line, maxsplit=1)[1].partition(" ")
        words = shlex.split(rest.replace("my_world:Push", "examples.reach:Reach"), comments=True)
        if module.startswith("benchmarks/"):
            assert (ROOT / module).is_file(), f"{page.name}: {line}"
        if not re.fullmatch(r"(z1_jax|envs)\.[a-z_.]+", module):
            continue
        assert importlib.util.find_spec(module), f"{page.name}: {line}"
        options = [word for word in words if word.startswith("--")]
        if module in ("z1_jax.train", "z1_jax.evaluate", "z1_jax.plan"):
            options = [option.replace("--policy=", "--config.checkpoint=") for option in options]
            config = [option for option in options if option.startswith("--config")]
            parse_command_line(["", *config], f"configs/{'eval' if module == 'z1_jax.evaluate' else 'grpo'}.py")
            options = [option for option in options if option not in config]
        if module == "z1_jax.study":
            tables = [option for option in options if option.startswith(study.AGAIN)]
            parse_study(["", *(option for option in options if option not in (*tables, study.REPORT, study.NO_PROBE))])
            continue
        if options and options != ["--help"]:
            modes = [option for option in options if option.startswith(("--from=", "--check="))]  # a parser for each
            known = options_of(module, *modes)
            unknown = {option.partition("=")[0] for option in options} - known
            assert not unknown, f"{page.name}: {line}: there is no {', '.join(unknown)}"
