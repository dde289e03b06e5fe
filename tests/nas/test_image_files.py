"""Own images in folders: what is read, what is refused, and searches and trainings on them."""

import json
from unittest.mock import Mock

import nas_cifar10
import numpy as np
import pytest
import torch
import train_cifar10
from nas.data import image_files, image_sets
from nas.train.loading import evaluate_images
from nas.train.settings import CifarTrainSettings
from nas_cases import TINY, TINY_JAX, drawn
from PIL import Image

MODES = {"L": (16, 12), "RGB": (16, 12, 3), "RGBA": (16, 12, 4)}


def write(file, mode="RGB", size=(16, 12)):
    """An image of noise, as a function of its name, of (height, width) `size`."""
    shape = (*size, *MODES[mode][2:])
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(drawn(str(file.relative_to(file.parents[2])), int(np.prod(shape))).reshape(shape), mode).save(file)


def tree(root, splits=("train", "val"), mode="RGB", images=12, size=(16, 12)):
    for split in splits:
        for name in ("cat", "dog", "eel"):
            for i in range(images):
                write(root / split / name / f"{i:02d}.png", mode, size)
    return root


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3), ("RGBA", 4)])
def test_images_have_the_channels_of_their_files_and_statistics_of_the_training_part(mode, channels, tmp_path):
    data = image_files.read_image_files(tree(tmp_path, mode=mode, images=4))
    assert data.train.images.shape == data.test.images.shape == (12, channels, 16, 12)
    assert data.train.images.dtype == np.uint8 and sorted(data.train.labels) == [0] * 4 + [1] * 4 + [2] * 4
    pixels = data.train.images.transpose(1, 0, 2, 3).reshape(channels, -1) / 255
    np.testing.assert_allclose(data.mean, pixels.mean(1))
    np.testing.assert_allclose(data.std, pixels.std(1))
    assert set(data.train.labels[:8]) == {0, 1, 2}, "shuffled, so that any part has all classes"
    assert data.classes == 3 and not data.note
    assert data.fingerprint == image_files.read_image_files(tmp_path).fingerprint


def test_grey_files_among_coloured_ones_are_converted_and_an_opaque_alpha_channel_is_dropped(tmp_path):
    tree(tmp_path, mode="L", images=2)
    opaque = Image.new("RGBA", (12, 16), (10, 20, 30, 255))
    opaque.save(tmp_path / "train" / "cat" / "00.png")
    data = image_files.read_image_files(tmp_path)
    assert data.train.images.shape[1] == 3
    (place,) = [i for i, image in enumerate(data.train.images) if image[:, 0, 0].tolist() == [10, 20, 30]]
    others = np.delete(data.train.images, place, 0)
    assert (others[:, 0] == others[:, 2]).all()
    opaque.putpixel((0, 0), (0, 0, 0, 0))
    opaque.save(tmp_path / "train" / "cat" / "00.png")
    assert image_files.read_image_files(tmp_path).train.images.shape[1] == 4


def test_arrays_have_any_number_of_channels_and_a_constant_one_is_not_divided_by_zero(tmp_path):
    for label in ("a", "b"):
        for i in range(12):
            (tmp_path / "train" / label).mkdir(parents=True, exist_ok=True)
            array = drawn(f"{label}{i}", 8 * 8 * 6).reshape(8, 8, 6).copy()
            array[..., 5] = 7
            np.save(tmp_path / "train" / label / f"{i}.npy", array)
    data = image_files.read_image_files(tmp_path)
    assert data.train.images.shape == (22, 6, 8, 8) and data.test.images.shape == (2, 6, 8, 8)
    assert sorted(data.test.labels) == [0, 1] and data.note == "one in 10 of each class of train, as there is no folder val"
    assert data.std[5] == 1.0
    np.save(tmp_path / "train" / "a" / "3.npy", np.zeros((8, 8, 5), np.uint8))
    with pytest.raises(ValueError, match=r"one number of channels, but .*3\.npy has 5 and others 6"):
        image_files.read_image_files(tmp_path)
    np.save(tmp_path / "train" / "a" / "3.npy", np.zeros((8, 8, 6)))
    with pytest.raises(ValueError, match=r"3\.npy must be uint8 of shape \(H, W\) or \(H, W, C\), got float64"):
        image_files.read_image_files(tmp_path)


def test_what_is_wrong_with_a_folder_is_named(tmp_path):
    fails = lambda kind, message: pytest.raises(kind, match=message)
    read = lambda: image_files.read_image_files(tmp_path)
    with fails(FileNotFoundError, r"--data-dir must contain a folder 'train' with one folder of images for each class, got .*"):
        read()
    (tmp_path / "train").mkdir()
    with fails(FileNotFoundError, r"train must contain images in a folder for each class \(\.jpg, .*\), found none"):
        read()
    write(tmp_path / "train" / "cat" / "0.png")
    with fails(ValueError, "train must contain the folders of at least two classes, got one, 'cat'"):
        read()
    (tmp_path / "train" / "dog").mkdir()
    with fails(FileNotFoundError, r"train/dog must contain images \(.*\), found none"):
        read()
    write(tmp_path / "train" / "dog" / "0.png")
    with fails(ValueError, r"train/cat must contain at least two images where there is no folder val, got 1"):
        read()
    for name in ("cat", "eel"):
        write(tmp_path / "val" / name / "0.png")
    with fails(ValueError, "must contain the same classes, but 'dog' is in train only"):
        read()
    write(tmp_path / "val" / "dog" / "0.png")
    with fails(ValueError, "must contain the same classes, but 'eel' is in val only"):
        read()
    write(tmp_path / "train" / "eel" / "0.png", size=(16, 16))
    with fails(ValueError, r"one size, but .*cat/0\.png has 16x12 pixels and .*train/eel/0\.png has 16x16"):
        read()
    odd = tree(tmp_path / "odd", images=1, size=(16, 14))
    with fails(ValueError, r"sides of images must be divisible by 4, got 16x14 pixels in .*cat/00\.png"):
        image_files.read_image_files(odd)
    (tmp_path / "train" / "eel" / "0.png").write_bytes(b"no image")
    with fails(ValueError, r"eel/0\.png must be an image: "):
        read()
    Image.new("I;16", (12, 16)).save(tmp_path / "train" / "eel" / "0.png")
    with fails(ValueError, r"eel/0\.png must have 8 bits per channel, got an image of Pillow's mode 'I;16'"):
        read()


def test_parts_of_a_data_set(tmp_path):
    data = image_sets.read_images("folder", tree(tmp_path, images=4))
    halves = image_sets.search_halves(data, 50_000, batch=6)
    assert [len(half.labels) for half in halves] == [6, 6]
    np.testing.assert_array_equal(np.concatenate([half.images for half in halves]), data.train.images)
    with pytest.raises(ValueError, match=r"batch must lie in \[1, 6\], a half of the 12 images, got 7"):
        image_sets.search_halves(data, 50_000, batch=7)
    train, valid = image_sets.training_parts(data, 10, 0, hold_out=0.2)
    np.testing.assert_array_equal(np.concatenate([train.labels, valid.labels]), data.train.labels[:10])
    assert len(valid.labels) == 2
    train, valid = image_sets.training_parts(data, 0, 5, hold_out=0.0)
    assert len(train.labels) == 12 and (valid.images == data.test.images[:5]).all()
    with pytest.raises(ValueError, match=r"hold_out must leave images on both sides, got 0\.01 of 12 images"):
        image_sets.training_parts(data, 0, 0, hold_out=0.01)


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("words", "method"),
    [
        (TINY, "darts"),
        (TINY, "gsparsity"),
        pytest.param(TINY_JAX, "darts", marks=pytest.mark.commands),
        pytest.param(TINY_JAX, "gsparsity", marks=pytest.mark.commands),
    ],
)
def test_a_search_on_own_images(words, method, tmp_path, capsys):
    place = ["--data", "folder", "--data-dir", str(tree(tmp_path / "own", ["train"], "L"))]
    out = ["--out", str(tmp_path / "out"), "--space", "cherry", "--epochs", "1", "--images", "5000"]
    (row,) = nas_cifar10.main(["--method", method, *words, *place, *out])
    assert row["paths_normal"] > 0
    assert "16x12 pixels of 1 channel, 3 classes" in capsys.readouterr().err
    assert (tmp_path / "out" / "genotype.json").exists()
    write(tmp_path / "own" / "train" / "cat" / "99.png", "L")
    with pytest.raises(SystemExit, match=r"--resume must continue .* in the checkpoint images_md5 is"):
        nas_cifar10.main(["--method", method, *words, *place, *out, "--resume"])


@pytest.mark.parametrize("method", ["darts", "gsparsity"])
def test_a_search_in_jax_is_built_for_own_images(method, tmp_path):
    """Without its compilation; the whole command is behind the marker."""
    import jax
    from nas.bilevel.jax.search_cifar import CifarSearch
    from nas.engine.jax.devices import join_devices
    from nas.methods.jax import darts, gsparsity
    from nas.methods.settings.darts import DartsSettings
    from nas.methods.settings.gsparsity import GSparsitySettings

    own = {"data": "folder", "data_dir": tree(tmp_path / "own", ["train"], "L"), "space": "cherry", "channels": 2, "layers": 3}
    if method == "darts":
        run = CifarSearch(darts.Darts, DartsSettings(batch=8, **own), 0, tmp_path, join_devices("cpu"))
        parts, leaves, each = run.pixels, jax.tree.leaves(run.search.params), 16
    else:
        run = gsparsity.GSparsitySearch(GSparsitySettings(batch=8, **own), 0, tmp_path, join_devices("cpu"))
        parts, leaves, each = (run.train, run.valid), jax.tree.leaves(run.search.rest), 33
    assert parts[0].images.shape == (each, 16, 12, 1) and parts[0].mean.shape == (1,)
    assert (3, 3, 1, 6) in [leaf.shape for leaf in leaves], "the kernel of the stem"
    assert "16x12 pixels of 1 channel, 3 classes" in run.data_text() and "images_md5" in run.identity()


def test_other_images_are_evaluated_with_the_statistics_of_the_training(tmp_path):
    data = image_sets.read_images("folder", tree(tmp_path, mode="L", images=4))
    settings = CifarTrainSettings(data="folder", data_dir=tmp_path, auxiliary=0.0, batch=4)
    net = Mock(classes=3, mean=(0.0,), std=(1.0,), return_value=torch.zeros(12, 3))
    evaluate_images(net, settings, torch.device("cpu"))
    np.testing.assert_allclose(net.call_args.args[0].numpy(), data.test.images / 255, rtol=1e-6)


@pytest.mark.usefixtures("no_pictures")
def test_a_training_on_own_small_images(tmp_path, capsys):
    place = ["--data", "folder", "--data-dir", str(tree(tmp_path / "own", mode="RGBA", images=4))]
    small = "--preset small --epochs 1 --batch 4 --channels 2 --layers 3 --images 0 --threads 1 --device cpu".split()
    with pytest.raises(SystemExit, match=r"auxiliary must be 0 for images of 16x12 pixels, .* got 0\.4"):
        train_cifar10.main([*small, *place, "--out", str(tmp_path / "out")])
    (row,) = train_cifar10.main([*small, *place, "--auxiliary", "0", "--out", str(tmp_path / "out")])
    assert 0 <= row["valid_accuracy"] <= 1
    capsys.readouterr()
    train_cifar10.main([*place, "--count", "--channels", "2", "--layers", "3"])
    assert json.loads(capsys.readouterr().out)["parameters"] > 0
