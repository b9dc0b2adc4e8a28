"""The conformance kit as a pytest plugin: it imports nothing in unrelated tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

MODULES = ("torch", "pydantic", "transformers", "budwood.contract", "budwood.testing.conformance", "budwood_lora")


def run_pytest(folder: Path, text: str) -> subprocess.CompletedProcess[str]:
    (folder / "test_it.py").write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "test_it.py"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=dict(os.environ), check=False)


def test_an_unrelated_test_loads_only_the_plugin(tmp_path: Path) -> None:
    done = run_pytest(
        tmp_path,
        "import sys\n\ndef test_it(pytestconfig):\n"
        "    assert pytestconfig.pluginmanager.has_plugin('budwood')\n"
        f"    assert not [name for name in {MODULES!r} if name in sys.modules]\n",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "budwood:" not in done.stdout
