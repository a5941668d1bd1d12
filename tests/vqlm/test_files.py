"""vqlm.files: after any failure there is the old file or folder, whole, and nothing else."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vqlm import files


def no_rename(*_):
    raise OSError(errno.EIO, "cut off between write and rename")


def names(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir())


def test_write_and_read(tmp_path):
    files.write_bytes(tmp_path / "new" / "a.bin", b"\0\xff")
    files.write_text(tmp_path / "a.txt", "é")
    files.write_json(tmp_path / "a.json", {"psnr": 22.5, "name": "é"})
    assert (tmp_path / "new" / "a.bin").read_bytes() == b"\0\xff"
    assert (tmp_path / "a.txt").read_bytes() == "é".encode()
    assert json.loads((tmp_path / "a.json").read_text()) == {"psnr": 22.5, "name": "é"}
    assert names(tmp_path) == ["a.json", "a.txt", "new"]


def test_a_file_gets_the_usual_rights(tmp_path):
    """A temporary file's 0600 would shut others out of a shared run folder."""
    (tmp_path / "plain").write_text("x")
    files.write_text(tmp_path / "ours", "x")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_json_refuses_what_json_cannot_say(tmp_path):
    files.write_json(tmp_path / "a.json", {"loss": 1.0})
    with pytest.raises(ValueError):
        files.write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"loss": 1.0}


def test_cut_off_before_the_rename(tmp_path, monkeypatch):
    files.write_text(tmp_path / "a.txt", "old")
    monkeypatch.setattr(os, "replace", no_rename)
    with pytest.raises(OSError, match="cut off"):
        files.write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_disk_full(tmp_path, monkeypatch):
    """Half the bytes are on disk when the write fails."""
    files.write_bytes(tmp_path / "a.bin", b"old")

    def half(self: Path, data: bytes) -> int:
        with open(self, "wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError, match="No space"):
        files.write_bytes(tmp_path / "a.bin", b"new, and longer")
    assert (tmp_path / "a.bin").read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


def test_new_folder_replaces(tmp_path):
    with files.new_folder(tmp_path / "model") as part:
        (part / "old.txt").write_text("old")
    with files.new_folder(tmp_path / "model") as part:
        (part / "new.txt").write_text("new")
        assert names(tmp_path / "model") == ["old.txt"], "the old folder serves until the new one is whole"
    assert names(tmp_path / "model") == ["new.txt"]
    assert names(tmp_path) == ["model"]


def test_new_folder_with_an_exception_keeps_the_old(tmp_path):
    with files.new_folder(tmp_path / "model") as part:
        (part / "old.txt").write_text("old")
    with pytest.raises(KeyboardInterrupt), files.new_folder(tmp_path / "model") as part:
        (part / "new.txt").write_text("new")
        raise KeyboardInterrupt
    assert names(tmp_path / "model") == ["old.txt"]
    assert names(tmp_path) == ["model"]


@pytest.mark.parametrize("which", [1, 2], ids=["first rename", "second rename"])
def test_new_folder_cut_off_at_a_rename_keeps_the_old(tmp_path, monkeypatch, which):
    with files.new_folder(tmp_path / "model") as part:
        (part / "old.txt").write_text("old")
    rename, calls = os.rename, []

    def fails_once(*arguments):
        calls.append(arguments)
        if len(calls) == which:
            no_rename()
        rename(*arguments)

    monkeypatch.setattr(os, "rename", fails_once)
    with pytest.raises(OSError, match="cut off"), files.new_folder(tmp_path / "model") as part:
        (part / "new.txt").write_text("new")
    assert names(tmp_path / "model") == ["old.txt"]
    assert names(tmp_path) == ["model"]


def test_clean_removes_leftovers_and_restores_a_folder_cut_off_in_its_swap(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / ".a.bin.0123abcd.part").write_text("half")
    (tmp_path / ".model.0123abcd.old").mkdir()
    (tmp_path / ".model.0123abcd.old" / "x").write_text("whole")
    (tmp_path / ".model.4567abcd.part").mkdir()
    (tmp_path / "kept").mkdir()
    (tmp_path / ".kept.0123abcd.old").mkdir()
    (tmp_path / ".user.part").write_text("not ours")
    files.clean(tmp_path)
    assert names(tmp_path) == [".user.part", "deep", "kept", "model"]
    assert names(tmp_path / "deep") == []
    assert (tmp_path / "model" / "x").read_text() == "whole"


def test_kill_9_while_writing(tmp_path):
    """A writer that is killed at a moment of chance: the file is one of those it wrote, from end to end."""
    target = tmp_path / "state.bin"
    code = (
        "import sys; from vqlm.files import write_bytes\n"
        "for n in range(100000): write_bytes(sys.argv[1], bytes([n % 251]) * 300_000)"
    )
    for trial in range(4):
        writer = subprocess.Popen([sys.executable, "-c", code, str(target)])
        deadline = time.monotonic() + 20
        while not target.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.03 + 0.017 * trial)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        data = target.read_bytes()
        assert len(data) == 300_000 and len(set(data)) == 1
    files.clean(tmp_path)
    assert names(tmp_path) == ["state.bin"]


def test_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert files.sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize("change", [{"a": 2}, {"seal": ""}, {"seal": None}, {"b": 1}])
def test_a_seal_is_broken_by_any_change(change):
    data = files.sealed({"a": 1, "c": [1, {"d": 0.5}]})
    assert not files.seal_is_broken(data) and not files.seal_is_broken(json.loads(json.dumps(data)))
    assert files.seal_is_broken({**data, **change})


def test_what_is_made_for_the_owner_alone_is_opened_to_readers(tmp_path):
    """safetensors writes 0600, whatever the umask: another user could not read a shared model."""
    with files.new_folder(tmp_path / "made") as part:
        (part / "inner").mkdir()
        (part / "inner" / "weights").touch(mode=0o600)
    assert (tmp_path / "made/inner/weights").stat().st_mode & 0o666 == (
        tmp_path / "made"
    ).stat().st_mode & 0o666
