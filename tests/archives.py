"""Small tars and Parquet files of one-coloured pictures, for tests of what reads them."""

import io
import tarfile


def png(number, side=16):
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (side, side), (number % 256, 255 - number % 256, 7)).save(file, "png")
    return file.getvalue()


def write_tar(path, members):
    """members: (name, bytes)."""
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def write_tars(folder, tars=4, each=10):
    """Tars 00000.tar … of captioned pictures; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(tars):
        members = []
        for i in range(n * each, (n + 1) * each):
            members += [(f"{i:06d}.png", png(i)), (f"{i:06d}.txt", f"picture {i}".encode())]
        write_tar(folder / f"{n:05d}.tar", members)
    return folder


def write_parquet(path, numbers, struct):
    """Columns image (bytes, or as `datasets` writes them), text, what."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = [{"bytes": png(n), "path": None} if struct else png(n) for n in numbers]
    columns = {
        "image": images,
        "text": [f"picture {n}" for n in numbers],
        "what": [f"thing {n // 2}" for n in numbers],
    }
    pq.write_table(pa.table(columns), path, row_group_size=7)
