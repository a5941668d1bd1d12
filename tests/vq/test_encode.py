"""The command `vq-encode`, called as a function: pictures on disk → a store, whatever happens in between."""

import pytest
import torch
from tiny import draw_shape, make_tokenizer, write_pictures

from vq.data import ImageData, ImageFolder
from vq.drivers import Local
from vq.encode import encode
from vq.images import open_image, to_pixels
from vq.pieces import StreamedPictures
from vq.quantizers.none import NoQuantizer
from vq.store import CodeStore
from vq.tokenizer import ImageTokenizer
from vqlm.errors import ConfigError
from vqlm.files import sha256


@pytest.fixture
def folder(tmp_path):
    return write_pictures(tmp_path / "pictures")


@pytest.fixture
def tokenizer(tmp_path):
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def data(folder, **options):
    return ImageData(ImageFolder(folder), **{"size": None, "holdout": 0.2, **options})


def run(folder, tokenizer, out, batch_size=8, **options):
    encode(tokenizer, data(folder, **options), str(out), batch_size, 20, "cpu", "auto", None, None, Local())
    return CodeStore.open(out)


def contents(folder):
    return {p.relative_to(folder).as_posix(): sha256(p) for p in folder.rglob("*") if p.is_file()}


def test_rows_are_the_codes_of_their_files(tmp_path, folder, tokenizer):
    store, model = run(folder, tokenizer, tmp_path / "store"), make_tokenizer()
    assert len(store) == 48 and store.grid == (2, 2) and not store.rejects
    for row in store:
        expected = model.encode(to_pixels(open_image(folder / row.id), 16)[None])[0]
        assert torch.equal(row.codes_hwQ, expected), row.id
        colour, shape, shift = row.id.removesuffix(".png").split("-")
        assert row.caption == f"a {colour} {shape}, inset {shift}"
    loaded = data(folder, size=16)
    loaded.setup()
    assert store.ids("train") == loaded.train.ids and store.ids("heldout") == loaded.heldout.ids


def test_pictures_that_are_no_squares(tmp_path, folder, tokenizer):
    store, model = run(folder, tokenizer, tmp_path / "store", aspects=[2.0], size=24), make_tokenizer()
    shape = (16, 32)  # 17 x 34 exactly
    assert store.grid == (2, 4)
    assert store.codes_NhwQ().shape == (48, 2, 4, 2)
    for row in list(store)[::9]:
        pixels = to_pixels(open_image(folder / row.id), shape)[None]
        assert torch.equal(row.codes_hwQ, model.encode(pixels)[0])
    assert model.decode(store.codes_NhwQ()[:2]).shape == (2, 3, *shape)


def test_pictures_of_several_shapes(tmp_path, folder, tokenizer):
    names = sorted(path.name for path in folder.glob("*.png"))
    for name in names[::2]:  # twice as wide as high
        open_image(folder / name).resize((40, 20)).save(folder / name)
    store, model = run(folder, tokenizer, tmp_path / "store", aspects=[1.0, 2.0], size=24), make_tokenizer()
    assert store.grid is None and set(store.grids) == {(3, 3), (2, 4)}
    for row in list(store)[::5]:
        shape = (16, 32) if row.id in names[::2] else (24, 24)
        pixels = to_pixels(open_image(folder / row.id), shape)[None]
        assert torch.equal(row.codes_hwQ, model.encode(pixels)[0])


def test_pictures_are_decoded_range_by_range(folder, monkeypatch):
    loaded = data(folder, size=16)
    asked = []
    decode = ImageData.decode
    monkeypatch.setattr(ImageData, "decode", lambda self, each: asked.append(each.id) or decode(self, each))
    pictures = StreamedPictures(loaded)
    assert len(pictures) == 48 and not asked
    part = pictures.load(5, 9)
    assert len(asked) == 4 and [each.id for each in part.records] == [
        each.id for each, _ in pictures.candidates[5:9]
    ]
    assert len(part.x_BCHW) == 4 and part.x_BCHW[0].shape == (3, 16, 16)


def test_bad_files_are_counted_and_too_many_stop_it(tmp_path, folder, tokenizer):
    for n in range(9):
        (folder / f"bad{n}.png").write_bytes(b"no picture")  # not in the metadata
    store = run(folder, tokenizer, tmp_path / "store")
    assert len(store) == 48 and {each["reason"] for each in store.rejects} == {"not-in-metadata"}
    assert len(store.rejects) == 9
    with pytest.raises(ConfigError, match=r"of 57 pictures.*not-in-metadata.*max_bad_fraction=0\.1 allows 5"):
        run(folder, tokenizer, tmp_path / "other", max_bad_fraction=0.1)
    assert not (tmp_path / "other" / "manifest.json").exists()


def test_another_batch_size_goes_on_with_the_same_store(tmp_path, folder, tokenizer):
    run(folder, tokenizer, tmp_path / "store")
    before = contents(tmp_path / "store")
    (tmp_path / "store" / "shard-00001.parquet").unlink()
    run(folder, tokenizer, tmp_path / "store", batch_size=3)
    assert contents(tmp_path / "store") == before


def test_a_picture_that_has_changed_is_encoded_again(tmp_path, folder, tokenizer, capsys):
    run(folder, tokenizer, tmp_path / "store")
    before = contents(tmp_path / "store")
    changed = CodeStore.open(tmp_path / "store")[3].id
    draw_shape("bar", "blue", 20, 1).rotate(30).save(folder / changed)
    store = run(folder, tokenizer, tmp_path / "store")
    told = capsys.readouterr().out
    assert "0 shards encoded, 2 kept, 1 redone" in told or "1 shards encoded, 2 kept, 1 redone" in told
    assert "shard-00000.parquet: was made of other pictures" in told
    expected = make_tokenizer().encode(to_pixels(open_image(folder / changed), 16)[None])[0]
    assert torch.equal(store[3].codes_hwQ, expected)
    after = contents(tmp_path / "store")
    assert {name for name in before if before[name] != after[name]} == {
        "shard-00000.parquet",
        "manifest.json",
    }


def test_a_continuous_tokenizer_is_refused_before_anything_is_read(tmp_path, folder):
    tiny = make_tokenizer()
    ImageTokenizer(tiny.encoder, NoQuantizer(4), tiny.decoder, 16).save_pretrained(tmp_path / "continuous")
    with pytest.raises(ConfigError, match=r"continuous.*no codes"):
        run(folder, str(tmp_path / "continuous"), tmp_path / "store")
    assert not (tmp_path / "store").exists()
