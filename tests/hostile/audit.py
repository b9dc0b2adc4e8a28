"""`make audit`: look every pin of constraints.txt up among the known vulnerabilities, with pip-audit.

Exit codes: 0 none is known, 1 some are, 3 nobody could be asked. pip-audit itself counts what it cannot find as sound.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"


def main() -> int:
    """Ask, and print what was found."""
    command = [sys.executable, "-m", "pip_audit", "-r", str(CONSTRAINTS), "--no-deps", "--disable-pip", "-f", "json"]
    done = subprocess.run([*command, "--progress-spinner", "off"], capture_output=True, text=True)
    try:
        report = json.loads(done.stdout)
    except ValueError:
        said = done.stderr.strip().splitlines() or ["pip-audit said nothing"]
        print(f"audit: nothing was looked up: {said[-1][:300]}", file=sys.stderr)
        return 3
    code, lines = judge(report)
    print("\n".join(lines), file=sys.stderr if code == 3 else sys.stdout)
    return code


def judge(report: dict[str, Any]) -> tuple[int, list[str]]:
    """Exit code and lines for a report of pip-audit."""
    pins = report["dependencies"]
    skipped = [pin["name"] for pin in pins if "skip_reason" in pin]
    found = [(pin, hole) for pin in pins for hole in pin.get("vulns", [])]
    lines = [
        f"{pin['name']} {pin['version']}: {hole['id']}; fixed in {', '.join(hole['fix_versions']) or 'no version yet'}"
        for pin, hole in found
    ]
    if skipped:
        more = f"{', '.join(skipped[:5])}{', …' if len(skipped) > 5 else ''}"
        lines.append(f"audit: {len(skipped)} of {len(pins)} pins could not be looked up ({more}): is there a network?")
    if found:
        return 1, lines
    return (3, lines) if skipped or not pins else (0, [f"audit: no vulnerability is known of {len(pins)} pins"])


if __name__ == "__main__":
    sys.exit(main())
