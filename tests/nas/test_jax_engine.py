"""Searches in JAX: devices, checkpoints, images on the device."""

import os
import shutil
import signal
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nas.data.cifar_files import Images
from nas.data.jax import PADDING, Pixels, augmented, epoch_order
from nas.engine import console, loop
from nas.engine.command_line import CommandLine
from nas.engine.jax import run
from nas.engine.jax.checkpoint import Checkpoints
from nas.engine.jax.devices import Devices, Hosts, join_devices
from nas.engine.loop import checkpoint_exists
from nas.engine.settings import RunSettings
from nas.engine.signals import Interrupted
from nas.methods import frameworks, group_sparsity
from nas.methods.settings.gsparsity import GSparsitySettings


def test_a_checkpoint_returns_every_bit(tmp_path):
    devices = join_devices("cpu")
    state = devices.replicate({"w": jnp.arange(6.0).reshape(2, 3) / 7, "key": jax.random.key(3), "n": jnp.int32(4)})
    kept = Checkpoints(tmp_path)
    assert not checkpoint_exists(tmp_path, "jax")
    for step in (2, 5):
        kept.save(step, state, {"rows": [{"loss": float("inf"), "epoch": step}]})
    kept.close()
    assert checkpoint_exists(tmp_path, "jax")
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
    kept.save(2, state, {})
    kept.close()
    for file in (tmp_path / "checkpoint" / "2").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    message = "checkpoint must contain a complete checkpoint, but could not be read; without 2 in it, the run continues from 1"
    with pytest.raises(ValueError, match=message):
        Checkpoints(tmp_path).state(state)
    shutil.rmtree(tmp_path / "checkpoint" / "2")
    assert np.array_equal(Checkpoints(tmp_path).state(state)["w"], state["w"])


def test_a_run_of_torch_is_not_continued_in_jax(tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes(b"")
    with pytest.raises(FileExistsError, match="already contains a run: continue it with --resume"):
        run.launch(lambda devices: None, RunSettings(), tmp_path)
    with pytest.raises(ValueError, match=r"must continue a run of --framework jax, but .* contains one of --framework torch"):
        run.launch(lambda devices: None, RunSettings(resume=True), tmp_path)


def test_a_run_of_jax_is_not_overwritten_in_torch(tmp_path):
    from nas.engine.run import launch

    (tmp_path / "checkpoint" / "10").mkdir(parents=True)
    with pytest.raises(FileExistsError, match="already contains a run: continue it with --resume"):
        launch(lambda processes, device: None, RunSettings(), tmp_path)
    with pytest.raises(ValueError, match=r"must continue a run of --framework torch, but .* contains one of --framework jax"):
        launch(lambda processes, device: None, RunSettings(resume=True), tmp_path)


class Count(run.Run):
    """Three epochs of four steps, which compute nothing. saved: the steps after which it saves."""

    def __init__(self, out, devices, **own):
        super().__init__(Epochs(**own), 0, out, devices)
        self.saved = []

    def __len__(self):
        return 4

    def batches(self):
        return iter(range(self.step, 4))

    def train_step(self, batch):
        pass

    def end_epoch(self):
        return {"valid_accuracy": 0.5}

    def save(self):
        self.saved.append((self.epoch, self.step))

    def machine(self):
        return console.cpu("jax")


@dataclass(frozen=True)
class Epochs(RunSettings):
    epochs: int = 3


def test_all_processes_save_after_the_step_that_the_first_one_chooses(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "STEPS_BETWEEN_CLOCKS", 2)
    for late in (True, False):
        devices = SimpleNamespace(
            first=True, world=2, count=2, wait=lambda: None, any=lambda flag: flag, from_first=lambda flag, late=late: late
        )
        counted = Count(tmp_path / str(late), devices, checkpoint_minutes=1e6 if late else 0)
        counted.run()
        within = [(epoch, step) for epoch, step in counted.saved if step]
        assert within == ([(epoch, step) for epoch in range(3) for step in (2, 4)] if late else [])


@pytest.mark.parametrize("own", [True, False], ids=["this process", "another process"])
def test_all_processes_stop_after_the_same_step(own, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "STEPS_BETWEEN_CLOCKS", 2)

    class Stopped(Count):
        def train_step(self, batch):
            if own and (self.epoch, self.step) == (1, 2):
                os.kill(os.getpid(), signal.SIGINT)

    signalled = lambda flag: flag or (not own and (stopped.epoch, stopped.step) == (1, 4))
    devices = SimpleNamespace(first=True, world=2, count=2, wait=lambda: None, any=signalled, from_first=lambda flag: False)
    stopped = Stopped(tmp_path, devices)
    with pytest.raises(Interrupted, match=f"stopped by {'SIGINT' if own else 'SIGTERM'} after step 4 of epoch 2"):
        stopped.run()
    assert stopped.saved == [(1, 0), (1, 4)]


def test_the_first_process_tells_the_others_that_the_folder_is_in_use(tmp_path, monkeypatch):
    (tmp_path / "run.lock").write_text('{"pid": 7, "host": "elsewhere"}')
    for first, reason in ((True, "in use by process 7 on elsewhere"), (False, "is in use: the first process has the reason")):
        devices = SimpleNamespace(first=first, any=lambda flag: True)
        monkeypatch.setattr(run, "join_devices", lambda device, devices=devices: devices)
        with pytest.raises(FileExistsError, match=reason):
            run.launch(lambda devices: None, RunSettings(), tmp_path)


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    state, kept = {"w": jnp.ones(3)}, Checkpoints(tmp_path)
    kept.save(1, state, {})
    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left on device"):
        patched.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=4))
        kept.save(2, state, {})

    def save(self, step, **others):
        (kept.folder / f"{step}.orbax-checkpoint-tmp").mkdir()
        raise RuntimeError("RESOURCE_EXHAUSTED: [OS error 28: ENOSPC No space left on device]")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left on device"):
        patched.setattr(type(kept._manager), "save", save)
        kept.save(2, state, {})
    assert [entry.name for entry in kept.folder.iterdir()] == ["1"]
    assert np.array_equal(kept.state(state)["w"], state["w"])


def test_a_checkpoint_of_something_else_is_named(tmp_path):
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "checkpoint").touch()
    with pytest.raises(ValueError, match="must be a folder of checkpoints, but is a file"):
        run.launch(lambda devices: None, RunSettings(resume=True), tmp_path / "file")
    kept = Checkpoints(tmp_path)
    kept.save(1, {"w": jnp.zeros(3)}, {"rows": []})
    kept.close()
    with pytest.raises(ValueError, match="must hold checkpoints of a run, but the last one has no 'identity'"):
        Count(tmp_path, join_devices("cpu")).continue_from_checkpoint()


def test_a_run_killed_between_its_last_checkpoint_and_its_table_writes_the_table(tmp_path):
    devices = join_devices("cpu")
    counted = Count(tmp_path, devices)
    counted.set_progress({"epoch": 3, "step": 0, "seconds": 1.0, "rows": [{"epoch": i, "loss": i / 3} for i in range(3)]})
    counted.run()
    written = [line.split(",")[0] for line in (tmp_path / "run.csv").read_text().splitlines()]
    assert written == ["epoch", "1", "2", "3"], "checkpoints of release 0.1.0 count epochs from 0, tables from 1"


def test_the_time_of_an_epoch_includes_the_steps_that_were_only_started(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: clock.now))

    class Slow(Count):
        waits = 0

        def wait_for_steps(self):
            self.waits += 1
            clock.now += 2.0

    slow = Slow(tmp_path, join_devices("cpu"))
    slow.run()
    # after each of the first steps, which are timed for the expected time of the run, and at the end of the three epochs
    assert slow.waits == 4 + 3 and slow.seconds == 2.0 * slow.waits


def test_a_run_that_fails_leaves_no_checkpoint(tmp_path):
    class Fails(Count):
        def train_step(self, batch):
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        Fails(tmp_path, join_devices("cpu")).run()
    assert not (tmp_path / "checkpoint").exists()


def test_a_folder_that_processes_do_not_share_is_refused(tmp_path, monkeypatch):
    devices = SimpleNamespace(first=False, world=2, wait=lambda: None, any=lambda flag: flag, all_same=lambda *flags: all(flags))
    monkeypatch.setattr(run, "join_devices", lambda device: devices)
    with pytest.raises(ValueError, match=r"out must be a folder that all processes share, got .*none"):
        run.launch(lambda devices: None, RunSettings(), tmp_path / "none")


@pytest.mark.parametrize("first", [True, False])
def test_the_first_process_alone_writes_the_result_of_a_bisection(first, tmp_path, capsys):
    def search(settings, folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.html").write_text(f"mu {settings.mu}")
        return {"paths_normal": 3, "paths_reduce": 4}

    settings = GSparsitySettings(want_paths=7, mu=0.5)
    row = group_sparsity.search_or_bisect(settings, tmp_path, search, lambda genotype: 0, lambda: first)
    assert (row["mu"], row["left"]) == (0.5, 7)
    written = {file.name for file in tmp_path.iterdir() if file.is_file()}
    assert written == ({"report.html", "bisection.csv"} if first else set())
    assert capsys.readouterr().out == ("mu 0.5: 7 paths, 7 wanted\n" if first else "")


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "nas.methods.registry", None)
    monkeypatch.delattr(sys.modules["nas.methods"], "registry", raising=False)
    with pytest.raises(SystemExit, match=r"--framework torch needs PyTorch .* or search with --framework jax"):
        frameworks.registry_of(CommandLine([]))


def test_settings_without_effect_are_refused(tmp_path):
    with pytest.raises(ValueError, match="threads must be 0 with --framework jax, got 2"):
        run.launch(lambda devices: None, RunSettings(threads=2), tmp_path)


@pytest.mark.parametrize("first", [True, False])
def test_the_first_process_downloads_before_the_others_read(first, tmp_path):
    """Several processes that unpack the same archive at once would read files of which only a part is written."""
    events = []

    class Two(Devices):
        wait = lambda self: events.append("wait")

    Two.first = first
    two = Two(join_devices("cpu").mesh)
    assert two.first_then_others(lambda: events.append("read") or 5) == 5
    with pytest.raises(FileNotFoundError):
        two.first_then_others((tmp_path / "none").read_text)
    assert events == (["read", "wait", "wait"] if first else ["wait", "read", "wait"])


def test_devices_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match=r"device must be one that JAX finds on this machine \(cpu\), got 'tpu'"):
        join_devices("tpu")
    with pytest.raises(ValueError, match="device must be one of auto, cpu, cuda, gpu, tpu, got 'mps'"):
        join_devices("mps")
    for words in (("host", 2, 0), (":1", 2, 0), ("host:one", 2, 0)):
        with pytest.raises(ValueError, match=f"coordinator must be auto or HOST:PORT, got '{words[0]}'"):
            Hosts(*words)
    with pytest.raises(ValueError, match="coordinator must be HOST:PORT where JAX finds none, got 'auto'"):
        Hosts("auto").join()
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
