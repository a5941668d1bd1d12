"""The wheel, installed away from the repository and used from an empty folder."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PACKAGES = ("vqlm", "vq", "lm", "conf")


def call(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command that must end well. It sees neither the repository nor the network."""
    surroundings = {
        key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")
    }
    surroundings |= {"HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1"}
    done = subprocess.run(
        [str(each) for each in command], cwd=cwd, env=surroundings, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built with the build tools that are installed (no isolation: nothing is fetched)."""
    out = tmp_path_factory.mktemp("dist")
    call(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The bin folder of a fresh virtual environment that holds the wheel.

    It finds the dependencies through a .pth to this interpreter's site-packages. The .pth files in there, with the
    editable install among them, do not count in a folder that is added this way.
    """
    home = tmp_path_factory.mktemp("home") / "venv"
    call(sys.executable, "-m", "venv", "--without-pip", home, cwd=home.parent)
    python = home / "bin" / "python"
    call(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--no-deps",
        "--quiet",
        wheel,
        cwd=home.parent,
    )
    site = Path(
        call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home).strip()
    )
    folders = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "dependencies.pth").write_text("\n".join(sorted(folders)))
    return home / "bin"


def test_nothing_but_the_packages_is_in_it(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops - set(PACKAGES) == {f"{wheel.name.split('-')[0]}-{wheel.name.split('-')[1]}.dist-info"}
    assert {Path(name).suffix for name in names if name.split("/")[0] in PACKAGES} <= {
        ".py",
        ".yaml",
        ".html",
    }


def test_every_module_and_configuration_is_in_it(wheel):
    """All files, by name: a new folder that the build forgets is seen here."""
    names = set(zipfile.ZipFile(wheel).namelist())
    for package in PACKAGES:
        ours = [each for kind in ("py", "yaml", "html") for each in (ROOT / package).rglob(f"*.{kind}")]
        assert ours and {str(each.relative_to(ROOT)) for each in ours} <= names


def test_the_licence_is_in_it(wheel):
    archive = zipfile.ZipFile(wheel)
    (licence,) = [name for name in archive.namelist() if name.endswith("/LICENSE")]
    assert "Apache License" in archive.read(licence).decode()
    (metadata,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
    assert "License-Expression: Apache-2.0" in archive.read(metadata).decode()


def test_it_is_the_wheel_that_is_used(installed, tmp_path):
    code = (
        "import vq, lm, vqlm, conf; print(vq.__file__, lm.__file__, vqlm.__file__, conf.__file__, sep='\\n')"
    )
    files = call(installed / "python", "-c", code, cwd=tmp_path).split()
    assert len(files) == 4 and all(Path(each).is_relative_to(installed.parent) for each in files)


def test_help_from_an_empty_folder(installed, tmp_path):
    assert "usage: vq-train" in call(installed / "vq-train", "--help", cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_shipped_configuration_composes_from_an_empty_folder(installed, tmp_path):
    """Also beside a folder called `conf`, which must not stand in for ours."""
    (tmp_path / "conf").mkdir()
    printed = call(installed / "vq-train", "--cfg", "job", cwd=tmp_path)
    assert yaml.safe_load(printed)["images"]["_target_"].startswith("vq.")
    assert [each.name for each in tmp_path.iterdir()] == ["conf"]
