"""C.31 and C.32: what the project stands on, and what it never does: the ban on calls that run what they read.

The ban is on what the code says (its syntax tree), not on letters in a file. Floors and hashes are read from the files
that pip reads. At full count the wheel is installed in an environment of its own, and its commands run where every
address that they ask for is written down, without a network where Linux lets us.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import tomllib
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

import pytest
from faults.report import FULL
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
LOCK = ROOT / "requirements-cpu.txt"

# --- what is never done -----------------------------------------------------------------------------------------------

FORBIDDEN = {  # whatever they are called with
    *(f"{name}.{way}" for name in ("pickle", "_pickle", "dill", "cloudpickle", "marshal") for way in ("load", "loads")),
    "pickle.Unpickler", "dill.Unpickler", "shelve.open", "joblib.load", "pandas.read_pickle", "torch.hub.load",
    "torch.jit.load", "torch.package.PackageImporter", "torch.utils.cpp_extension.load", "eval", "exec", "compile",
    "__import__", "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "yaml.unsafe_load_all",
    "os.system", "os.popen", "subprocess.getoutput", "hydra.utils.instantiate", "hydra.utils.call", "runpy.run_path",
    "runpy.run_module", "code.interact", "tempfile.mktemp", "zipfile.ZipFile.extractall",
}  # fmt: skip
WRITTEN_OUT = {  # call → the argument that must stand there, as this constant
    "torch.load": ("weights_only", True),
    "torch.hub.load_state_dict_from_url": ("weights_only", True),
    "tarfile.TarFile.extractall": ("filter", "data"),
}
REMOTE_CODE = re.compile(
    r"transformers\.Auto\w+\.from_pretrained|transformers\.pipeline"
)  # trust_remote_code=False
FROM_A_HUB = {"datasets.load_dataset", "huggingface_hub.snapshot_download", "huggingface_hub.hf_hub_download"}
NEVER = {
    "weights_only": True,
    "trust_remote_code": False,
    "allow_pickle": False,
    "shell": False,
}  # else not at all
# torch files are read in three places: strangers' tokenizers, LPIPS' networks, the weights in a package.
TORCH_FILES = {"vq/importers/weights.py", "vq/losses/perceptual.py", "vq/features.py"}
LOCAL_READERS = {"arrow", "csv", "imagefolder", "json", "parquet", "text", "webdataset"}


class Ban:
    """What one file does that is never done: `found`, as (line, what)."""

    def __init__(self, source, name):
        self.name, self.origins, self.found = name, {}, []
        nodes = list(ast.walk(ast.parse(source)))
        for kind, look in ((ast.Import, self.whole), (ast.ImportFrom, self.parts)):
            for node in nodes:
                if isinstance(node, kind):
                    look(node)
        for node in nodes:
            if isinstance(node, (ast.Name, ast.Attribute)):
                self.check_name(node, self.origin(node))
            elif isinstance(node, ast.Call):
                self.check_call(node)

    def whole(self, node):
        for each in node.names:
            top = each.name.partition(".")[0]
            self.origins[each.asname or top] = each.name if each.asname else top

    def parts(self, node):
        for each in node.names:
            self.origins[each.asname or each.name] = f"{node.module}.{each.name}"
            self.check_name(node, f"{node.module}.{each.name}")

    def origin(self, node):
        """Where a name or attribute comes from, as far as the file's imports say: "torch.load"."""
        if isinstance(node, ast.Name):
            return self.origins.get(node.id, node.id)
        if isinstance(node, ast.Attribute):
            before = self.origin(node.value)
            return before and f"{before}.{node.attr}"
        return None

    def check_name(self, node, name):
        if name in FORBIDDEN:
            self.found.append((node.lineno, name))
        if name == "torch.load" and self.name not in TORCH_FILES:
            self.found.append((node.lineno, f"{name}: torch files are read in {sorted(TORCH_FILES)}"))

    def check_call(self, node):
        name, given = self.origin(node.func), {each.arg: each.value for each in node.keywords}
        if isinstance(node.func, ast.Attribute) and node.func.attr == "extractall":
            name = "tarfile.TarFile.extractall"
        if name in WRITTEN_OUT:
            self.need(node, name, given, *WRITTEN_OUT[name])
        if name and REMOTE_CODE.fullmatch(name) and not self.name.startswith("notebooks/"):
            self.need(node, name, given, "trust_remote_code", False)
        if name in FROM_A_HUB and "revision" not in given and not reads_files(node):
            self.found.append((node.lineno, f"{name} without revision="))
        for argument, value in NEVER.items():
            if argument in given and not constant(given[argument], value):
                self.found.append((node.lineno, f"{argument}={ast.unparse(given[argument])}"))

    def need(self, node, name, given, argument, value):
        if argument not in given or not constant(given[argument], value):
            self.found.append((node.lineno, f"{name} without {argument}={value!r}"))


def reads_files(node):
    """Whether load_dataset is told one of its readers of local files, which have no revisions."""
    return bool(node.args) and isinstance(node.args[0], ast.Constant) and node.args[0].value in LOCAL_READERS


def constant(node, value):
    return isinstance(node, ast.Constant) and type(node.value) is type(value) and node.value == value


def banned(source, name="x.py"):
    return Ban(source, name).found


def sources():
    """(name, source) of every file of Python that is shipped, measured or shown; cells of notebooks one by one."""
    for folder in ("vq", "lm", "vqlm", "conf", "benchmarks", "notebooks", ".ci"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")
        for path in sorted((ROOT / folder).rglob("*.ipynb")):
            for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
                if cell["cell_type"] == "code":
                    lines = [line for line in "".join(cell["source"]).splitlines() if line[:1] not in "%!"]
                    yield str(path.relative_to(ROOT)), "\n".join(lines)


BAD = [
    "import pickle\npickle.load(f)", "import pickle as p\nread = p.loads", "from pickle import loads", "eval('1')",
    "from pickle import Unpickler as U\nU(f)", "import torch\ntorch.load(f, weights_only=True)", "exec(code)",
    "import torch as t\nt.load(f)", "from torch import load\nload(f)", "import torch\ntorch.hub.load('a', 'b')",
    "model.load(f, weights_only=False)", "f(weights_only=chosen)", "f(trust_remote_code=True)",
    "f(trust_remote_code=settings.trust)", "import numpy as np\nnp.load(f, allow_pickle=True)",
    "import os\nos.system('ls')", "from tarfile import open as o\no(f).extractall(g)",
    "import subprocess\nsubprocess.run('ls', shell=True)", "import yaml\nyaml.load(f)", "map(eval, lines)",
    "from yaml import unsafe_load", "from transformers import AutoModel\nAutoModel.from_pretrained(folder)",
    "from huggingface_hub import hf_hub_download\nhf_hub_download('a/b', 'c')", "archive.extractall(folder)",
    "from datasets import load_dataset\nload_dataset('a/b')", "__import__(name)",
    "archive.extractall(folder, filter='tar')", "from datasets import load_dataset\nload_dataset(name)",
    "import hydra\nhydra.utils.instantiate(node)", "from hydra.utils import instantiate",
    "import tempfile\ntempfile.mktemp()",
]  # fmt: skip
GOOD = [
    "model.eval()", "import re\nre.compile('a')", "import torch\ntorch.compile(m)", "message = 'weights_only=False'",
    "import numpy as np\nnp.load(f)\nnp.load(f, allow_pickle=False)", "import yaml\nyaml.safe_load(f)",
    "f(shell=False)", "from datasets import load_dataset\nload_dataset('parquet', data_files=f)",
    "from transformers import AutoModel\nAutoModel.from_pretrained(folder, trust_remote_code=False)",
    "import subprocess\nsubprocess.run(['ls'])", "store.load(0, 1)",
    "import pickle\ntry: f()\nexcept pickle.UnpicklingError: 0",
    "tar.extractall(folder, filter='data')", "from datasets import load_dataset\nload_dataset('a', revision=r)",
]  # fmt: skip


@pytest.mark.parametrize("source", BAD)
def test_the_ban_finds(source):
    assert banned(source)


@pytest.mark.parametrize("source", GOOD)
def test_the_ban_lets_pass(source):
    assert not banned(source)


def test_nothing_runs_what_it_reads(figure):
    files = list(sources())
    found = [f"{name}:{line} {what}" for name, source in files for line, what in banned(source, name)]
    assert not found, "\n".join(found)
    assert {name for name, _ in files} >= TORCH_FILES and len(files) > 100
    figure(
        "C.32",
        "pickle, eval, free torch.load, remote code, unsafe YAML, shell=True and their like",
        "forbidden by a test of the syntax trees of all code that is shipped, measured or shown",
        f"0 uses in {len({name for name, _ in files})} files; {len(BAD)}/{len(BAD)} spellings found",
    )


# --- what it stands on ------------------------------------------------------------------------------------------------

LAST_BAD = {  # package → its last version with the hole, and the hole
    "torch": ("2.9.1", "CVE-2026-24747, CVE-2025-32434"),
    "lightning": ("2.6.5", "CVE-2026-58659; 2.6.2 and 2.6.3 were malware"),
    "hydra-core": ("1.3.7", "GHSA-37p2-j732-x8pj"),
    "transformers": ("5.4.0", "CVE-2026-5241, CVE-2026-4372"),
    "datasets": ("3.6.0", "loading scripts"),
    "pillow": ("12.2.0", "PYSEC-2026-3451, CVE-2026-40192"),
    "h11": ("0.14.0", "CVE-2025-43859"),
    "ray": ("2.51.2", "CVE-2025-62593"),
}


def declared():
    """Every requirement of pyproject.toml: (extra or "", requirement)."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = {"": project["dependencies"], **project["optional-dependencies"]}
    return [(extra, Requirement(line)) for extra, lines in groups.items() for line in lines]


def pinned(path):
    """name → version of a file of exact requirements."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
    made = [Requirement(line.split(" --hash")[0]) for line in lines]
    return {canonicalize_name(each.name): str(each.specifier).removeprefix("==") for each in made}


def test_floors_shut_out_what_is_known_to_be_bad():
    for name, (bad, hole) in LAST_BAD.items():
        asked = [requirement for _, requirement in declared() if canonicalize_name(requirement.name) == name]
        assert asked, f"{name} is not asked for by name: {hole}"
        for requirement in asked:
            assert not requirement.specifier.contains(bad), f"{requirement} admits {bad}: {hole}"


def test_what_is_installed_and_pinned_is_within_the_floors():
    lock, constraints = pinned(LOCK), pinned(ROOT / "constraints.txt")
    for extra, requirement in declared():
        name = canonicalize_name(requirement.name)
        if extra not in (
            "docs",
            "features",
            "gguf",
            "lora",
            "serve",
            "scale",
        ):  # those that `make setup` installs
            assert requirement.specifier.contains(lock[name]), (
                f"{requirement}, {LOCK.name} has {lock[name]}: make lock"
            )
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            assert extra not in ("", "demo", "dev"), f"{requirement} is not installed: make setup"
        else:
            assert requirement.specifier.contains(found), f"{requirement}, installed is {found}: make setup"
    other = {name: number for name, number in constraints.items() if lock.get(name, number) != number}
    assert not other, f"constraints.txt and {LOCK.name} differ (make lock): {other}"


def needed_by(name):
    """Names that an installed package needs here, without its extras."""
    for line in distribution(name).requires or []:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield canonicalize_name(requirement.name)


def test_every_file_of_an_installation_is_hashed(figure):
    text, lock = LOCK.read_text(encoding="utf-8"), pinned(LOCK)
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.+!]+ --hash=sha256:[0-9a-f]{64}", line) for line in lines)
    assert "://" not in text and len(lines) == len(lock)
    same = {name: number for name, number in lock.items() if installed(name) == number}
    missing = {(name, need) for name in same for need in needed_by(name) if need not in lock}
    assert not missing and len(same) > 0.9 * len(lock)  # else pip would stop: a part of it has no hash
    figure(
        "C.32",
        "a package on the index is replaced",
        "requirements-cpu.txt holds the sha256 of each file (make lock); pip install --require-hashes takes no other",
        f"{len(lines)} of {len(lines)} packages hashed, torch among them",
    )


# Stands in for pip-audit: its database is the file named by HOLES, a JSON of name or name==version → advisories.
PIP_AUDIT = """
import json, os, sys
holes = json.load(open(os.environ["HOLES"]))
names = [line.split("==") for line in open(sys.argv[sys.argv.index("-r") + 1]) if line.strip() and line[0] != "#"]
rows = [{"name": n, "version": v.strip(), "vulns": holes.get(n, holes.get(n + "==" + v.strip(), []))} for n, v in names]
print(json.dumps({"dependencies": rows}))
"""
HOLE = [{"id": "PYSEC-1", "fix_versions": ["9.1"]}]


@pytest.mark.parametrize(
    ("holes", "rc", "said"),
    [
        ({}, 0, "not run: no advisory database"),
        ({"pillow==9.0.0": HOLE}, 0, "0 packages"),
        ({"pillow": HOLE}, 1, "pillow 13"),
        ({"pillow": HOLE, "torch": HOLE}, 1, "torch 2.13.0: PYSEC-1, fixed in 9.1"),
    ],
)
def test_an_audit_without_a_database_is_not_called_a_pass(tmp_path, holes, rc, said):
    (tmp_path / "pip_audit.py").write_text(PIP_AUDIT)
    (tmp_path / "holes.json").write_text(json.dumps(holes))
    surroundings = {**os.environ, "PYTHONPATH": str(tmp_path), "HOLES": str(tmp_path / "holes.json")}
    command = [sys.executable, ROOT / ".ci/audit.py"]
    done = subprocess.run(command, env=surroundings, capture_output=True, text=True)
    assert done.returncode == rc and said in done.stdout, done


def installed(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None


# --- what it asks of a network ----------------------------------------------------------------------------------------

# Put where Python runs it first: every address that the process asks for is written down.
LISTENER = """
import os, sys

def listen(event, args, told=os.environ["ADDRESSES"]):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        address = args[1] if event in ("socket.connect", "socket.sendto") else args[0]
        where = address[0] if isinstance(address, tuple) else address
        if isinstance(address, (str, bytes)) and event in ("socket.connect", "socket.sendto"):
            return  # a socket file of this machine
        if where not in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "", None):
            with open(told, "a") as file:
                file.write(f"{os.getpid()} {event} {where}\\n")

with open(os.environ["ADDRESSES"] + ".processes", "a") as file:
    file.write(f"{os.getpid()}\\n")
sys.addaudithook(listen)
"""


class Overheard:
    """Runs commands with the listener in each process. A network namespace of their own, where it can be had."""

    def __init__(self, folder, python):
        self.folder, self.python, self.told = folder, python, folder / "addresses"
        (folder / "site").mkdir()
        (folder / "site/sitecustomize.py").write_text(LISTENER)
        probe = ["unshare", "--net", "--map-root-user", "true"]
        possible = shutil.which("unshare") and subprocess.run(probe, capture_output=True).returncode == 0
        self.before = ["unshare", "--net", "--map-root-user"] if possible else []

    def run(self, *command, timeout=600):
        names = (
            "PYTHONPATH",
            "PYTHONHOME",
            "HF_HUB_OFFLINE",
            "TRANSFORMERS_OFFLINE",
        )  # nothing tells it to be silent
        surroundings = {name: value for name, value in os.environ.items() if name not in names}
        surroundings |= {"PYTHONPATH": str(self.folder / "site"), "ADDRESSES": str(self.told)}
        done = subprocess.run(
            [*self.before, str(self.python), *map(str, command)],
            cwd=self.folder, env=surroundings, capture_output=True, text=True, timeout=timeout,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"

    @property
    def asked(self):
        return self.told.read_text().splitlines() if self.told.exists() else []

    @property
    def processes(self):
        return len(set(Path(f"{self.told}.processes").read_text().split()))


def test_the_listener_hears(tmp_path):
    """What would be asked for is written down, whether or not there is a network."""
    heard = Overheard(tmp_path, sys.executable)
    code = "import socket\ntry: socket.create_connection(('192.0.2.1', 9), 0.1)\nexcept OSError: pass"
    heard.run(
        "-S", "-c", f"import sys; sys.path.insert(0, '{tmp_path / 'site'}'); import sitecustomize\n{code}"
    )
    assert any("192.0.2.1" in line for line in heard.asked) and heard.processes == 1


@pytest.mark.skipif(not FULL, reason="a wheel, an environment and a run of the whole road: FAULTS=full")
def test_the_wheel_asks_no_address(tmp_path, figure):
    started = time.monotonic()
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, ROOT]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    home = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        home / "bin/python",
        "install",
        "--no-deps",
        "--no-index",
        wheel,
    ]
    subprocess.run(pip, check=True, capture_output=True)
    (site,) = home.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    assert installed("torchvision") is None
    heard = Overheard(tmp_path, home / "bin/python")
    for command in (
        "vq-train",
        "vq-encode",
        "vq-evaluate",
        "lm-train",
        "lm-generate",
        "lm-evaluate",
        "lm-serve",
    ):
        heard.run(home / "bin" / command, "--help")
    heard.run("-m", "vqlm.demo", "size=smoke", "out=smoke")
    minutes = (time.monotonic() - started) / 60
    assert not heard.asked, heard.asked[:9]
    alone = "a namespace without network" if heard.before else "this machine's network"
    figure(
        "C.31",
        "the wheel in an environment without torchvision, HF_HUB_OFFLINE not set",
        "nothing asks a network of itself: models, fonts and pictures come from packages and folders",
        f"7 commands' help, and train, encode, train, draw on the toy set: {len(heard.asked)} addresses asked for by "
        f"{heard.processes} processes ({alone}; Python {sys.version_info.major}.{sys.version_info.minor}, "
        f"{minutes:.1f} minutes)",
    )
