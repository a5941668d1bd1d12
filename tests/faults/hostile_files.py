"""Files of models, stores and configurations that would run code, or fill the memory, of whoever opens them carelessly.

Each that runs leaves a canary: an empty file whose name it was given. Knows no loader.
"""

import io
import json
import os
import pickle
import struct
import subprocess
import tarfile
from itertools import count
from pathlib import Path

import numpy as np
import torch


class Canaries:
    """Names of files that are there only if something ran."""

    def __init__(self, folder):
        self.folder, self.numbers = folder, count()
        folder.mkdir()

    def new(self):
        return str(self.folder / f"{next(self.numbers):05d}")

    def sung(self):
        return sorted(each.name for each in self.folder.iterdir())

    def clear(self):
        for each in self.folder.iterdir():
            each.unlink()


# --- pickles ----------------------------------------------------------------------------------------------------------

GADGETS = {  # a canary → what is called when the pickle is read
    "os.system": lambda canary: (os.system, (f"touch '{canary}'",)),
    "subprocess": lambda canary: (subprocess.call, (["touch", canary],)),
    "exec": lambda canary: (exec, (f"open({canary!r}, 'w').close()",)),
    "eval": lambda canary: (eval, (f"open({canary!r}, 'w').close()",)),
    "open": lambda canary: (open, (canary, "w")),
    "Path.touch": lambda canary: (Path.touch, (Path(canary),)),
    "torch.save": lambda canary: (torch.save, ({}, canary)),
}


class Trap:
    def __init__(self, call):
        self.call = call

    def __reduce__(self):
        return self.call


def checkpoint(trap):
    """A trap among what a checkpoint holds."""
    return {"state_dict": {"weight": torch.zeros(2, 2)}, "hyper_parameters": trap}


def by_torch(trap, **options):
    file = io.BytesIO()
    torch.save(checkpoint(trap), file, **options)
    return file.getvalue()


def old_tar(trap):
    """The format of torch before 0.2."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name in ("storages", "tensors", "pickle"):
            data = pickle.dumps(trap) if name == "pickle" else pickle.dumps(0)
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return file.getvalue()


def objects(trap):
    """What numpy writes of an array of objects."""
    held = np.empty(1, object)
    held[0] = trap
    file = io.BytesIO()
    np.savez(file, weight=held)
    return file.getvalue()


FORMATS = {
    "pickle, protocol 0": lambda trap: pickle.dumps(checkpoint(trap), 0),
    "pickle, protocol 2": lambda trap: pickle.dumps(trap, 2),
    "pickle, protocol 5": lambda trap: pickle.dumps(checkpoint(trap), 5),
    "torch": by_torch,
    "torch, older": lambda trap: by_torch(trap, _use_new_zipfile_serialization=False),
    "torch, oldest": old_tar,
    "npz": objects,
}
SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".safetensors", ".npz")


def pickles(canaries):
    """Every gadget in every format: name, bytes."""
    return [
        (f"{gadget} in {format}", dump(Trap(call(canaries.new()))))
        for format, dump in FORMATS.items()
        for gadget, call in GADGETS.items()
    ]


# --- safetensors that lie ---------------------------------------------------------------------------------------------


def tensors(header, data=b"\0" * 16, length=None):
    told = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(told) if length is None else length) + told + data


def entry(shape=(2, 2), start=0, end=16, dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


LIES = {  # made when asked for: some are long
    "no bytes": lambda: b"",
    "seven bytes": lambda: b"\0" * 7,
    "a header of 2^63 bytes": lambda: tensors({"weight": entry()}, length=2**63),
    "a header longer than the file": lambda: tensors({"weight": entry()}, length=10_000),
    "a header of 101 MB": lambda: tensors(b"{" + b" " * 101_000_000 + b"}"),
    "a header that is no JSON": lambda: tensors(b"{weight"),
    "a header nested 100,000 times": lambda: tensors(b"[" * 100_000),
    "offsets behind the end": lambda: tensors({"weight": entry((2, 200), 0, 1600)}),
    "offsets that overlap": lambda: tensors({"weight": entry(), "other": entry()}),
    "offsets with a hole": lambda: tensors({"weight": entry(start=8, end=24)}, b"\0" * 24),
    "offsets backwards": lambda: tensors({"weight": entry(start=16, end=0)}),
    "negative offsets": lambda: tensors({"weight": entry(start=-16, end=0)}),
    "a shape that overflows": lambda: tensors({"weight": entry((2**40, 2**40), 0, 16)}),
    "a shape that is too large": lambda: tensors({"weight": entry((2**20, 2**20))}),
    "an unknown type": lambda: tensors({"weight": entry(dtype="OBJECT")}),
}


# --- what Hugging Face folders may say --------------------------------------------------------------------------------


def code(canary):
    """A Python file that runs when it is imported."""
    return f"open({canary!r}, 'w').close()\nclass Evil: pass\n"


JINJA = [
    "{{{{ cycler.__init__.__globals__.os.popen('touch {0}').read() }}}}",
    "{{{{ joiner.__init__.__globals__.os.system('touch {0}') }}}}",
    "{{% for c in [].__class__.__base__.__subclasses__() %}}{{% if c.__name__ == 'Popen' %}}"
    "{{{{ c(['touch', '{0}']).wait() }}}}{{% endif %}}{{% endfor %}}",
    "{{{{ messages.__class__.__init__.__globals__['__builtins__'].open('{0}', 'w') }}}}",
    "{{{{ raise_exception.__globals__['__builtins__']['open']('{0}', 'w') }}}}",
]


def changed(path, **entries):
    """Put entries into a file of JSON."""
    told = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps({**told, **entries}), encoding="utf-8")


def long(path, length=2**34):
    """A file of that length that takes no room on most disks."""
    with open(path, "wb") as file:
        file.truncate(length)


# --- configurations ---------------------------------------------------------------------------------------------------


def nodes(canaries, folder):
    """Calls that hydra 1.3.8 makes if a configuration names them, and some that it does not: target, node."""
    folder.mkdir()
    for name, data in (("torch.pt", by_torch), ("plain.pkl", pickle.dumps), ("objects.npz", objects)):
        (folder / name).write_bytes(data(Trap(GADGETS["os.system"](canaries.new()))))
    loaded = pickle.dumps(Trap(GADGETS["os.system"](canaries.new())))
    (folder / "objects.npy").write_bytes(npy(loaded))
    (folder / "hubconf.py").write_text(code(canaries.new()) + "def evil(): return 0\n")
    (folder / "modeling_evil.py").write_text(code(canaries.new()))
    (folder / "script.py").write_text(code(canaries.new()))
    auto = {"AutoConfig": "modeling_evil.Evil", "AutoModel": "modeling_evil.Evil"}
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto}))
    at = str(folder)
    reachable = {
        "torch.load": {"f": f"{at}/torch.pt", "weights_only": False},
        "torch.hub.load": {"repo_or_dir": at, "model": "evil", "source": "local"},
        "torch.utils.cpp_extension.load": {"name": "evil", "sources": [f"{at}/script.py"]},
        "torch.distributed.run.main": {"args": ["--nproc-per-node=1", f"{at}/script.py"]},
        "transformers.AutoModel.from_pretrained": {
            "pretrained_model_name_or_path": at,
            "trust_remote_code": True,
        },
        "datasets.load_dataset": {"path": f"{at}/script.py"},
        "numpy.load": {"file": f"{at}/objects.npy", "allow_pickle": True},
        "pandas.read_pickle": {"filepath_or_buffer": f"{at}/plain.pkl"},
        "joblib.load": {"filename": f"{at}/plain.pkl"},
        "builtins.open": {"file": canaries.new(), "mode": "w"},
        "pathlib.Path.write_text": {
            "self": {"_target_": "pathlib.Path", "_args_": [canaries.new()]},
            "data": "",
        },
        "torch.save": {"obj": {}, "f": canaries.new()},
    }
    blocked = {
        "os.system": {"command": f"touch '{canaries.new()}'"},
        "subprocess.run": {"args": ["touch", canaries.new()]},
        "builtins.exec": {"_args_": [f"open({canaries.new()!r}, 'w')"]},
        "pickle.loads": {"_args_": ["x"]},
    }
    return [(target, {"_target_": target, **more}) for target, more in {**reachable, **blocked}.items()]


def npy(pickled):
    """A .npy file of one object, from its pickle."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": (1,)})
    return file.getvalue() + pickled


YAML_TAGS = [
    "!!python/object/apply:os.system ['touch {0}']",
    "!!python/object/new:subprocess.Popen [['touch', '{0}']]",
    "!!python/object/apply:builtins.open ['{0}', 'w']",
    "!!python/module:hostile_module",
    "!!python/name:os.system",
]
