"""`budwood new`: writes a starter package with passing tests."""

from __future__ import annotations

import datetime
import json
import keyword
import re
from importlib import metadata, resources
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from budwood.cli.streams import echo

app = typer.Typer(help="Create a package for your own plugin.", no_args_is_help=True, rich_markup_mode=None)

HOOKS = {
    "before_optimizer_step": ("annealed Gaussian noise on the gradients", "{eta: 1e-6}"),
    "after_optimizer_step": ("a bound on the norm of every trained tensor", "{bound: 10}"),
    "loss_terms": ("a penalty on jumps of the last hidden state", "{weight: 0.1}"),
    "token_terms": ("a penalty on confident predictions", "{weight: 0.1}"),
    "prepare_batch": ("word dropout", "{rate: 0.1}"),
    "prepare_examples": ("removal of duplicate examples", "{copies: 1}"),
    "evaluate": ("a metric, with a warning if it grows too large", "{limit: 1000}"),
}
"""Hook with a template → what the package does, and the options in its README's example recipe."""
LICENSES = ("Apache-2.0", "MIT", "BSD-3-Clause")
TAKEN = ("base", "data", "strategies", "train", "output")
"""Sections of a recipe; `-o` addresses them by name."""
NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


@app.callback()
def _group() -> None:
    pass


@app.command("strategy", short_help="A strategy: package, options, tests, README.")
def strategy(
    name: Annotated[str, typer.Argument(help="Name in recipes, such as gradient-noise.")],
    hook: Annotated[
        str, typer.Option("--hook", metavar="HOOK", help="The hook it implements: " + ", ".join(HOOKS) + ".")
    ] = "before_optimizer_step",
    author: Annotated[str, typer.Option("--author", help="Such as 'Ada Lovelace <ada@example.org>'.")] = "",
    license: Annotated[str, typer.Option("--license", help=", ".join(LICENSES) + ".")] = LICENSES[0],
    folder: Annotated[Path | None, typer.Option("--folder", help="Output folder. Default: budwood-NAME.")] = None,
) -> None:
    """Write an installable package with one working strategy and passing tests."""
    from budwood.errors import InputError, did_you_mean
    from budwood.untrusted.files import complete_directory

    check_name(name)
    if hook not in HOOKS:
        raise InputError(f"--hook: there is no template for '{hook}'.{did_you_mean(hook, HOOKS)} {_available(HOOKS)}")
    license = next((known for known in LICENSES if known.casefold() == license.casefold()), license)
    if license not in LICENSES:
        suggestion = did_you_mean(license, LICENSES)
        raise InputError(f"--license: '{license}' is not supported.{suggestion} {_available(LICENSES)}")
    folder = folder or Path(f"budwood-{name}")
    if folder.exists() or folder.is_symlink():
        raise InputError(f"{folder} already exists and was left unchanged: choose another with --folder, or remove it.")
    files = render(name, hook, author, license)
    with complete_directory(folder) as partial:
        for path, text in files.items():
            (partial / path).parent.mkdir(parents=True, exist_ok=True)
            (partial / path).write_text(text, encoding="utf-8")
    echo(f"{folder}: {len(files)} files, {HOOKS[hook][0]}, in the hook {hook}")
    echo(f"next: cd {folder} && pip install -e '.[test]' && pytest && budwood plugins {name}", err=True)


def check_name(name: str) -> None:
    """Refuse a name that is taken, or that a recipe, Python or pip cannot use.

    Raises:
        InputError: states the reason.
    """
    from budwood.contract.discovery import installed
    from budwood.errors import InputError

    normalised = re.sub(r"[^a-z0-9]+", "-", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", name).lower()).strip("-")
    if name.startswith("budwood-") or name == "budwood":
        raise InputError(f"'{name[:60]}': leave out budwood; the package's name gets this prefix automatically.")
    if not NAME.fullmatch(name) or len(name) > 30:
        usable = normalised != name and NAME.fullmatch(normalised) and len(normalised) <= 30
        suggestion = f" Did you mean '{normalised}'?" if usable else ""
        raise InputError(
            f"'{name[:60]}' is not a strategy name: use at most 30 lower-case letters and digits, in words joined by "
            f"single dashes, starting with a letter.{suggestion}"
        )
    if keyword.iskeyword(name) or keyword.issoftkeyword(name) or keyword.iskeyword(class_name(name)):
        raise InputError(f"'{name}' is a Python keyword: choose another name.")
    if name in TAKEN:
        raise InputError(f"'{name}' is a section of every recipe: choose another name.")
    if owners := installed().get(name):
        raise InputError(f"strategy '{name}' is already installed ({owners[0].owner}): choose another name.")
    distribution, module = f"budwood-{name}", _module(name)
    if find_spec(module) is not None or any(True for _ in metadata.Distribution.discover(name=distribution)):
        raise InputError(f"a package {distribution} or module {module} is already installed: choose another name.")


def class_name(name: str) -> str:
    """Return the class name for a strategy name: GradientNoise for gradient-noise."""
    return "".join(part.capitalize() for part in name.split("-"))


def render(name: str, hook: str, author: str, license: str) -> dict[str, str]:
    """Return the package's files, by path."""
    import budwood

    author_name, email = _split_author(author)
    distribution, module, cls = f"budwood-{name}", _module(name), class_name(name)
    source = _read(f"hooks/{hook}.py")
    summary = re.findall(r'"""(.*?)"""', source)[1]  # the class docstring
    email_field = f", email = {_toml(email)}" if email else ""
    author_table = f"{{name = {_toml(author_name)}{email_field}}}" if author_name else ""
    values = {
        "about": f"It implements the hook `{hook}`.",
        "authors": f"authors = [{author_table}]\n" if author_name else "",
        "budwood": ".".join(budwood.__version__.split(".")[:2]),
        "class": cls,
        "description": _toml(summary.split(" (")[0].rstrip(".")),
        "distribution": distribution,
        "example": HOOKS[hook][1],
        "holder": author_name or f"the authors of {distribution}",
        "license": license,
        "module": module,
        "name": name,
        "options": "\n".join(f"- {line}" for line in _option_lines(source)),
        "summary": summary,
        "year": str(datetime.date.today().year),
    }
    templates = {
        ".github/workflows/test.yml": "workflow.yml",
        ".gitignore": "gitignore",
        "LICENSE": f"licenses/{license}",
        "README.md": "README.md",
        "pyproject.toml": "pyproject.toml",
        f"{module}/__init__.py": "init.py",
        f"{module}/strategy.py": f"hooks/{hook}.py",
        f"tests/test_{module.removeprefix('budwood_')}.py": f"tests/{hook}.py",
    }
    return {path: _fill(_read(template), values) for path, template in templates.items()}


def _option_lines(source: str) -> list[str]:
    """Return a README line for each option of a template."""
    options = re.findall(r'^        (\w+): (\w+) = Field\(([^,]+), .*description="([^"]*)"\)$', source, re.MULTILINE)
    return [f"`{name}` ({type_}, default {default}): {description}" for name, type_, default, description in options]


def _read(template: str) -> str:
    path = resources.files("budwood").joinpath("templates", "strategy", *f"{template}.template".split("/"))
    return path.read_text(encoding="utf-8")


def _fill(text: str, values: dict[str, str]) -> str:
    return re.sub(r"(?<!\$)\{\{(\w+)\}\}", lambda match: values[match[1]], text)


def _split_author(author: str) -> tuple[str, str]:
    """Return name and email address of 'Name <email>'.

    Raises:
        InputError: `author` has another form, or is not printable.
    """
    from budwood.errors import InputError

    match = re.fullmatch(r"\s*([^<>]*?)\s*(?:<([^<>@\s]+@[^<>@\s]+)>)?\s*", author)
    if match is None or not author.isprintable() or (match[2] and not match[1]):
        raise InputError(f"--author: {author[:60]!r} does not look like 'Ada Lovelace <ada@example.org>'.")
    return match[1], match[2] or ""


def _module(name: str) -> str:
    return f"budwood_{name.replace('-', '_')}"


def _toml(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _available(names: Any) -> str:
    return f"Available: {', '.join(names)}."
