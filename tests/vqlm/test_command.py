"""vqlm.command and vqlm.schema: what a wrong configuration gets to hear, and what a right one gets to run.

A toy package and its configurations are written to a temporary folder; most tests run the command in this process.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from vqlm import schema
from vqlm.command import build, check, check_run_folder, command, held, open_run_folder
from vqlm.errors import ConfigError, nearest

TOY = '''
from pathlib import Path
from typing import Callable, Literal
import random, sys, time
from vqlm.command import command
from vqlm.errors import ConfigError, Interrupted

built = []

class Source:
    pass

class Folder(Source):
    def __init__(self, path: Path, size: int = 8):
        if not path.is_dir():
            raise FileNotFoundError(f"{path}: there is no such folder")
        built.append(self)

class Made(Source):
    def __init__(self, size: int, noise: float | None = None, crop: tuple[int, int] = (1, 1)):
        if size % 2:
            raise ValueError(f"size {size}: must be even")
        self.size, self.noise, self.crop, self.drawn = size, noise, crop, random.random()
        built.append(self)

class Other:
    pass

class Step:
    def __init__(self, parameters, lr: float):
        self.parameters, self.lr = parameters, lr

ran = []

def train(images: Source, step: Callable[[list], Step], out: str, seed: int, lr: float, task: str,
          resume: Literal["auto", "never"]) -> None:
    """Train a toy."""
    ran.append(dict(images=images, step=step, out=out, seed=seed, lr=lr))
    if task == "config":
        raise ConfigError("the picture and the store do not fit")
    if task == "crash":
        raise RuntimeError("a fault")
    if task == "wait":
        print("waiting", flush=True)
        time.sleep(60)
    if task == "interrupted":
        raise Interrupted

main = command("toy_train", train, conf=Path(__file__).parent / "conf", packages=("toy",))
'''
CONF = {
    "toy_train.yaml": """
defaults: [_self_, {images: made}]
step: {_target_: toy.Step, _partial_: true, lr: "${lr}"}
out: runs/toy
seed: 0
lr: 0.1
task: ""
resume: auto
""",
    "images/made.yaml": "{_target_: toy.Made, size: 8, noise: null, crop: [2, 3]}",
    "images/folder.yaml": "_target_: toy.Folder\npath: ???\nsize: 8",
    "images/typo.yaml": "{_target_: toy.Made, sise: 8}",
    "images/other.yaml": "{_target_: toy.Other}",
    "images/plain.yaml": "{size: 8}",
    "images/evil.yaml": "{_target_: os.system, command: touch canary}",
    "images/broken.yaml": "a: [",
}


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The toy module, importable; the current folder is empty but for it."""
    (tmp_path / "toy.py").write_text(TOY)
    for name, text in CONF.items():
        (tmp_path / "conf" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "conf" / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("toy", None)
    import toy  # pyright: ignore[reportMissingImports]

    yield toy
    sys.modules.pop("toy", None)


@pytest.fixture
def call(toy, monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """Run the toy command: exit code, standard output, standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["toy-train", *arguments])
        try:
            toy.main()
            code: Any = 0
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


# --- right ----------------------------------------------------------------------------------------------------


def test_builds_and_runs(call, toy, tmp_path):
    code, _, err = call("images.size=4", "lr=1")
    assert (code, err) == (0, "")
    (got,) = toy.ran
    assert isinstance(got["images"], toy.Made)
    assert (got["images"].size, got["images"].noise, got["images"].crop) == (4, None, (2, 3))
    made = got["step"]([1, 2])
    assert (made.parameters, made.lr) == ([1, 2], 1)
    assert (got["out"], got["seed"], got["lr"]) == ("runs/toy", 0, 1)


def test_leaves_the_resolved_configuration_and_nothing_else(call, tmp_path):
    before = set(tmp_path.rglob("*"))
    call("lr=0.5")
    new = {
        str(each.relative_to(tmp_path))
        for each in set(tmp_path.rglob("*")) - before
        if "pycache" not in str(each)
    }
    assert new == {"runs", "runs/toy", "runs/toy/config.yaml"}
    assert yaml.safe_load(Path("runs/toy/config.yaml").read_text())["step"]["lr"] == 0.5


def test_a_path_becomes_a_path(call, toy, tmp_path):
    assert call("images=folder", f"images.path={tmp_path}")[0] == 0


def test_the_seed_is_set_before_anything_is_built(call, toy):
    for number in range(3):
        call(f"out=runs/{number}", f"seed={number // 2}")
    first, again, other = (got["images"].drawn for got in toy.ran)
    assert first == again != other


def test_help(call, toy):
    code, out, _ = call("--help")
    assert code == 0
    for part in ("Train a toy.", "images=made", "folder", "lr=0.1", "seed=0", "--cfg job"):
        assert part in out
    assert not toy.ran


@pytest.mark.parametrize("arguments", [["--cfg", "job", "images=folder"], ["images=folder", "--cfg", "job"]])
def test_cfg_prints_even_what_is_still_to_be_given(call, toy, arguments):
    code, out, _ = call(*arguments)
    assert code == 0
    assert yaml.safe_load(out)["images"] == {"_target_": "toy.Folder", "path": "???", "size": 8}
    assert not toy.ran and not Path("runs").exists()


def test_multirun_gives_each_job_a_folder(call, toy):
    code, _, _ = call("seed=1,2", "-m", "lr=0.1,0.2", "out=sweep")
    assert code == 0
    got = [(each["out"], each["seed"], each["lr"]) for each in toy.ran]
    assert got == [("sweep/0", 1, 0.1), ("sweep/1", 1, 0.2), ("sweep/2", 2, 0.1), ("sweep/3", 2, 0.2)]
    assert sorted(each.name for each in Path("sweep").rglob("*")) == [
        "0",
        "1",
        "2",
        "3",
        *["config.yaml"] * 4,
    ]


def test_multirun_checks_every_job_before_the_first_starts(call, toy):
    code, _, err = call("-m", "images.size=4,abc", "out=sweep")
    assert code == 2 and "images.size=abc" in err
    assert not toy.ran and not Path("sweep").exists()


def test_a_users_folder_adds_choices(call, toy, tmp_path):
    (tmp_path / "mine" / "images").mkdir(parents=True)
    (tmp_path / "mine" / "images" / "big.yaml").write_text("{_target_: toy.Made, size: 64}")
    assert call("--config-dir", "mine", "images=big")[0] == 0
    assert toy.ran[0]["images"].size == 64
    assert "did you mean 'big'" in call("--config-dir", "mine", "images=bigg")[2]


# --- wrong ----------------------------------------------------------------------------------------------------

WRONG = {
    "unknown root key": (["sed=1"], "sed=1: there is no setting sed; did you mean 'seed'?"),
    "unknown inner key": (["images.sise=64"], "did you mean 'images.size'?"),
    "mistyped parent": (["imges.size=3"], "did you mean 'images.size'?"),
    "parent forgotten": (["size=3"], "did you mean 'images.size'?"),
    "group": (["imags=folder"], "did you mean 'images'?"),
    "option": (
        ["images=foldr"],
        "images=foldr: no such choice; did you mean 'folder'? (there are: broken, evil, folder, made",
    ),
    "option and key": (["images=folder", "images.pth=x"], "did you mean 'images.path'?"),
    "added key": (
        ["+images.noize=3"],
        "images.noize: Made has no such setting; did you mean 'images.noise'?",
    ),
    "added root key": (["+sed=3"], "sed: this command has no such setting; did you mean 'seed'?"),
    "removed key": (["~seed"], "seed: this command needs this setting"),
    "typo in a file": (["images=typo"], "images.sise: Made has no such setting; did you mean 'images.size'?"),
    "not YAML": (["images=broken"], "broken.yaml"),
    "no =": (["seed"], "seed: cannot be read; write key=value"),
    "sweep without -m": (["seed=1,2"], "seed=1,2: several values need -m"),
    "sweep of a typo": (["-m", "sed=1,2"], "did you mean 'seed'?"),
    "text for a number": (["lr=abc"], "lr=abc: must be a number"),
    "truth for a number": (["lr=true"], "lr=true: must be a number"),
    "truth for a whole number": (["seed=true"], "seed=true: must be a whole number"),
    "fraction": (["seed=1.5"], "seed=1.5: must be a whole number"),
    "null": (["seed=null"], "seed=null: must be a whole number"),
    "optional": (["images.noise=abc"], "images.noise=abc: must be a number or null"),
    "literal": (["resume=atuo"], "resume=atuo: must be one of auto, never; did you mean 'auto'?"),
    "tuple too long": (["images.crop=[1,2,3]"], "images.crop=[1, 2, 3]: must be"),
    "tuple member": (["images.crop=[1,x]"], "images.crop.1=x: must be a whole number"),
    "list for a number": (["lr=[1]"], "lr=[1]: must be a number"),
    "missing value": (
        ["images=folder"],
        "images.path has no value: give it on the command line, as images.path=VALUE",
    ),
    "missing value used elsewhere": (["lr=???"], "lr has no value: give it on the command line, as lr=VALUE"),
    "interpolation": (["lr=${nope}"], "lr: Interpolation key 'nope' not found"),
    "seed out of range": (["seed=-1"], "seed=-1: must be from 0"),
    "constructor's range": (["images.size=7"], "images.Made: size 7: must be even"),
    "constructor's path": (
        ["images=folder", "images.path=nope"],
        "images.Folder: nope: there is no such folder",
    ),
    "class that is not there": (["images._target_=toy.Mad"], "there is no toy.Mad; did you mean 'Made'?"),
    "class of another kind": (["images=other"], "images: is a Other, must be a Source"),
    "unfinished": (["+images._partial_=true"], "images: is an unfinished Made"),
    "finished": (["step._partial_=false"], "step: is a Step, must be something to call"),
    "settings for an object": (["images=plain"], "must be a Source"),
    "out is a file": (["out=toy.py"], "out=toy.py: must be a folder"),
    "no such folder of configurations": (
        ["--config-dir", "nope"],
        "--config-dir nope: there is no such folder",
    ),
    "raised by the function": (["task=config"], "the picture and the store do not fit"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong(call, toy, case):
    """Exit 2, one message that names what is right, nothing built that was not asked for, nothing run."""
    arguments, message = WRONG[case]
    code, out, err = call(*arguments)
    assert message in err
    assert code == 2
    assert err.startswith("toy-train: ") and "Traceback" not in err and "Error executing" not in err
    assert len(err.splitlines()) == 1 and out == ""
    if case != "raised by the function":
        assert not toy.ran and not Path("runs").exists()


def test_wrong_types_are_found_before_anything_is_built(call, toy):
    call("images.size=4", "lr=abc")
    assert not toy.built


def test_unknown_flag(call):
    assert call("--nope")[0] == 2


# --- hostile --------------------------------------------------------------------------------------------------

EVIL = [
    "os.system",
    "builtins.eval",
    "builtins.exec",
    "subprocess.run",
    "torch.load",
    "torch.hub.load",
    "torch.nn.modules.module.torch.load",
    "torch.utils.cpp_extension.load",
    "pathlib.Path.write_text",
    "pickle.loads",
    "numpy.load",
    "functools.partial",
    "vqlm.files.os.system",
    "vqlm.files.write_text",
    "vqlm.files.Path",
    "vqlm.files.Path.write_text",
    "vqlm.schema.importlib.import_module",
    "vqlm.schema._import",
    "vqlm.schema._Rules",
    "vqlm.schema.__builtins__.eval",
    "vqlm.errors.ConfigError.__init__",
    "vqlmx.anything",
    "vqlm",
    "vqlm..files",
    "",
    7,
]


@pytest.mark.parametrize("target", EVIL)
@pytest.mark.parametrize("partial", [False, True], ids=["call", "partial"])
def test_evil_target_is_refused(tmp_path, target, partial):
    """By check, and by build on its own, for whoever builds without checking."""
    canary = tmp_path / "canary"
    node = {
        "_target_": target,
        "_partial_": partial,
        "command": f"touch {canary}",
        "path": str(canary),
        "text": "x",
    }

    def function(images: Any) -> None: ...

    with pytest.raises(ConfigError, match="_target_"):
        check({"images": node}, function)
    with pytest.raises(ConfigError, match="_target_"):
        build({"images": [node]})
    assert not canary.exists()


def test_evil_module_is_not_even_imported(toy, tmp_path):
    (tmp_path / "evil_module.py").write_text("open('canary', 'w')")
    with pytest.raises(ConfigError):
        build({"_target_": "evil_module.Thing"})
    assert not (tmp_path / "canary").exists()


def test_evil_target_on_the_command_line(call, tmp_path):
    code, _, err = call("images=evil")
    assert code == 2 and "only classes of toy" in err
    assert not (tmp_path / "canary").exists()


# --- resuming -------------------------------------------------------------------------------------------------


def test_same_values_go_on(call, toy):
    assert [call("lr=0.5")[0], call("lr=0.5")[0], call("lr=0.50")[0]] == [0, 0, 0]
    assert len(toy.ran) == 3


def test_other_values_are_listed(call, toy):
    call()
    code, _, err = call("lr=0.5", "images.size=4", "seed=1")
    assert code == 2
    for change in ("lr: 0.1 → 0.5", "step.lr: 0.1 → 0.5", "images.size: 8 → 4", "seed: 0 → 1"):
        assert change in err
    assert "resume" not in err and "noise" not in err
    assert yaml.safe_load(Path("runs/toy/config.yaml").read_text())["lr"] == 0.1
    assert len(toy.ran) == 1


def test_never_refuses_a_folder_with_a_run(call):
    assert call("resume=never")[0] == 0
    code, _, err = call("resume=never")
    assert code == 2 and "resume=never" in err
    assert call("resume=auto")[0] == 0


def test_a_folder_with_other_things_is_refused(call):
    Path("photos").mkdir()
    Path("photos/cat.png").write_text("x")
    code, _, err = call("out=photos")
    assert code == 2 and "holds files but no run" in err
    assert os.listdir("photos") == ["cat.png"]


def test_an_empty_folder_is_fine(call):
    Path("empty").mkdir()
    assert call("out=empty")[0] == 0


def test_a_damaged_configuration_is_said(call):
    call()
    Path("runs/toy/config.yaml").write_text("a: [")
    code, _, err = call()
    assert code == 2 and "config.yaml: cannot be read" in err


def test_a_refused_constructor_leaves_no_folder(call):
    call("images.size=7", "out=fresh")
    assert not Path("fresh").exists()


@pytest.mark.parametrize(
    ("node", "told"),
    [
        (
            {"_target_": "lm.decoding.Sampling", "temperature": -1.0},
            r"^sampling\.temperature=-1\.0: must lie in",
        ),
        (
            {"_target_": "vq.archives.ParquetFiles", "path": ""},
            r"^sampling: images\.source\.path must not be",
        ),
        ({"_target_": "lm.mixture.Mixture", "text_to_image": -1.0}, r"^sampling\.text_to_image=-1\.0, "),
    ],
)
def test_what_a_constructor_refuses_is_told_with_the_key_as_one_types_it(node, told):
    with pytest.raises(ConfigError, match=told):
        build({"sampling": node})


def test_free_keys_may_change(toy, monkeypatch):
    free = command("toy_train", toy.train, conf=toy.main.conf, packages=("toy",), free=("lr", "step"))
    for lr in ("0.1", "0.2"):
        monkeypatch.setattr(sys, "argv", ["toy-train", f"lr={lr}"])
        free()
    assert [got["lr"] for got in toy.ran] == [0.1, 0.2]


def test_leftovers_of_a_killed_run_are_cleared(call):
    call()
    Path("runs/toy/.state.0123abcd.part").write_text("half")
    call()
    assert os.listdir("runs/toy") == ["config.yaml"]


# --- exit codes, from outside ---------------------------------------------------------------------------------


def start(*arguments: str) -> subprocess.Popen:
    program = [sys.executable, "-c", "import toy; toy.main()", *arguments]
    return subprocess.Popen(
        program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=os.getcwd()
    )


def test_exit_code_of_a_fault(toy):
    process = start("task=crash")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "RuntimeError: a fault" in err and "Traceback" in err


def test_exit_code_of_sigterm(toy):
    process = start("task=wait")
    assert process.stdout is not None and process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143


def test_exit_code_of_interrupted(call):
    assert call("task=interrupted")[0] == 143


# --- schema and names -----------------------------------------------------------------------------------------


def test_torch_classes_are_checked_and_built():
    torch = pytest.importorskip("torch")

    def function(optimizer: Callable[..., torch.optim.Optimizer], layer: torch.nn.Module) -> None: ...

    optimizer = {"_target_": "torch.optim.AdamW", "_partial_": True, "lr": 1, "betas": [0.9, 0.95]}
    layer = {"_target_": "torch.nn.Conv2d", "in_channels": 3, "out_channels": 4, "kernel_size": 3}
    plain = check({"optimizer": optimizer, "layer": layer}, function)
    built = build(plain)
    assert built["optimizer"](built["layer"].parameters()).defaults["betas"] == (0.9, 0.95)
    with pytest.raises(ConfigError, match=r"optimizer.bets.*did you mean 'optimizer.betas'"):
        check({"optimizer": {**optimizer, "bets": 1}, "layer": layer}, function)


ACCEPTED = [
    (int, 3),
    (float, 3),
    (float | None, None),
    (Literal["a", 1], 1),
    (list[int], [1]),
    (dict[str, float], {"a": 1}),
]
ACCEPTED += [
    (str | Path, "x"),
    (tuple[int, ...], [1, 2, 3]),
    (list[tuple[int, str]], [[1, "a"]]),
    (bool, False),
    (Any, [1]),
]
REFUSED = [
    (int, True),
    (bool, 1),
    (Literal["a", 1], True),
    (list[int], ["a"]),
    (dict[str, float], {"a": "b"}),
    (list, "ab"),
]
REFUSED += [
    (Path, 3),
    (tuple[int, ...], [1, "a"]),
    (list[tuple[int, str]], [[1, 2]]),
    (str, None),
    (Callable[[], int], 1),
]


@pytest.mark.parametrize(
    ("hint", "value", "right"), [(*c, True) for c in ACCEPTED] + [(*c, False) for c in REFUSED]
)
def test_types(hint, value, right):
    def function(key) -> None: ...

    function.__annotations__["key"] = hint
    if right:
        schema.check({"key": value}, function)
    else:
        with pytest.raises(ConfigError, match="key"):
            schema.check({"key": value}, function)


def test_nearest():
    assert nearest("imges", ["images", "seed"]) == "; did you mean 'images'?"
    assert nearest("size", ["images.size", "seed"]) == "; did you mean 'images.size'?"
    assert nearest("zzz", ["images", "seed"]) == ""
    assert nearest("x", []) == ""


@pytest.mark.parametrize(
    ("added", "said"),
    [(False, None), (None, None), (True, "learner.compile_layers"), (0, "learner.compile_layers")],
)
def test_a_run_of_an_older_version_goes_on_where_what_is_new_is_off(added, said, tmp_path):
    old = {"resume": "auto", "out": "", "learner": {"clip": 1.0}}
    open_run_folder(str(tmp_path), old)
    new = {**old, "learner": {"clip": 1.0, "compile_layers": added}, "device": "cpu"}
    with nullcontext() if said is None else pytest.raises(ConfigError, match=rf"{said}: \(not there\) → "):
        check_run_folder(str(tmp_path), new, ("device",))


def test_a_folder_of_an_older_version_is_of_the_same_command(tmp_path):
    open_run_folder(str(tmp_path), {"model": "a", "out": ""})
    check_run_folder(str(tmp_path), {"model": "b", "out": "", "drawings": False})
    with pytest.raises(ConfigError, match="another command"):
        check_run_folder(str(tmp_path), {"tokenizer": "b", "out": ""})


HOLD = """import sys, time
from vqlm.command import held
with held(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_is_held_by_one_process_until_that_ends(tmp_path):
    out = tmp_path / "run"
    with held(str(out)):
        refused = subprocess.run([sys.executable, "-c", HOLD, str(out)], capture_output=True, text=True)
        assert "another run is writing there now" in refused.stderr and "held" not in refused.stdout
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(out)], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match="another run is writing there now"), held(str(out)):
        pass
    other.kill()
    other.wait()
    with held(str(out)):
        assert not list(out.iterdir())
