"""`make audit`: check every pin of constraints.txt for known vulnerabilities, with pip-audit.

Exit codes: 0 none known, 1 some known, 3 look-up failed. pip-audit itself treats packages it cannot find as safe.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"


def main() -> int:
    """Run pip-audit, and print the result."""
    command = [sys.executable, "-m", "pip_audit", "-r", str(CONSTRAINTS), "--no-deps", "--disable-pip", "-f", "json"]
    done = subprocess.run([*command, "--progress-spinner", "off"], capture_output=True, text=True)
    try:
        report = json.loads(done.stdout)
    except ValueError:
        errors = done.stderr.strip().splitlines() or ["pip-audit printed nothing"]
        print(f"audit: nothing was looked up: {errors[-1][:300]}", file=sys.stderr)
        return 3
    code, lines = judge(report)
    print("\n".join(lines), file=sys.stderr if code == 3 else sys.stdout)
    return code


def judge(report: dict[str, Any]) -> tuple[int, list[str]]:
    """Return exit code and lines for a report of pip-audit."""
    pins = report["dependencies"]
    skipped = [pin["name"] for pin in pins if "skip_reason" in pin]
    vulnerabilities = [(pin, vuln) for pin in pins for vuln in pin.get("vulns", [])]
    lines = [
        f"{pin['name']} {pin['version']}: {vuln['id']}; fixed in {', '.join(vuln['fix_versions']) or 'no version yet'}"
        for pin, vuln in vulnerabilities
    ]
    if skipped:
        more = f"{', '.join(skipped[:5])}{', …' if len(skipped) > 5 else ''}"
        lines.append(f"audit: {len(skipped)} of {len(pins)} pins could not be looked up ({more}): is there a network?")
    if vulnerabilities:
        return 1, lines
    return (3, lines) if skipped or not pins else (0, [f"audit: no known vulnerabilities in {len(pins)} pins"])


if __name__ == "__main__":
    sys.exit(main())
