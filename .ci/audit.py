"""requirements-cpu.txt against the advisories of PyPI or OSV: exit 1 where there are any, 0 where none or not run.

pip-audit also says "no known vulnerabilities" where the database has no answer. So it is first asked about a release
whose holes are known; where it does not know them, nothing is said of the others. Words after the command go to
pip-audit: `--ignore-vuln ID`.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

LOCK = Path(__file__).resolve().parents[1] / "requirements-cpu.txt"
KNOWN = "pillow==9.0.0\n"  # CVE-2022-22817 and a dozen others


def holes(requirements, service, *words):
    """(package, version, advisories) that the database tells of exact requirements; None where it tells nothing."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(requirements)
        file.flush()
        options = [
            "--no-deps",
            "--disable-pip",
            "--progress-spinner",
            "off",
            "--format",
            "json",
            "-s",
            service,
            "-r",
        ]
        command = [sys.executable, "-m", "pip_audit", *options, file.name, *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    try:
        told = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        return None
    return [(each["name"], each["version"], each["vulns"]) for each in told if each.get("vulns")]


def main(words):
    service = next((each for each in ("pypi", "osv") if holes(KNOWN, each)), None)
    if service is None:
        print("audit: not run: no advisory database is reachable from here")
        return 0
    # The index tells of torch 2.13.0, not of the build 2.13.0+cpu.
    asked = re.sub(r"\+\w+| --hash\S+", "", LOCK.read_text(encoding="utf-8"))
    found = holes(asked, service, *words)
    if found is None:
        print(f"audit: {service} gave no answer about {LOCK.name}")
        return 1
    for name, version, advisories in found:
        for each in advisories:
            print(
                f"audit: {name} {version}: {each['id']}, fixed in {', '.join(each['fix_versions']) or 'no release'}"
            )
    print(f"audit: {len(found)} packages of {LOCK.name} with known holes ({service})")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
