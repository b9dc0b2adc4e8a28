"""docs/writing-a-strategy.md: its code is copied from tested files, and its commands exist."""

from __future__ import annotations

import re
from pathlib import Path

from budwood.cli import app
from budwood.cli.new import render
from budwood.contract.examples import _REMOVED_FROM_BATCH, _REMOVED_FROM_EXAMPLE
from budwood.contract.hookspecs import HookSpecs
from budwood.testing import StrategyConformance

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "writing-a-strategy.md").read_text(encoding="utf-8")


NUMBERS = ROOT / "tests" / "fixtures" / "number_task" / "budwood_numbers" / "__init__.py"


def hook_example(name: str) -> str:
    """The source of a class of docs/hook_examples.py, whose hooks run in the tests of the contract."""
    text = (ROOT / "docs" / "hook_examples.py").read_text(encoding="utf-8")
    (found,) = re.findall(rf"^class {name}\(.*?\n(?=\n\n\S|\Z)", text, re.MULTILINE | re.DOTALL)
    return found


def blocks(language: str) -> list[str]:
    """The page's code blocks in a language, in their order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_the_code_is_that_of_the_files() -> None:
    generated = render("gradient-noise", "before_optimizer_step", "", "Apache-2.0")
    folder = ROOT / "examples" / "strategies"
    files = {
        "strategy.py of `budwood new`": generated["budwood_gradient_noise/strategy.py"],
        "tests of `budwood new`": generated["tests/test_gradient_noise.py"],
        **{
            path: (folder / path).read_text(encoding="utf-8")
            for path in (
                "budwood-base-kl/budwood_base_kl/strategy.py",
                "budwood-base-kl/tests/test_base_kl.py",
                "budwood-scaling/budwood_scaling/strategy.py",
                "budwood-scaling/tests/test_scaling.py",
            )
        },
        **{f"{name} of docs/hook_examples.py": hook_example(name) for name in ("LongAnswers", "Repulsion")},
        "the task of numbers": NUMBERS.read_text(encoding="utf-8"),
    }
    assert len(blocks("python")) == len(files)
    for (name, text), block in zip(files.items(), blocks("python"), strict=True):
        assert block == text, f"the page's copy of {name} differs from the file"


def test_the_examples_differ_from_what_is_generated_where_the_page_says(tmp_path: Path) -> None:
    for name, hook in (("base-kl", "token_terms"), ("scaling", "before_optimizer_step")):
        module = f"budwood_{name.replace('-', '_')}"
        generated = render(name, hook, "The authors of Budwood", "Apache-2.0")
        folder = ROOT / "examples" / "strategies" / f"budwood-{name}"
        config, own = generated["pyproject.toml"], (folder / "pyproject.toml").read_text(encoding="utf-8")
        assert re.sub("description = .*", "", own) == re.sub("description = .*", "", config)
        body = (folder / module / "__init__.py").read_text(encoding="utf-8").partition('"""\n')[2]
        assert body == generated[f"{module}/__init__.py"].partition('"""\n')[2]


def test_its_commands_exist() -> None:
    found = {
        " ".join(words) for words in re.findall(r"^budwood (\w+)(?: (\w+))?", "\n".join(blocks("sh")), re.MULTILINE)
    }
    assert {"new strategy", "plugins gradient", "plan recipe", "tune recipe"} <= found
    for command in found:
        first, _, second = command.partition(" ")
        assert app.run([first, *([second] if first in ("new", "adapter") else []), "--help"]) == 0


def test_every_promise_of_the_kit_is_in_its_table() -> None:
    tests = {name.removeprefix("test_") for name in dir(StrategyConformance) if name.startswith("test_")}
    assert tests == set(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE))


def test_every_removed_name_is_in_the_table_of_version_1() -> None:
    table = PAGE.partition("## From version 1")[2].partition("\n## ")[0]
    removed = [f"example.{name}" for name in _REMOVED_FROM_EXAMPLE] + [f"batch.{name}" for name in _REMOVED_FROM_BATCH]
    assert [name for name in removed if f"`{name}" not in table] == []
    assert "`len(example)`" in table


def test_its_links_to_hooks_name_hooks() -> None:
    named = re.findall(r"hooks\.md#(\w+)", PAGE)
    assert len(named) > 5 and all(hasattr(HookSpecs, name) for name in named)
