"""pip's report of an installation, on standard input → requirements with the sha256 of each file, on standard output.

`make lock` runs it. Knows pip's format (PEP 508 names, `pip install --dry-run --report`): nothing of the project.
"""

import json
import sys

HEAD = """\
# Every package of `make setup` on a CPU, and of the package's own tests, with the sha256 of the file that was chosen:
# CPython {python}, {machine}. Made by `make lock`; nothing in it is typed by hand. To install exactly these files:
#     pip install --require-hashes -r requirements-cpu.txt
# torch is the CPU build, which is not on the usual index: add --extra-index-url with the one that holds it. What the
# hashes do not cover is said in SECURITY.md.
"""


def lines(report):
    """name==version --hash=…, by name; what has no file to hash (the project itself, a folder) is left out."""
    found = {}
    for each in report["install"]:
        hashes = each["download_info"].get("archive_info", {}).get("hashes", {})
        if "sha256" in hashes:
            about = each["metadata"]
            found[about["name"].lower()] = (
                f"{about['name']}=={about['version']} --hash=sha256:{hashes['sha256']}"
            )
    return [found[name] for name in sorted(found)]


if __name__ == "__main__":
    report = json.load(sys.stdin)
    here = report["environment"]
    python, machine = here["python_version"], f"{here['sys_platform']} {here['platform_machine']}"
    print(HEAD.format(python=python, machine=machine) + "\n".join(lines(report)))
