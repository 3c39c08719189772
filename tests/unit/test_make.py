"""Making shards: read back by webdataset, the same bytes each time, and never half a set taken for a whole one."""

import gzip
import io
import os
from urllib.parse import unquote

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from rsb_cluster.data.index import INDEX_NAME, load_index
from rsb_cluster.data.make import make_set, make_shards
from rsb_cluster.data.scan import split_name
from rsb_cluster.data.sources import Source, as_png, digits, image_folder, open_set, safe_keys
from rsb_cluster.data.torchvision_source import DEBIAN_FASHION_MNIST, data_set_names, torchvision_dataset
from rsb_cluster.data.verify import stats
from rsb_cluster.errors import ConfigError, StorageError
from rsb_cluster.storage import Store
from tests.unit.test_index import image_slice


@pytest.fixture(scope="session")
def fashion():
    """The folder of Debian's FashionMNIST; skips, or fails where RSB_REQUIRE has ``fashion``, if it is not there."""
    if not DEBIAN_FASHION_MNIST.is_dir():
        reason = f"no {DEBIAN_FASHION_MNIST}: apt-get install dataset-fashion-mnist"
        if "fashion" in os.environ.get("RSB_REQUIRE", "").replace(",", " ").split():
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)
    return DEBIAN_FASHION_MNIST


def png(value, mode="RGB"):
    return as_png(Image.new(mode, (5, 4), value))


def some(n=10, size=100):
    return [(f"k{i:03d}", bytes([i]) * (size + i), "jpg", i % 3) for i in range(n)]


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def folder_of(path, files):
    for i, name in enumerate(files):
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png((i, 0, 0)))
    return path


# webdataset leaves the files it reads to the garbage collector
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_what_was_made(tmp_path):
    import webdataset

    samples = [*some(23), ("d/" * 60 + "long", b"long", "png", 2)]
    index = make_shards(samples, Store(tmp_path), shard_samples=10, classes=["a", "b", "c"])
    urls = [str(tmp_path / name) for name in index.shards]
    read = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [(s["__key__"], s.get("jpg", s.get("png")), int(s["cls"])) for s in read] == [
        (k, d, c) for k, d, _, c in samples
    ]
    assert index.shards == ("shard-000000.tar", "shard-000001.tar", "shard-000002.tar")
    assert index.shard_start.tolist() == [0, 10, 20, 24]
    assert index.classes == ("a", "b", "c")
    assert Store(tmp_path).read_json("classes.json") == ["a", "b", "c"]
    assert [image_slice(Store(tmp_path), index, i) for i in range(24)] == [data for _, data, _, _ in samples]
    assert load_index(Store(tmp_path)).digest == index.digest


def test_two_makes_give_the_same_bytes(tmp_path, monkeypatch):
    make_shards(some(), Store(tmp_path / "1"), shard_samples=4, classes=["a", "b", "c"])
    import time

    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 1e6)  # webdataset would put the time into every header
    old = os.umask(0o077)
    try:
        make_shards(some(), Store(tmp_path / "2"), shard_samples=4, classes=["a", "b", "c"])
    finally:
        os.umask(old)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert len(contents(tmp_path / "1")) == 3 + 2


def test_shards_are_limited_in_bytes_and_hold_one_sample_at_least(tmp_path):
    index = make_shards(some(6, size=900), Store(tmp_path), shard_bytes=3 * 2560 + 100)
    assert index.shard_start.tolist() == [0, 3, 6]
    assert (index.stops <= 3 * 2560).all()
    index = make_shards(some(3, size=900), Store(tmp_path / "small"), shard_bytes=1)
    assert index.shard_start.tolist() == [0, 1, 2, 3]


def test_progress_counts_samples(tmp_path):
    steps = []
    make_shards(some(10), Store(tmp_path), shard_samples=4, progress=lambda done, total: steps.append((done, total)))
    assert steps == [(4, 10), (8, 10), (10, 10)]


def test_a_folder_with_shards_is_refused_unless_overwriting(tmp_path):
    store = Store(tmp_path)
    make_shards(some(10), store, shard_samples=2, classes=["a", "b", "c"])
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=r"already holds index\.npz \(6 such files\).*--overwrite"):
        make_shards(some(3), store)
    assert contents(tmp_path) == before
    store.write_bytes("notes.txt", b"mine")
    index = make_shards(some(3), store, overwrite=True)
    assert index.shards == ("shard-000000.tar",)
    assert set(contents(tmp_path)) == {"shard-000000.tar", INDEX_NAME, "notes.txt"}
    assert index.classes == ()


def test_a_make_that_dies_leaves_no_index(tmp_path):
    def dying():
        yield from some(5)
        raise RuntimeError("killed")

    store = Store(tmp_path)
    make_shards(some(10), store, shard_samples=2)
    with pytest.raises(RuntimeError, match="killed"):
        make_shards(dying(), store, shard_samples=2, overwrite=True)
    assert set(contents(tmp_path)) == {"shard-000000.tar", "shard-000001.tar"}
    with pytest.raises(ConfigError, match="already holds shard-000000"):
        make_shards(some(3), store)


def test_overwriting_removes_the_index_before_all_else(tmp_path, monkeypatch):
    store = Store(tmp_path)
    make_shards(some(10), store, shard_samples=2)
    deleted = []

    def failing(self, path):
        deleted.append(path)
        raise StorageError("disk on fire")

    monkeypatch.setattr(Store, "delete", failing)
    with pytest.raises(StorageError):
        make_shards(some(3), store, overwrite=True)
    assert deleted == [INDEX_NAME]


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (("a.b", b"x", "jpg", 0), "would not read this key back"),
        (("__x__/a", b"x", "jpg", 0), "would not read this key back"),
        (("a b\n", b"x", "jpg", 0), "would not read this key back"),
        (("é", b"x", "jpg", 0), "would not read this key back"),
        (("a", b"x", "JPG", 0), "the extension must be one of"),
        (("a", b"x", "txt", 0), "the extension must be one of"),
        (("a", b"x", "jpg", -1), "numbered from 0"),
        (("k001", b"x", "png", 0), "the key comes twice"),
    ],
)
def test_a_sample_that_could_not_be_found_again_is_refused(tmp_path, sample, message):
    with pytest.raises(ConfigError, match=message):
        make_shards([*some(3), sample], Store(tmp_path))
    assert not (tmp_path / INDEX_NAME).exists()


def test_no_samples_and_impossible_sizes_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no samples to write"):
        make_shards([], Store(tmp_path))
    with pytest.raises(ConfigError, match="cannot be"):
        make_shards(some(), Store(tmp_path), shard_samples=0)
    assert contents(tmp_path) == {}


WEIRD = [
    "plain/img_1.JPEG",
    "plain/nested/deep/img_1.png",
    "plain/two.dots.v1.jpg",
    "plain/same.jpg",
    "plain/same.png",
    "plain/same.JPG",
    "plain/same%2Ejpg.png",
    "plain/same.jpg.jpg",
    "plain/same+jpg.png",
    "__meta__/img.jpg",
    "____/img.jpg",
    "__half/img.jpg",
    "with space/a b.jpg",
    "with space/'quote\".jpg",
    "with.dot/x.jpg",
    "with.dot/line\nbreak.jpg",
    "with.dot/-rf *.jpg",
    "ünï/日本語.webp",
    "ünï/100%.jpg",
    "ünï/" + "long" * 50 + ".jpg",
    "ünï/\udcff\udcfe.jpg",  # no UTF-8 on disk
]


def test_weird_file_names_become_keys_that_come_back(tmp_path):
    path = folder_of(tmp_path / "in", WEIRD)
    (path / "plain" / ".hidden.jpg").write_bytes(b"x")
    (path / "plain" / "._img_1.jpg").write_bytes(b"x")
    (path / "plain" / "notes.txt").write_bytes(b"x")
    (path / ".git").mkdir()
    (path / "top.jpg").write_bytes(b"x")
    source = image_folder(path)
    assert source.classes == ("____", "__half", "__meta__", "plain", "with space", "with.dot", "ünï")
    store = Store(tmp_path / "out")
    index = make_shards(source, store, classes=source.classes, shard_samples=5)
    keys = [index.key(i) for i in range(index.num_samples)]
    assert len(set(keys)) == len(WEIRD) == index.num_samples
    found = {}
    for i, key in enumerate(keys):
        assert key.isascii()
        assert key.isprintable()
        assert not set(key) & set(" .'\"\n*")
        found[image_slice(store, index, i)] = (key, source.classes[index.labels[i]])
    for name in WEIRD:
        key, label = found[(path / name).read_bytes()]
        assert label == name.split("/")[0]
        stem, _, extension = name.rpartition(".")
        back = os.fsdecode(unquote(key.split("+")[0], errors="surrogateescape").encode("utf-8", "surrogateescape"))
        assert back == stem
        assert key.split("+")[1:] == ([extension] if name.startswith("plain/same.") and name.count(".") == 1 else [])


FILES = st.lists(st.text(st.sampled_from("aA_.+%2E/é \n~"), min_size=1, max_size=8), unique=True, max_size=8)


@given(FILES, st.sampled_from(["jpg", "JPG"]))
def test_keys_are_unique_and_survive_webdataset(stems, extension):
    files = [f"{stem}.{extension}" for stem in stems] + [f"{stem}.png" for stem in stems[:3]]
    keys = safe_keys(files)
    assert len(set(keys)) == len(files)
    for key, file in zip(keys, files, strict=True):
        if not file.rpartition(".")[0].endswith("/"):  # no file has an empty name
            assert split_name(f"{key}.jpg") == (key, "jpg")


def test_images_in_folders_are_kept_byte_for_byte_and_mixed(tmp_path):
    path = folder_of(tmp_path / "in", [f"c{c}/{i:03d}.png" for c in range(4) for i in range(30)])
    source = image_folder(path)
    assert len(source) == 120
    samples = list(source)
    assert samples == list(image_folder(path))
    assert sorted(sample[0] for sample in samples) == [f"c{c}/{i:03d}" for c in range(4) for i in range(30)]
    for key, content, extension, label in samples:
        assert content == (path / f"{key}.{extension}").read_bytes()
        assert label == int(key[1])
    for start in range(0, 120, 20):
        assert len({label for *_, label in samples[start : start + 20]}) == 4
    store = Store(tmp_path / "out")
    make_shards(source, store, shard_samples=20)
    assert stats(store).one_class_shards == 0


def test_class_folders_must_be_there_and_filled(tmp_path):
    with pytest.raises(ConfigError, match="there is no folder"):
        image_folder(tmp_path / "nowhere")
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "a.jpg").write_bytes(b"x")
    with pytest.raises(ConfigError, match="has no sub-folders"):
        image_folder(tmp_path / "flat")
    folder_of(tmp_path / "gap", ["a/1.jpg"])
    (tmp_path / "gap" / "b").mkdir()
    with pytest.raises(ConfigError, match="have no image: b"):
        image_folder(tmp_path / "gap")


def test_val_is_numbered_by_the_classes_of_train(tmp_path):
    folder_of(tmp_path / "in", ["train/a/1.jpg", "train/b/1.jpg", "train/c/1.jpg", "val/c/1.jpg", "val/a/1.jpg"])
    sources = open_set(f"{tmp_path}/in")
    assert list(sources) == ["train", "val"]
    indices = make_set(sources, Store(tmp_path / "out"))
    assert {(indices["val"].key(i), int(indices["val"].labels[i])) for i in range(2)} == {("a/1", 0), ("c/1", 2)}
    assert indices["val"].classes == indices["train"].classes == ("a", "b", "c")
    assert list(open_set(f"{tmp_path}/in", split="val")) == ["val"]
    folder_of(tmp_path / "in", ["val/d/1.jpg"])
    with pytest.raises(ConfigError, match="class folders that train lacks: d"):
        open_set(f"{tmp_path}/in")


def test_one_part_needs_to_be_told_which_and_must_fit_the_other(tmp_path):
    folder_of(tmp_path / "in", ["a/1.jpg", "b/1.jpg"])
    folder_of(tmp_path / "less", ["b/1.jpg"])
    with pytest.raises(ConfigError, match="--split train or --split val"):
        open_set(f"{tmp_path}/in")
    with pytest.raises(ConfigError, match="'test' is none of: train, val"):
        open_set(f"{tmp_path}/in", split="test")
    dest = Store(tmp_path / "out")
    make_set(open_set(f"{tmp_path}/in", split="train"), dest)
    with pytest.raises(ConfigError, match="val has 1 classes and train has 2; they differ in: a"):
        make_set(open_set(f"{tmp_path}/less", split="val"), dest)
    make_set(open_set(f"{tmp_path}/in", split="val"), dest)
    assert {name.split("/")[0] for name in dest.files()} == {"train", "val"}


def test_a_set_is_refused_before_any_part_is_written(tmp_path):
    dest = Store(tmp_path)
    make_set({"val": digits("val")}, dest)
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match="val already holds"):
        make_set(open_set("digits"), dest)
    assert contents(tmp_path) == before


def test_digits_are_split_alike_by_class(tmp_path):
    steps = []
    indices = make_set(open_set("digits"), Store(tmp_path), progress=lambda *step: steps.append(step))
    assert indices["train"].num_samples == 1438
    assert indices["val"].num_samples == 359
    assert steps == [(1000, 1797), (1438, 1797), (1797, 1797)]
    keys = {split: {index.key(i) for i in range(index.num_samples)} for split, index in indices.items()}
    assert keys["train"] | keys["val"] == {f"digits-{i:04d}" for i in range(1797)}
    assert not keys["train"] & keys["val"]
    train, val = (np.bincount(indices[split].labels, minlength=10) for split in ("train", "val"))
    assert (abs(val - (train + val) * 359 / 1797) <= 1).all()
    assert len(np.unique(indices["train"].labels[:100])) == 10
    with pytest.raises(ConfigError, match="no split 'test'"):
        digits("test")


def test_digits_are_the_pixels_of_scikit_learn():
    from sklearn.datasets import load_digits

    data = load_digits()
    for key, content, extension, label in digits("val"):
        number = int(key.removeprefix("digits-"))
        pixels = np.asarray(Image.open(io.BytesIO(content)))
        assert extension == "png"
        assert pixels.shape == (8, 8)
        assert pixels.dtype == np.uint8
        assert np.abs(pixels - data.images[number] * 255 / 16).max() <= 0.5
        assert label == data.target[number]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK"])
def test_png_keeps_what_it_can(mode):
    image = Image.new(mode, (3, 2))
    back = Image.open(io.BytesIO(as_png(image)))
    assert back.mode == {"CMYK": "RGB"}.get(mode, mode)
    assert np.array_equal(np.asarray(back.convert("RGB")), np.asarray(image.convert("RGB")))


def idx_of(folder, name):
    raw = gzip.decompress((folder / name).read_bytes())
    dims = raw[3]
    shape = np.frombuffer(raw, ">u4", dims, 4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape)


def test_fashion_mnist_is_read_as_debian_ships_it(fashion, tmp_path):
    sources = open_set("FashionMNIST", root=fashion)
    assert {split: len(source) for split, source in sources.items()} == {"train": 60_000, "val": 10_000}
    assert sources["train"].classes[9] == "Ankle boot"
    for split, prefix in (("train", "train"), ("val", "t10k")):
        images, labels = (
            idx_of(fashion, f"{prefix}-images-idx3-ubyte.gz"),
            idx_of(fashion, f"{prefix}-labels-idx1-ubyte.gz"),
        )
        for i in (0, 1, 4321, len(labels) - 1):
            key, content, extension, label = sources[split].read(i)
            assert (key, extension) == (f"FashionMNIST-{split}-{i:07d}", "png")
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(content))), images[i])
            assert label == labels[i]
    part = Source("the first of val", sources["val"].classes, 500, sources["val"].read)
    index = make_shards(part, Store(tmp_path), shard_samples=200, classes=part.classes)
    assert index.num_samples == 500
    assert index.num_classes == 10


def test_fashion_mnist_is_found_by_name_alone_and_in_torchvisions_layout(fashion, tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for file in fashion.glob("*.gz"):
        (raw / file.name.removesuffix(".gz")).write_bytes(gzip.decompress(file.read_bytes()))
    there = torchvision_dataset("FashionMNIST", tmp_path, "val")
    alone = torchvision_dataset("FashionMNIST", None, "val")
    assert there.read(7) == alone.read(7)
    unpacked = torchvision_dataset("FashionMNIST", raw, "test")
    assert unpacked.read(7)[1] == alone.read(7)[1]


def cars(root):
    """A Stanford Cars of six images, in torchvision's layout."""
    from scipy.io import savemat

    base = root / "stanford_cars"
    (base / "devkit").mkdir(parents=True)
    savemat(base / "devkit" / "cars_meta.mat", {"class_names": np.array(["Acura", "BMW"], dtype=object)})
    for part, labels, path in (
        ("train", [1, 2, 2, 1], base / "devkit" / "cars_train_annos.mat"),
        ("test", [2, 1], base / "cars_test_annos_withlabels.mat"),
    ):
        (base / f"cars_{part}").mkdir()
        names = np.empty(len(labels), dtype=[("fname", object), ("class", object)])
        for i, label in enumerate(labels):
            names[i] = (f"{i:05d}.jpg", label)
            (base / f"cars_{part}" / f"{i:05d}.jpg").write_bytes(png((i, label, 9)))
        savemat(path, {"annotations": names})


def test_files_behind_a_data_set_are_kept_and_val_becomes_test(tmp_path):
    cars(tmp_path)
    train, val = (torchvision_dataset("StanfordCars", tmp_path, split) for split in ("train", "val"))
    assert train.classes == ("Acura", "BMW")
    assert [train.read(i)[2:] for i in range(4)] == [("jpg", 0), ("jpg", 1), ("jpg", 1), ("jpg", 0)]
    assert [val.read(i)[3] for i in range(2)] == [1, 0]
    assert train.read(2)[1] == (tmp_path / "stanford_cars" / "cars_train" / "00002.jpg").read_bytes()
    assert val.read(1)[1] == (tmp_path / "stanford_cars" / "cars_test" / "00001.jpg").read_bytes()
    with pytest.raises(ConfigError, match=r"StanfordCars has no split 'extra'.*train"):
        torchvision_dataset("StanfordCars", tmp_path, "extra")


def test_flowers_are_split_as_in_the_paper(tmp_path, monkeypatch):
    from scipy.io import savemat
    from torchvision import datasets

    base = tmp_path / "flowers-102"
    (base / "jpg").mkdir(parents=True)
    for i in range(1, 7):
        (base / "jpg" / f"image_{i:05d}.jpg").write_bytes(b"flower %d" % i)
    savemat(base / "imagelabels.mat", {"labels": np.arange(1, 7)})
    savemat(base / "setid.mat", {"trnid": [1, 4], "valid": [2, 6], "tstid": [3, 5]})
    monkeypatch.setattr("torchvision.datasets.flowers102.check_integrity", lambda *_: True)  # ours has other hashes
    assert datasets.Flowers102(tmp_path).classes
    train, val = (torchvision_dataset("Flowers102", tmp_path, split) for split in ("train", "val"))
    assert [train.read(i)[1:] for i in range(4)] == [(b"flower %d" % i, "jpg", i - 1) for i in (1, 4, 2, 6)]
    assert [val.read(i)[1] for i in range(2)] == [b"flower 3", b"flower 5"]
    assert len({sample[0] for sample in train}) == 4


def test_an_unknown_data_set_gets_a_suggestion(tmp_path, monkeypatch):
    assert "CIFAR10" in data_set_names()
    with pytest.raises(ConfigError, match="Did you mean 'CIFAR10'"):
        torchvision_dataset("CIFER10", tmp_path, "train")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="Did you mean 'digits'"):
        open_set("digit")
    with pytest.raises(ConfigError, match="written with a slash"):
        open_set("zzzzzzz")


def test_a_name_wins_over_a_folder_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path / "digits", ["train/a/1.jpg", "val/a/1.jpg"])
    folder_of(tmp_path / "mine", ["train/a/1.jpg", "val/a/1.jpg"])
    assert len(open_set("digits")["train"]) == 1438
    assert len(open_set("./digits")["train"]) == 1
    assert len(open_set("mine")["train"]) == 1


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("FashionMNIST", r"train-images-idx3-ubyte.*FashionMNIST/raw"),
        ("CIFAR10", r"data_batch_1.*cifar-10-batches-py"),
        ("Flowers102", r"imagelabels\.mat"),
        ("StanfordCars", r"pytorch\.org.*StanfordCars"),
        ("ImageNet", "ILSVRC2012_devkit"),
    ],
)
def test_missing_data_names_what_was_looked_for(tmp_path, name, wanted):
    (tmp_path / "something").mkdir()
    with pytest.raises(ConfigError, match=rf"(?s)finds no {name} in {tmp_path}: .*{wanted}.*holds something"):
        torchvision_dataset(name, tmp_path, "train")
    with pytest.raises(ConfigError, match="there is no such folder"):
        torchvision_dataset(name, tmp_path / "nowhere", "train")
    assert [path.name for path in tmp_path.iterdir()] == ["something"]  # nothing was downloaded


def test_data_sets_of_another_kind_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="where does CIFAR10 lie"):
        torchvision_dataset("CIFAR10", None, "train")
    with pytest.raises(ConfigError, match="not cut into train and val"):
        torchvision_dataset("FakeData", tmp_path, "train")
    with pytest.raises(ConfigError, match="has no split 'extra'"):
        torchvision_dataset("CIFAR10", tmp_path, "extra")


# torchvision leaves the file of labels to the garbage collector
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_data_set_of_boxes_is_refused(tmp_path):
    training = tmp_path / "Kitti" / "raw" / "training"
    folder_of(training, ["image_2/000000.png"])
    (training / "label_2").mkdir()
    (training / "label_2" / "000000.txt").write_text("Car 0.00 0 -1.5 1 2 3 4 1.5 1.6 3.7 1.0 1.7 9.0 -1.5\n")
    with pytest.raises(ConfigError, match=r"Kitti does not give an image and a class number"):
        torchvision_dataset("Kitti", tmp_path, "train")
