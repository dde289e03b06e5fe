"""Searches in JAX: devices, checkpoints, images on the device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nas.data.cifar_files import Images
from nas.data.jax import PADDING, Pixels, augmented, epoch_order
from nas.engine.jax import checkpoint, run
from nas.engine.jax.checkpoint import Checkpoints
from nas.engine.jax.devices import Hosts, join_devices
from nas.engine.settings import RunSettings


def test_a_checkpoint_returns_every_bit(tmp_path):
    devices = join_devices("cpu")
    state = devices.replicate({"w": jnp.arange(6.0).reshape(2, 3) / 7, "key": jax.random.key(3), "n": jnp.int32(4)})
    kept = Checkpoints(tmp_path)
    assert not checkpoint.exists(tmp_path)
    for step in (2, 5):
        kept.save(step, state, {"rows": [{"loss": float("inf"), "epoch": step}]})
    kept.close()
    assert checkpoint.exists(tmp_path)
    found = Checkpoints(tmp_path)
    assert found.plain() == {"rows": [{"loss": float("inf"), "epoch": 5}]}
    back = found.state(jax.tree.map(jnp.zeros_like, {**state, "key": state["n"]}) | {"key": jax.random.key(0)})
    assert np.array_equal(back["w"], state["w"]) and back["n"] == 4
    assert np.array_equal(jax.random.key_data(back["key"]), jax.random.key_data(state["key"]))


def test_a_checkpoint_that_is_not_complete_is_named(tmp_path):
    state = {"w": jnp.zeros(3)}
    kept = Checkpoints(tmp_path)
    kept.save(1, state, {})
    with pytest.raises(ValueError, match="checkpoint must contain a complete checkpoint, but could not be read"):
        kept.state({"w": jnp.zeros(3), "v": jnp.zeros(2)})
    kept.close()
    for file in (tmp_path / "checkpoint" / "1").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(ValueError, match="checkpoint must contain a complete checkpoint, but could not be read"):
        Checkpoints(tmp_path).state(state)


def test_a_run_of_torch_is_not_continued_in_jax(tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes(b"")
    with pytest.raises(FileExistsError, match="already contains a run: continue it with --resume"):
        run.launch(lambda devices: None, RunSettings(), tmp_path)
    with pytest.raises(ValueError, match=r"must continue a run of --framework jax, but .* contains one of --framework torch"):
        run.launch(lambda devices: None, RunSettings(resume=True), tmp_path)


def test_settings_without_effect_are_refused(tmp_path):
    with pytest.raises(ValueError, match="threads must be 0 with --framework jax, got 2"):
        run.launch(lambda devices: None, RunSettings(threads=2), tmp_path)


def test_devices_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match=r"device must be one that JAX finds on this machine \(cpu\), got 'tpu'"):
        join_devices("tpu")
    with pytest.raises(ValueError, match="device must be one of auto, cpu, cuda, gpu, tpu, got 'mps'"):
        join_devices("mps")
    for words in (("host:1",), ("host:1", 2), ("host:1", 2, 2), ("auto", 2, 0)):
        with pytest.raises(ValueError, match="process"):
            Hosts(*words)


def test_a_batch_on_the_device_is_random_crops_of_its_images():
    draw = np.random.default_rng(0)
    part = Images(draw.integers(256, size=(12, 3, 8, 8), dtype=np.uint8), np.arange(12))
    pixels = jax.tree.map(jnp.asarray, Pixels.of(part, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)))
    order = epoch_order(jax.random.key(1), 12)
    assert sorted(order.tolist()) == list(range(12))
    batch = jax.jit(augmented, static_argnums=3)
    found, labels = batch(pixels, order, 1, 5, jax.random.key(2))
    assert found.dtype == jnp.float32 and labels.tolist() == order[5:10].tolist()
    assert np.array_equal(found, batch(pixels, order, 1, 5, jax.random.key(2))[0])
    assert not np.array_equal(found, batch(pixels, order, 1, 5, jax.random.key(3))[0])
    flipped = 0
    for image, label in zip(np.asarray(found), labels.tolist()):
        plain = part.images[label].transpose(1, 2, 0)
        padded = np.pad(plain, ((PADDING, PADDING), (PADDING, PADDING), (0, 0)))
        crops = [padded[y : y + 8, x : x + 8] for y in range(2 * PADDING + 1) for x in range(2 * PADDING + 1)]
        crops = np.stack([*crops, *(crop[:, ::-1] for crop in crops)])
        distance = np.abs((crops / 255 - [0.5, 0.4, 0.3]) / [0.2, 0.25, 0.3] - image).max((1, 2, 3))
        assert distance.min() < 1e-5
        flipped += distance.argmin() >= len(crops) // 2
    assert 0 < flipped < 5
