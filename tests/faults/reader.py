"""A process of its own that reads pictures one by one: how long each takes, and how far memory rises meanwhile.

The peak is this process's own (VmHWM, set back before each file): what getrusage tells begins with its parent's. Knows
no kind of picture.
"""

import json
import sys
import time
import warnings
from pathlib import Path

import numpy as np
from PIL import Image


def ours(path):
    from vq.images import Reject, open_image

    try:
        open_image(path)
    except Reject as reject:
        return reject.reason
    return "took"


def pillow(path):
    try:
        np.array(Image.open(path).convert("RGB"))
    except Exception as error:
        return type(error).__name__
    return "took"


def memory(name):
    """MB, of this process's own status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(name))) / 1024


def measured(read, path):
    Path("/proc/self/clear_refs").write_text("5")
    before, start = memory("VmRSS"), time.perf_counter()
    told = read(path)
    return told, 1000 * (time.perf_counter() - start), memory("VmHWM") - before


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    Image.init()
    reader = {"ours": ours, "pillow": pillow}[sys.argv[1]]
    print(json.dumps([measured(reader, path) for path in sys.argv[2:]]))
