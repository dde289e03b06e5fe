"""Schedules of trainings, and the published presets."""

import pytest
from nas.train.settings import CIFAR_TRAIN_PRESETS, IMAGENET_TRAIN_PRESETS, CifarTrainSettings, ImageNetTrainSettings


def test_the_learning_rate_warms_up_and_ends_with_a_smaller_slope():
    ista = IMAGENET_TRAIN_PRESETS["ista"]
    assert [ista.rate(e) for e in range(6)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.5 * 240 / 245])
    assert [ista.rate(e) for e in (244, 245, 249)] == pytest.approx([0.5 / 245, 0.5 / 245, 0.1 / 245])
    assert ImageNetTrainSettings(epochs=3, schedule="linear_tail").rate(2) > 0


def test_the_learning_rate_can_decay_by_a_factor():
    darts = IMAGENET_TRAIN_PRESETS["darts"]
    assert (darts.batch, darts.rate(0), darts.rate(2)) == (128, 0.1, pytest.approx(0.1 * 0.97**2))


def test_the_training_of_gsparsity_has_its_published_sizes():
    sizes = lambda name: [getattr(CIFAR_TRAIN_PRESETS[name], k) for k in ("layers", "batch", "drop_path", "form")]
    assert sizes("gsparsity") == [14, 80, 0.3, "gsparsity"] and sizes("gsparsity_subspaces")[0] == 17


def test_a_setting_out_of_its_domain_is_named():
    with pytest.raises(ValueError, match="warmup_epochs must be finite and >= 0, got -1"):
        CifarTrainSettings(warmup_epochs=-1)
    with pytest.raises(ValueError, match="form must be evaluation for folders of images, got gsparsity"):
        ImageNetTrainSettings(form="gsparsity")
