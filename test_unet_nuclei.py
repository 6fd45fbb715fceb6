"""Tests of unet_nuclei.py: `make test`. `python test_unet_nuclei.py bench` prints the ratios of the README.

They make their own images, need no network and write to temporary folders only.
"""
import contextlib
import csv
import gc
import hashlib
import http.server
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import timeit
import zipfile
from functools import partial
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import scipy
import torch
from scipy.optimize import linear_sum_assignment
from skimage.measure import label
from skimage.morphology import local_maxima, reconstruction
from skimage.segmentation import find_boundaries, watershed

import unet_nuclei as un

SCRIPT = Path(un.__file__)
CPU = torch.device("cpu")
LEARNING = ["--width", "8", "--epochs", "6", "--batch-size", "1"]
SMALL = ["--data", "data", "--width", "2", "--epochs", "1"]  # of write_data
TINY = ["--data", "synthetic", "--width", "2", "--epochs", "1", "--batch-size", "10"]


def run(*words, cwd, **options):
    """The script in a process of its own: (status, standard output, standard error)."""
    done = subprocess.run([sys.executable, SCRIPT, *map(str, words)], cwd=cwd, capture_output=True, text=True, **options)
    return done.returncode, done.stdout, done.stderr


def call(words, capsys):
    """The same in this process, which need not import torch anew."""
    status = 0
    try:
        un.main(list(map(str, words)))
    except SystemExit as end:
        status = end.code
    return status, *capsys.readouterr()


def write_data(root, train=3, test=1, size=64, seed=0):
    """A small data folder on disk; returns it."""
    rng = np.random.default_rng(seed)
    for split, n in (("train", train), ("test", test)):
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            image, mask = un.draw_nuclei(rng, size)
            iio.imwrite(root / split / "images" / f"{i}.tif", image)
            iio.imwrite(root / split / "masks" / f"{i}.tif", mask.astype(np.uint16))
    return root


def alike(samples, others):
    return all(a.name == b.name and np.array_equal(a.image, b.image) and np.array_equal(a.mask, b.mask)
               for a, b in zip(samples, others, strict=True))  # fmt: skip


def squares(*boxes, shape=(40, 40)):
    mask = np.zeros(shape, np.int32)
    for i, (y, x, height, width) in enumerate(boxes, 1):
        mask[y : y + height, x : x + width] = i
    return mask


# ---------------------------------------------------------------- network
CONCATENATED = {"joined": lambda conv, skip, x: conv(torch.cat([skip, x], 1))}  # what `joined` computes, as the notebook does


def test_unet_concatenates_skips():
    torch.manual_seed(0)
    model, image, results = un.UNet(1, 3, 4), torch.randn(2, 1, 64, 64), []
    for parts in {}, CONCATENATED:
        model.zero_grad()
        with replaced(parts):
            logits = model(image)
            (logits**2).mean().backward()
        results.append((logits, [p.grad for p in model.parameters()]))
    (logits, gradients), (other_logits, other_gradients) = results
    torch.testing.assert_close(logits, other_logits)
    torch.testing.assert_close(gradients, other_gradients, rtol=1e-3, atol=1e-5)


def test_unet_has_the_parameters_of_the_notebook():
    plain, normal = un.UNet(1, 1, norm=False), un.UNet(1, 1)
    assert sum(p.numel() for p in plain.parameters()) == 31_030_593
    convolutions = [m for m in normal.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.ConvTranspose2d))]
    assert sum(p.numel() for m in convolutions for p in m.parameters()) == 31_030_593


@pytest.mark.parametrize("inputs, outputs, width, height, breadth", [(1, 1, 4, 16, 16), (1, 3, 8, 64, 32), (3, 2, 2, 48, 80)])
def test_unet_shapes(inputs, outputs, width, height, breadth):
    model = un.UNet(inputs, outputs, width)
    levels = []
    for block in model.encoder:
        block.register_forward_hook(lambda _, __, out: levels.append(tuple(out.shape[1:])))
    logits = model(torch.randn(2, inputs, height, breadth))
    assert logits.shape == (2, outputs, height, breadth) and logits.dtype == torch.float32
    assert levels == [(width << i, height >> i, breadth >> i) for i in range(5)]


def test_unet_drops_channels_in_training_and_when_asked_only():
    image = torch.randn(2, 1, 64, 64)
    plain, model = un.UNet(1, 1, 4), un.UNet(1, 1, 4, dropout=0.5)
    assert torch.equal(plain(image), plain(image)) and not torch.equal(model(image), model(image))
    model.eval()
    assert torch.equal(model(image), model(image))


def test_unet_gives_the_extra_channels_in_training_only():
    model, image = un.UNet(1, 3, 4, extra=2), torch.randn(2, 1, 32, 32)
    assert model(image).shape == (2, 5, 32, 32) and model.eval()(image).shape == (2, 3, 32, 32)


def test_unet_refuses_sides_it_cannot_halve_four_times():
    with pytest.raises(ValueError, match="16"):
        un.UNet(1, 1, 2)(torch.zeros(1, 1, 24, 32))


def test_full_precision_needs_no_autocast(monkeypatch):
    monkeypatch.setattr(torch, "autocast", None)  # as good as on MPS with torch 2.4
    assert un.UNet(1, 1, 2)(torch.zeros(1, 1, 32, 32)).dtype == torch.float32


@pytest.mark.parametrize("capability, device, training, expected", [
    ("AVX2", "cpu", True, torch.contiguous_format), ("AVX2", "cpu", False, torch.channels_last),
    ("AVX512", "cpu", True, torch.channels_last), ("AVX2", "cuda:1", True, torch.channels_last),
    ("DEFAULT", "mps", True, torch.contiguous_format), ("DEFAULT", "mps", False, torch.contiguous_format),
])  # fmt: skip
def test_memory_format(monkeypatch, capability, device, training, expected):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert un.memory_format(torch.device(device), training) == expected


@pytest.mark.parametrize("capability, training", [("AVX2", torch.contiguous_format), ("AVX512", torch.channels_last)])
def test_the_memory_format_holds_through_the_network(monkeypatch, capability, training):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    model = un.build_model({"boundary": True, "width": 4}, CPU, torch.float32)
    formats = []
    for block in (*model.encoder, *model.decoder):
        block[-1].register_forward_hook(lambda _, __, out: formats.append(
            next(f for f in (torch.channels_last, torch.contiguous_format) if out.is_contiguous(memory_format=f))))
    model(torch.zeros(2, 1, 32, 32))
    un.predict(model, np.zeros((32, 32)))
    assert formats == [training] * 9 + [torch.channels_last] * 9


# ---------------------------------------------------------------- targets
MASK = np.array([[0, 0, 0, 0, 0, 0, 0, 0],
                 [0, 5, 5, 5, 9, 9, 9, 0],
                 [0, 5, 5, 5, 9, 9, 9, 0],
                 [0, 5, 5, 5, 9, 9, 9, 0],
                 [0, 0, 0, 0, 0, 0, 0, 0]])  # fmt: skip


def test_foreground_target():
    target = un.foreground_target(MASK)
    assert target.dtype == torch.float32 and target.shape == (1, 5, 8)
    assert torch.equal(target[0] == 1, torch.from_numpy(MASK > 0)) and set(target.unique().tolist()) == {0, 1}


def test_boundary_target_is_the_rim_of_each_nucleus():
    target = un.boundary_target(MASK)
    assert target.dtype == torch.int64
    assert target.tolist() == [
        [0, 0, 0, 0, 0, 0, 0, 0],
        [0, 2, 2, 2, 2, 2, 2, 0],
        [0, 2, 1, 2, 2, 1, 2, 0],
        [0, 2, 2, 2, 2, 2, 2, 0],
        [0, 0, 0, 0, 0, 0, 0, 0],
    ]


def test_depth_target_softens_the_boundary_target():
    mask = squares((2, 2, 11, 11), (2, 13, 11, 11), (30, 30, 1, 1))
    background, foreground, boundary = un.depth_target(mask).numpy()
    assert np.array_equal(background, mask == 0) and np.allclose(background + foreground + boundary, 1)
    assert foreground[7, 7] == foreground[7, 18] == foreground[30, 30] == 1  # one summit a nucleus, however small
    rim = un.boundary_target(mask).numpy() == 2
    assert foreground[rim & (mask < 3)].max() < 0.1
    np.testing.assert_allclose(foreground[7, 2:8], np.arange(1, 12, 2) / 11, rtol=1e-5)


def test_depth_target_of_a_crop_within_one_nucleus():
    target = un.depth_target(np.full((8, 8), 3))
    assert target.dtype == torch.float32 and target.mean((1, 2)).tolist() == [0, 1, 0]


def test_offset_target_leads_away_from_the_centre_of_each_nucleus():
    mask = squares((2, 2, 5, 9), (2, 11, 5, 9))
    rows, columns = offsets = un.offset_target(mask).numpy() * 45**0.5
    assert not offsets[:, mask == 0].any()
    np.testing.assert_allclose(rows[2:7, 6], range(-2, 3), atol=1e-5)
    np.testing.assert_allclose(columns[4, 2:20], [*range(-4, 5)] * 2, atol=1e-5)  # with a jump where the two touch
    mirrored = un.offset_target(np.pad(mask, ((0, 0), (0, 40)), mode="symmetric")).numpy() * 45**0.5
    np.testing.assert_allclose(np.abs(mirrored[:, :, :39:-1]), np.abs(offsets), atol=1e-5)  # not from between the two images


def test_separated_target_opens_the_seam_only():
    assert un.separated_target(MASK)[0].tolist() == [
        [0, 0, 0, 0, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 1, 1, 0],
        [0, 1, 1, 0, 0, 1, 1, 0],
        [0, 1, 1, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 0, 0],
    ]


def test_boundary_and_seam_are_what_skimage_marks():
    rng = np.random.default_rng(0)
    for shape in (40, 57), (1, 9), (9, 1), (1, 1):
        mask = rng.integers(0, 4, shape).repeat(2, 0).repeat(3, 1)
        inner, outer = (find_boundaries(mask.astype(np.int32), n, mode) for n, mode in ((1, "inner"), (2, "outer")))
        assert np.array_equal(un.boundary_target(mask) == 2, inner)
        assert np.array_equal(un.separated_target(mask)[0] == 0, (mask == 0) | outer)


def test_targets_of_an_empty_mask():
    empty = np.zeros((8, 8), int)
    assert un.foreground_target(empty).sum() == un.boundary_target(empty).sum() == un.separated_target(empty).sum() == 0
    assert un.nucleus_target(empty).mean((1, 2)).tolist() == [1, 0, 0, 0, 0]


# ---------------------------------------------------------------- dataset
def test_crops_reach_every_offset():
    image = np.arange(258 * 257, dtype=np.float32).reshape(258, 257)
    dataset = un.NucleiDataset([image], [np.zeros(image.shape, int)])
    torch.manual_seed(0)
    corners = {divmod(int(dataset[0][0][0, 0, 0]), 257) for _ in range(200)}
    assert corners == {(y, x) for y in range(3) for x in range(2)}


def test_small_images_are_padded_with_background():
    dataset = un.NucleiDataset([np.full((10, 300), 7, np.float32)], [np.ones((10, 300), int)])
    image, mask = dataset[0]
    assert image.shape == (1, 256, 256) and mask.shape == (256, 256)
    assert mask[:10].min() == 1 and mask[10:].max() == 0


def test_transforms_of_image_mask_and_both():
    dataset = un.NucleiDataset(
        [np.ones((256, 256), np.float32)], [np.ones((256, 256), int)], image_transform=lambda image: image * 3,
        mask_transform=un.foreground_target, transform=lambda image, mask: (image + 1, mask * 0),
    )  # fmt: skip
    image, target = dataset[0]
    assert image.unique().tolist() == [6] and target.shape == (1, 256, 256) and target.max() == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_crops_differ_between_epochs_and_workers_and_repeat_with_the_seed(workers):
    rng = np.random.default_rng(0)
    images = [rng.normal(size=(300, 300)).astype(np.float32)] * 4
    dataset = un.NucleiDataset(images, [np.ones((300, 300), int)] * 4, transform=un.augment)

    def two_epochs():
        torch.manual_seed(1)
        loader = torch.utils.data.DataLoader(dataset, num_workers=workers)
        return torch.cat([image for _ in range(2) for image, _ in loader])

    first, again = two_epochs(), two_epochs()
    assert torch.equal(first, again)
    assert len({tuple(image.ravel()[:50].tolist()) for image in first}) == 8


def test_augment_keeps_image_and_mask_together():
    image, mask = un.draw_nuclei(np.random.default_rng(3))
    image = un.rescale(image)
    torch.manual_seed(0)
    plain = 0
    for _ in range(20):
        new_image, new_mask = un.augment(image, mask)
        assert new_image.shape == new_mask.shape == (256, 256) and np.isfinite(new_image).all()
        if 500 < (new_mask > 0).sum() < 60_000:
            assert np.median(new_image[new_mask > 0]) > np.median(new_image[new_mask == 0])
        plain += np.array_equal(np.sort(new_image, None), np.sort(image, None))  # only flipped and turned
    assert 5 <= plain <= 15


# ---------------------------------------------------------------- scores
def test_loss_of_classes_by_hand():
    target = torch.tensor([[[[1.0, 0.0]], [[0.0, 0.25]], [[0.0, 0.75]]]])  # a pixel of background, one of a nucleus
    logits = torch.tensor([[[[0.5, 0.2]], [[0.3, 0.4]], [[0.2, 0.4]]]]).log()
    expected = (-math.log(0.5) - math.log(0.4)) / 2
    torch.testing.assert_close(un.loss_function(logits, target), torch.tensor(expected))
    torch.testing.assert_close(un.loss_function(torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)), torch.tensor(math.log(2)))


def test_loss_of_offsets_is_their_squared_error_within_nuclei():
    target = un.nucleus_target(squares((2, 2, 5, 9), shape=(16, 16)))[None]
    classes = target[:, :3].clamp(1e-6).log()
    plain = un.loss_function(classes, target[:, :3])
    assert un.loss_function(torch.cat([classes, target[:, 3:]], 1), target) == plain
    off = un.loss_function(torch.cat([classes, target[:, 3:] + 1], 1), target)  # by one everywhere
    torch.testing.assert_close(off - plain, torch.tensor(un.OFFSET_WEIGHT * 2 * 45 / 256))


def test_dice_by_hand():
    logits, target = torch.tensor([[[[30.0, 30.0], [-30.0, -30.0]]]]), torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]])
    assert un.dice_score(logits, target).item() == pytest.approx(0.5)
    assert un.dice_score(logits, (logits > 0).float()).item() == pytest.approx(1)
    assert un.dice_score(torch.zeros(1, 1, 2, 2), target).item() == pytest.approx(2 * 1 / (1 + 2))
    assert un.dice_score(torch.full((1, 1, 4, 4), -30.0), torch.zeros(1, 1, 4, 4)).item() == pytest.approx(1)


TWO = squares((2, 2, 10, 10), (20, 20, 10, 10))


@pytest.mark.parametrize("name, seg, mask, expected", [
    ("identical", TWO, TWO, (2, 0, 0)),
    ("permuted ids", np.array([0, 2, 1])[TWO], TWO, (2, 0, 0)),
    ("gaps in ids", np.array([0, 7, 70_000])[TWO], TWO, (2, 0, 0)),
    ("huge ids", np.array([0, 2**31, 2**40])[TWO], TWO, (2, 0, 0)),
    ("negative ids", np.array([0, -3, 5])[TWO], TWO, (2, 0, 0)),
    ("split", squares((2, 2, 5, 10), (7, 2, 5, 10), (20, 20, 10, 10)), TWO, (2, 1, 0)),
    ("split unevenly in three", squares((2, 2, 4, 10), (6, 2, 3, 10), (9, 2, 3, 10)), squares((2, 2, 10, 10)), (0, 3, 1)),
    ("merged", squares((2, 2, 10, 20)), squares((2, 2, 10, 10), (2, 12, 10, 10)), (1, 0, 1)),
    ("shifted a little", squares((2, 4, 10, 10)), squares((2, 2, 10, 10)), (1, 0, 0)),
    ("shifted too far", squares((2, 8, 10, 10)), squares((2, 2, 10, 10)), (0, 1, 1)),
    ("missed", squares((2, 2, 10, 10)), TWO, (1, 0, 1)),
    ("spurious", TWO, squares((2, 2, 10, 10)), (1, 1, 0)),
    ("both empty", TWO * 0, TWO * 0, (0, 0, 0)),
    ("nothing found", TWO * 0, TWO, (0, 0, 2)),
    ("nothing there", TWO, TWO * 0, (0, 2, 0)),
    ("IoU exactly 0.5", squares((2, 2, 5, 10)), squares((2, 2, 10, 10)), (1, 0, 0)),
])  # fmt: skip
def test_match_counts(name, seg, mask, expected):
    assert un.match_counts(seg, mask) == expected
    tp, fp, fn = expected
    assert un.f1_score(seg, mask) == (1.0 if tp + fp + fn == 0 else 2 * tp / (2 * tp + fp + fn))
    for dtype in (np.uint8, np.uint16, np.int64, np.uint64):
        if 0 <= seg.min() and seg.max() <= np.iinfo(dtype).max:
            assert un.match_counts(seg.astype(dtype), mask.astype(np.int16)) == expected


def test_iou_of_exactly_the_threshold_counts_at_all_thresholds():
    for threshold in un.IOU_THRESHOLDS:
        n = round(threshold * 20)
        assert un.match_counts(squares((0, 0, 1, n)), squares((0, 0, 1, 20)), threshold) == (1, 0, 0)
        assert un.match_counts(squares((0, 0, 1, n - 1)), squares((0, 0, 1, 20)), threshold) == (0, 1, 1)


def test_match_counts_refuses_what_cannot_be_compared():
    with pytest.raises(ValueError, match="shapes"):
        un.match_counts(np.zeros((3, 3), int), np.zeros((3, 4), int))
    with pytest.raises(ValueError, match="integers"):
        un.match_counts(np.zeros((3, 3)), np.zeros((3, 3), int))


def dense_match_counts(seg, mask, threshold):
    """The reference: an optimal assignment on the dense matrix of all pairs of objects."""
    seg_ids, mask_ids = (np.unique(image[image > 0]) for image in (seg, mask))
    table = np.zeros((int(seg.max()) + 1, int(mask.max()) + 1))
    np.add.at(table, (seg, mask), 1)
    union = table.sum(1, keepdims=True) + table.sum(0, keepdims=True) - table
    good = (table / np.maximum(union, 1) >= threshold)[np.ix_(seg_ids, mask_ids)]
    tp = int(good[linear_sum_assignment(good, maximize=True)].sum())
    return tp, len(seg_ids) - tp, len(mask_ids) - tp


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.75])
def test_match_counts_equal_an_optimal_assignment(threshold):
    rng = np.random.default_rng(int(threshold * 100))
    for _ in range(200):
        mask = un.label(rng.random((12, 12)) < 0.6, connectivity=1)
        seg = np.where(rng.random((12, 12)) < 0.2, rng.integers(0, 9, (12, 12)), np.roll(mask, rng.integers(0, 2), 1))
        assert un.match_counts(seg, mask, threshold) == dense_match_counts(seg, mask, threshold)


# ---------------------------------------------------------------- instances
def test_touching_nuclei_come_apart_and_cover_their_rims():
    for mask in (squares((2, 2, 12, 12), (2, 14, 12, 12), (25, 5, 6, 6)), squares((5, 5, 30, 15), (5, 20, 30, 15))):
        for target in (np.eye(3)[un.boundary_target(mask).numpy()].transpose(2, 0, 1), un.depth_target(mask).numpy()):
            instances = un.instance_segmentation(target[1], target[2])
            assert instances.shape == mask.shape and np.array_equal(instances > 0, mask > 0)
            assert un.match_counts(instances, mask, 0.9) == (mask.max(), 0, 0)


@pytest.mark.parametrize("peak", [1, 0.9999, 0.96])  # beside another of 1
@pytest.mark.parametrize("saddle, nuclei", [(0.93, 1), (0.8, 2)])
def test_two_peaks_are_two_nuclei_only_across_a_deep_pass(peak, saddle, nuclei):
    along = np.interp(np.arange(61), [0, 20, 30, 40, 60], [0, 1, saddle, peak, 0])
    foreground = np.outer(np.interp(np.arange(41), [0, 20, 40], [0, 1, 0]), along)
    assert un.instance_segmentation(foreground, np.where(foreground > 0, 1 - foreground, 0)).max() == nuclei


def test_instances_of_plain_and_of_unequal_maps():
    assert (un.instance_segmentation(np.full((20, 30), 0.9), np.zeros((20, 30))) == 1).all()
    assert un.instance_segmentation(np.zeros((20, 30)), np.zeros((20, 30))).max() == 0
    assert un.instance_segmentation(np.full((20, 30), np.nan), np.zeros((20, 30))).max() == 0
    with pytest.raises(ValueError, match="shapes"):
        un.instance_segmentation(np.zeros((20, 30)), np.zeros((30, 20)))


@pytest.mark.parametrize("rise", [0.08, 0.12, 0.3])
def test_instances_are_the_basins_of_the_h_maxima(rise):
    scores, noise = [], 0.3 * np.random.default_rng(0).standard_normal((400, 400)).astype(np.float32)
    for seed in range(5):
        mask = un.draw_nuclei(np.random.default_rng(seed), 400)[1]
        noisy = un.depth_target(mask)[1].numpy() + noise
        foreground = np.where(mask > 0, noisy.clip(0, 1), 0)
        depth = np.where(mask > 0, scipy.ndimage.gaussian_filter(foreground, 1), 0)
        tops = label(local_maxima(reconstruction(depth - np.float32(rise), depth)) & (mask > 0))
        instances = un.instance_segmentation(foreground, mask > 0, 0.5, rise)
        _, own = np.unique([tops[tops > 0], instances[tops > 0]], axis=1)  # a pair for each h-maximum, of an instance of its own
        assert len(np.unique(mask[mask > 0])) <= tops.max() == instances.max() == len(own) == len(set(own.tolist()))
        flooded = watershed(-depth, tops, mask=mask > 0)
        assert un.f1_score(instances, flooded) == 1
        scores.append(un.f1_score(instances, flooded, 0.9))
    assert np.mean(scores) > 0.97  # not 1: over a corner, or where two passes are equally high, the flood can go another way


def test_connected_components():
    assert un.connected_components(TWO * 0.4).max() == 1 and un.connected_components((TWO > 0) * 0.9).max() == 2


def test_components_drop_the_small_and_the_doubtful_and_grow_from_their_cores():
    mask = squares((0, 0, 5, 5), (10, 10, 2, 2), (20, 20, 5, 5), (30, 30, 5, 5), (30, 35, 5, 5))
    nucleus = np.array([0.0, 0.95, 0.95, 0.7, 0.95, 0.95])[mask]
    nucleus[20, 20] = 0.95  # a core of one pixel
    nucleus[30:35, 34:36] = 0.6  # the seam of two that touch
    thresholds = {"nucleus": 0.5, "core": 0.9, "confidence": 0.8, "smallest": 10}
    instances, sure = un.decode(nucleus[None], thresholds)
    assert un.match_counts(instances, mask * (mask != 2) * (mask != 3), 0.9) == (3, 0, 0)
    assert instances.max() == 3 and un.decode(nucleus[None] * 0.9, thresholds)[0].max() == 0
    assert sure == pytest.approx([0.95, (20 * 0.95 + 5 * 0.6) / 25, (20 * 0.95 + 5 * 0.6) / 25])


# ---------------------------------------------------------------- training
@pytest.mark.parametrize("rows, decades", [(64, 1), (64, 4), (320, 2)])  # of singular values; gradients have many
def test_orthogonalize_levels_the_singular_values(rows, decades):
    torch.manual_seed(0)
    left, right = torch.linalg.qr(torch.randn(rows, rows))[0], torch.linalg.qr(torch.randn(576, rows))[0]
    values = torch.logspace(0, -decades, rows)
    result = left.T @ un.orthogonalize(left * values @ right.T) @ right  # diagonal: the singular vectors are kept
    assert (result - result.diag().diag()).abs().max() < 1e-2
    levelled = result.diag()
    assert levelled.max() < 1.25 and levelled[values > 0.1].min() > 0.6
    assert (levelled > 5 * values)[values < 0.1].all()  # the small are lifted
    assert rows == 64 or levelled.median() > 0.7  # further where there are many
    assert not un.orthogonalize(torch.zeros(4, 9)).any()


def test_muon_moves_every_weight_and_hidden_kernels_by_its_rate():
    torch.manual_seed(0)
    model = un.UNet(1, 3, 4)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = un.Muon(model, 0.1)
    model(torch.randn(2, 1, 32, 32)).square().mean().backward()
    optimizer.step()
    change = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    assert all(step.abs().max() > 0 for name, step in change.items() if "bias" not in name)
    values = torch.linalg.svdvals(change["encoder.2.3.weight"].flatten(1)) / 0.1
    assert 0.5 < values.min() and values.max() < 1.2
    assert change["out.weight"].abs().max() == pytest.approx(0.006, rel=0.01)  # Adam's first step is its rate


def test_half_precision_with_a_loss_scale_trains_as_float32(monkeypatch):
    """As on a T4: the script takes this pair on GPUs alone, which need not have the fused Adam."""
    plain = torch.optim.Adam.__init__
    monkeypatch.setattr(torch.optim.Adam, "__init__", lambda *args, fused, **more: plain(*args, fused=False, **more))
    image, mask = un.draw_nuclei(np.random.default_rng(0), 128)
    batch = torch.from_numpy(un.rescale(image))[None, None], un.nucleus_target(mask)[None]

    def losses(precision, scale):
        torch.manual_seed(0)
        model = un.build_model({"boundary": True, "width": 4}, CPU, precision)
        optimizer = un.Muon(model, 0.02)
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=precision == torch.float16)
        return [un.train_epoch(model, [batch], optimizer, schedule, scaler)[0] for _ in range(8)]

    full, half = losses(torch.float32, 1.0), losses(torch.float16, 2.0**12)
    assert half == pytest.approx(full, rel=0.02) and full[-1] < 0.8 * full[0]
    with pytest.warns(UserWarning, match="lr_scheduler"):  # steps that overflow are passed over
        assert losses(torch.float16, 2.0**60)[-1] > 0.95 * full[0]


# ---------------------------------------------------------------- prediction
@pytest.mark.parametrize("shape", [(1, 40), (40, 1), (17, 300), (16, 16), (1, 1), (33, 47), (256, 256)])
@pytest.mark.parametrize("channels", [1, 3])
def test_predict_at_awkward_sizes(shape, channels):
    probabilities = un.predict(un.UNet(1, channels, 2), np.random.default_rng(0).normal(size=shape))
    assert probabilities.shape == (channels, *shape) and probabilities.dtype == np.float32
    assert probabilities.min() >= 0 and probabilities.max() <= 1
    if channels == 3:
        assert np.allclose(probabilities.sum(0), 1, atol=1e-5)


def test_tiles_agree_with_the_whole_image():
    torch.manual_seed(0)
    model, image = un.UNet(1, 3, 4), np.random.default_rng(1).normal(size=(700, 530)).astype(np.float32)
    whole = un.predict(model, image, tile=1024)
    assert np.abs(un.predict(model, image, tile=160) - whole).max() < 1e-4


def test_a_loaded_model_predicts_as_the_one_that_was_saved(tmp_path):
    torch.manual_seed(0)
    settings = {"boundary": True, "width": 4, "normalization": {}, "thresholds": un.BOUNDARY_THRESHOLDS}
    model = un.build_model(settings, CPU, torch.float32)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # as after some training
            for values in (module.running_mean, module.running_var, module.weight.data, module.bias.data):
                values.uniform_(0.5, 2)
    un.save_checkpoint(tmp_path / "model.pt", settings=settings, model=model.state_dict())
    image = np.random.default_rng(0).normal(size=(70, 50))
    loaded = un.load_model(tmp_path / "model.pt", CPU, torch.float32)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in loaded.modules())
    assert np.abs(un.predict(loaded, image) - un.predict(model, image)).max() < 1e-4
    half = un.load_model(tmp_path / "model.pt", CPU, torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert np.abs(un.predict(half, image) - un.predict(model, image)).max() < 0.1


def test_typical_size_hardly_minds_crumbs():
    assert un.typical_size(np.zeros((9, 9), int)) == 0
    crumbs = [(30, 2 * i, 1, 1) for i in range(15)]
    assert un.typical_size(squares((0, 0, 10, 10), (0, 15, 10, 10), *crumbs)) == 10


def segment_as_seen(monkeypatch, image, see):
    """What `segment` makes of an image where `see`, image -> probabilities, is the network; and the heights it looked at."""
    looks = []

    def predict(model, image):
        looks.append(len(image))
        return see(image)

    monkeypatch.setattr(un, "predict", predict)
    # "sure": so that even two perfect nuclei, whose mean with a half counted in is 0.83, are looked at again
    settings = {"boundary": True, "width": 1, "thresholds": un.BOUNDARY_THRESHOLDS | {"smallest": 5, "sure": 0.86},
                "normalization": {"mean": 0, "std": 1}}
    return *un.segment(un.build_model(settings, CPU, torch.float32), image * 1.0), looks


@pytest.mark.parametrize("side, most, second, best", [
    (8, 700**2, [700], 700), (16, 500**2, [350], 350), (8, 699**2, [], 200), (28, 500**2, [], 200),
    (70, 500**2, [80], 80), (70, 500**2, [80], 100), (70, 500**2, [80], 50)])
def test_of_several_looks_the_one_of_most_confidence_is_kept(monkeypatch, side, most, second, best):
    mask = squares((5, 5, side, side), (5, 100, side, side), shape=(200, 200))

    def see(image):  # in the best look, nuclei as they ought to look; else one alone, and vaguely
        seen = un.depth_target(un.resize(mask if len(image) == best else mask * (mask == 1), image.shape)).numpy()
        if len(image) != best:
            seen[1:] = 0.8 * seen[1], seen[2] + 0.2 * seen[1]
        return seen

    monkeypatch.setattr(un, "MOST", most)  # pixels of a resized image
    instances, probabilities, looks = segment_as_seen(monkeypatch, mask, see)
    assert looks == [200, *second, 200, 100, 70, 50]
    assert un.match_counts(instances, mask, 0.9) == (2, 0, 0)
    assert probabilities.shape == (3, 200, 200)


def test_a_further_look_that_is_not_surer_is_dropped(monkeypatch):
    mask = squares((5, 5, 8, 8), (5, 100, 8, 8), shape=(200, 200))
    _, probabilities, looks = segment_as_seen(monkeypatch, mask, lambda x: un.depth_target(un.resize(mask, x.shape)).numpy())
    assert looks[:2] == [200, 700] and np.array_equal(probabilities, un.depth_target(mask))


@pytest.mark.parametrize("resized, blurred, nuclei", [
    (0.005, 0, 2), (0.02, 0, 3), (0.005, 0.008, 2), (0.005, 0.02, 4), (0.02, 0.025, 3), (0.02, 0.04, 4)])
def test_how_much_surer_a_further_look_must_be(monkeypatch, resized, blurred, nuclei):
    looks = iter([(2, 0.8), (3, 0.8 + resized), (4, 0.8 + blurred), (5, 0), (6, 0), (7, 0)])  # nuclei found, how surely

    def decode(probabilities, thresholds):  # confidences of two, of which with one more of a half the mean is `sure`
        n, sure = next(looks)
        boxes = ((5, 20 * i, 8, 8) for i in range(n))
        return un.resize(squares(*boxes, shape=(200, 200)), probabilities.shape[1:]), np.array([1.5 * sure - 0.25] * 2)

    monkeypatch.setattr(un, "decode", decode)
    instances, _, _ = segment_as_seen(monkeypatch, np.eye(200), lambda image: np.zeros((3, *image.shape), np.float32))
    assert instances.max() == nuclei and next(looks, None) is None


def test_a_look_of_much_confidence_is_not_doubted(monkeypatch):
    mask = squares(*((y, x, 28, 28) for y in (10, 70, 130) for x in (10, 70, 130)), shape=(200, 200))
    instances, _, looks = segment_as_seen(monkeypatch, mask, lambda x: un.depth_target(un.resize(mask, x.shape)).numpy())
    assert looks == [200] and un.match_counts(instances, mask, 0.9) == (9, 0, 0)


def test_texture_that_leaves_an_image_in_doubt_is_blurred(monkeypatch):
    mask = squares(*((y, x, 25, 25) for y in (10, 70, 130) for x in (10, 70, 130)), shape=(200, 200))
    stripes = mask * (np.arange(200)[:, None] % 2)

    def see(image):  # a network that takes the stripes for nuclei where it sees them
        striped = abs(np.diff(image, axis=0)).max() > 0.5
        seen = un.depth_target(un.resize(stripes if striped else mask, image.shape)).numpy()
        return np.stack([seen[0], 0.8 * seen[1], seen[2] + 0.2 * seen[1]]) if striped else seen

    instances, *_ = segment_as_seen(monkeypatch, np.minimum(stripes, 1), see)
    assert un.match_counts(instances, mask, 0.9) == (9, 0, 0)


def test_confidence_falls_with_nuclei_in_pieces_merged_or_vague():
    mask = squares((5, 5, 20, 20), (5, 25, 20, 20), shape=(64, 64))
    depth, merged = un.depth_target(mask).numpy(), np.minimum(mask, 1)
    pieces = np.where(np.arange(64)[:, None] < 15, mask, mask + 2 * merged)
    assert un.confidence(mask, depth) == pytest.approx([1, 1])
    assert un.confidence(merged, depth).max() < 0.95 and un.confidence(pieces, depth).max() < 0.95
    vague = depth + 0.2 * merged * np.array([1, -1, 0])[:, None, None]  # a fifth of the foreground is background
    assert un.confidence(mask, vague) == pytest.approx([0.6, 0.6])
    assert un.confidence(0 * mask, depth).size == 0
    assert un.confidence(mask * (mask == 2), depth) == pytest.approx([0, 1])  # 1 is the id of nothing
    assert un.confidence(merged, 0.75 * merged[None]) == pytest.approx([0.75])  # the foreground model


def test_resize_keeps_ids_and_brightness():
    mask = squares((0, 0, 20, 40), (20, 0, 20, 20))
    larger = un.resize(mask, (80, 80))
    assert np.array_equal(larger, mask.repeat(2, 0).repeat(2, 1)) and larger.dtype == mask.dtype
    image = np.random.default_rng(0).random((60, 40), np.float32)
    smaller = un.resize(image, (6, 4))
    assert smaller.dtype == np.float32 and abs(smaller.mean() - image.mean()) < 0.01 and smaller.std() < 0.2 * image.std()


def test_the_margin_covers_the_receptive_field():
    model = un.UNet(1, 1, 2, norm=False)
    for module in model.modules():  # no ReLU may hide a path, no weights cancel
        if isinstance(module, (torch.nn.Conv2d, torch.nn.ConvTranspose2d)):
            torch.nn.init.constant_(module.weight, 0.1)
            torch.nn.init.constant_(module.bias, 0.1)
    reach = 0
    for y in range(256, 272):  # the grid of the pooling makes it differ between pixels
        x = torch.rand(1, 1, 528, 16).requires_grad_()
        model(x)[0, 0, y, 8].backward()
        rows = x.grad[0, 0].abs().amax(1).nonzero()
        reach = max(reach, y - int(rows.min()), int(rows.max()) - y)
    assert 80 < reach <= un.MARGIN


# ---------------------------------------------------------------- data
def test_synthetic_images_repeat_with_the_seed_and_test_images_are_others():
    (train, test), (again, _), (other, _) = un.synthetic(0), un.synthetic(0), un.synthetic(1)
    assert alike(train, again)
    assert not np.array_equal(train[0].image, other[0].image)
    assert not any(np.array_equal(a.image, b.image) for a in train for b in test)
    touching = np.mean([(un.separated_target(s.mask) != un.foreground_target(s.mask)).any() for s in train])
    assert touching > 0.9 and min(s.mask.max() for s in train) >= 3


def test_load_data_pairs_by_stem_and_takes_any_ids(tmp_path):
    root = write_data(tmp_path / "outer" / "my data ü", train=2)
    mask = iio.imread(root / "train/masks/0.tif")
    ids = np.where(mask > 0, mask.astype(np.uint32) * 70_001, 0).astype(np.uint32)
    iio.imwrite(root / "train/masks/0.tif", ids, plugin="tifffile")
    color = np.repeat(iio.imread(root / "train/images/1.tif").astype(np.uint8)[..., None], 4, -1)
    (root / "train/images/1.tif").unlink()
    iio.imwrite(root / "train/images/1.png", color)
    train, test = un.load_data(tmp_path / "outer")  # train/ and test/ are one folder down
    assert [s.name for s in train] == ["0", "1"] and len(test) == 1
    assert un.match_counts(train[0].mask, mask, 1.0)[1:] == (0, 0) and train[0].mask.max() < 1000
    assert np.array_equal(train[1].image, color[..., 0])
    archive = tmp_path / "data.zip"
    with zipfile.ZipFile(archive, "w") as members:
        for file in root.rglob("*.*"):
            members.write(file, Path("dsb") / file.relative_to(root))
    zipped, _ = un.load_data(archive)
    assert alike(zipped, train)


def write_kaggle(root, n=12):
    rng = np.random.default_rng(0)
    for i in range(n):
        image, mask = un.draw_nuclei(rng, 64)
        image = (255 * image.astype(float) / image.max()).astype(np.uint8)
        rgba = np.stack([image] * 3 + [np.full_like(image, 255)], -1)
        if i == 3:  # bright field: dark nuclei on white
            rgba[..., :3] = 255 - rgba[..., :3]
        if i == 4:  # stained tissue
            rgba[..., 1] //= 2
        (root / f"id{i:02d}/images").mkdir(parents=True)
        (root / f"id{i:02d}/masks").mkdir()
        iio.imwrite(root / f"id{i:02d}/images/id{i:02d}.png", rgba)
        for j in range(1, mask.max() + 1):
            if (mask == j).any():
                iio.imwrite(root / f"id{i:02d}/masks/{j}.png", (mask == j).astype(np.uint8) * 255)


def test_kaggle_layout_as_folder_as_zip_and_found_by_itself(tmp_path, monkeypatch):
    root = tmp_path / "input/data-science-bowl-2018"
    write_kaggle(root / "stage1_train")
    train, test = un.load_data(root)
    assert len(train) == 9 and [s.name for s in test] == ["id11"]  # 12 less two that are no fluorescence, the tenth for test
    assert {"id03", "id04"}.isdisjoint(s.name for s in train) and train[0].mask.max() > 1
    assert sum(map(len, un.load_data(root, all_images=True))) == 12
    monkeypatch.setattr(un, "KAGGLE_INPUT", tmp_path / "input")
    monkeypatch.chdir(tmp_path)
    assert alike(un.load_data("dsb2018")[0], train)
    zipped = tmp_path / "zipped"
    zipped.mkdir()
    with zipfile.ZipFile(zipped / "stage1_train.zip", "w") as members:
        for file in (root / "stage1_train").rglob("*.png"):
            members.write(file, file.relative_to(root / "stage1_train"))
    assert alike(un.load_data(zipped)[0], train)
    iio.imwrite(root / "stage1_train/id00/masks/1.png", np.zeros((5, 5), np.uint8))
    with pytest.raises(un.UserError, match="1.png"):
        un.load_data(root)
    shutil.rmtree(root / "stage1_train/id00")
    with pytest.raises(un.UserError, match="at least ten"):
        un.load_data(root)


@pytest.fixture
def server(tmp_path):
    """A local HTTP server of tmp_path/served: (folder, address)."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def log_message(self, *_):
            pass

        def do_GET(self):
            if "cut" not in self.path:
                return super().do_GET()
            data = (folder / "good.zip").read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


@pytest.mark.parametrize("case, message", [
    ("good", None), ("wrong checksum", "not the released file"), ("cut", "incomplete|cannot be fetched"),
    ("404", "--data synthetic"), ("no server", "--data synthetic"), ("escape", "outside its folder"),
])  # fmt: skip
def test_download(server, tmp_path, monkeypatch, case, message):
    folder, address = server
    root = write_data(tmp_path / "made")
    for name in ("good.zip", "escape.zip"):
        with zipfile.ZipFile(folder / name, "w") as members:
            for file in root.rglob("*.tif"):
                members.write(file, Path("dsb2018") / file.relative_to(root))
            if name == "escape.zip":
                members.writestr("../outside.txt", "x")
    name = {"good": "good.zip", "wrong checksum": "good.zip", "escape": "escape.zip"}.get(case, f"{case}.zip")
    right = hashlib.sha256((folder / ("escape.zip" if case == "escape" else "good.zip")).read_bytes()).hexdigest()
    monkeypatch.setattr(un, "DATA_URL", f"{'http://127.0.0.1:9' if case == 'no server' else address}/{name}".replace(" ", ""))
    monkeypatch.setattr(un, "DATA_SHA256", "0" * 64 if case == "wrong checksum" else right)
    monkeypatch.setattr(un, "KAGGLE_INPUT", tmp_path / "none")
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    if message is None:
        assert len(un.load_data("dsb2018")[0]) == 3 and os.listdir(work) == ["dsb2018"]
    else:
        with pytest.raises(un.UserError, match=message):
            un.load_data("dsb2018")
        assert os.listdir(work) == [] and not (tmp_path / "outside.txt").exists()


# ---------------------------------------------------------------- the command line
@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A boundary run that finds some nuclei, and a short one of foreground on drawn data: {kind: (folder, standard output)}."""
    runs, folder = {}, tmp_path_factory.mktemp("trained")
    write_data(folder / "data", train=20, test=3, size=256)
    for kind, flags in (("boundary", ["--boundary", *LEARNING, "--data", folder / "data"]), ("foreground", TINY)):
        status, out, err = run(*flags, cwd=folder)
        assert status == 0 and err == "", err
        runs[kind] = folder / "runs" / kind, out
    return runs


@pytest.mark.parametrize("kind", ["boundary", "foreground"])
def test_a_run_leaves_everything_behind(trained, kind):
    out, text = trained[kind]
    assert sorted(f.name for f in out.iterdir()) == sorted(un.OUTPUTS)
    metrics = json.loads((out / "metrics.json").read_text())
    assert text.splitlines()[-1] == f"Mean f1 score: {metrics['f1@0.5']:.4f}" and "\r" not in text and "\033" not in text
    for name in ("f1@0.5", "f1@0.75", "ap@0.5", "ap@0.75", "ap@0.5:0.95"):
        assert 0 <= metrics[name] <= 1
    test = un.load_data(metrics["data"])[1]
    assert metrics["n_images"] == len(test) and metrics["found"] + metrics["missed"] == metrics["n_objects"]
    assert metrics["n_objects"] == sum(len(np.unique(sample.mask[sample.mask > 0])) for sample in test) > 50
    assert metrics["train_images_per_second"] > 0 and metrics["predict_images_per_second"] > 0
    assert metrics["data"] == {"boundary": str(out.parents[1] / "data"), "foreground": "synthetic"}[kind]
    assert metrics["settings"]["width"] == {"boundary": 8, "foreground": 2}[kind] and "torch" in metrics["versions"]
    rows = list(csv.DictReader((out / "history.csv").open()))
    assert {"epoch", "train_loss", "val_loss", "train_dice", "val_f1", "lr", "seconds"} <= set(rows[0])
    assert len(rows) == metrics["settings"]["epochs"] and all(float(row["lr"]) > 0 for row in rows)
    for name in ("data.png", "samples.png", "curves.png"):
        assert iio.imread(out / name).std() > 10 and (out / name).stat().st_size < 2e6


@pytest.mark.parametrize("error", [0, np.arange(600)[:, None] // 560 + 4], ids=["missed", "split"])
def test_pictures_of_large_test_images_show_what_is_wrong(error):
    mask = squares((550, 640, 20, 20), (10, 10, 30, 30), (250, 300, 90, 90), shape=(600, 700))
    found = np.where(mask == 1, error, mask)  # as background, or as 4 above the row 560 and 5 below
    segmented = found, np.zeros((1, *mask.shape), np.float32)
    with replaced({"segment": lambda model, image: segmented}):
        picture = un.samples_picture(None, [un.Sample("large", np.zeros(mask.shape), mask)], np.zeros(1))
    true = np.asarray(picture)[:, un.CROP + 6 : 2 * un.CROP + 6]
    assert (true == un.colored(mask)[555, 645]).all(-1).sum() == 20 * 20


def test_predictions_open_elsewhere(trained, tmp_path):
    import tifffile  # scikit-image brings it

    images = tmp_path / "some images"
    images.mkdir()
    rng = np.random.default_rng(0)
    iio.imwrite(images / "gray.tif", rng.integers(0, 65535, (70, 33), dtype=np.uint16))
    iio.imwrite(images / "färbe.png", rng.integers(0, 255, (40, 50, 3), dtype=np.uint8))
    iio.imwrite(images / "foto.jpg", rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
    (images / "notes.txt").write_text("not an image")
    single = tmp_path / "line.png"
    iio.imwrite(single, np.zeros((1, 9), np.uint8))
    model = trained["boundary"][0] / "model.pt"
    status, out, err = run("--checkpoint", model, "--predict", images, single, "--out", "results", cwd=tmp_path)
    assert (status, err) == (0, "") and out.splitlines()[-1].startswith("4 images, ")
    for stem, shape in (("gray", (70, 33)), ("färbe", (40, 50)), ("foto", (64, 64)), ("line", (1, 9))):
        with tifffile.TiffFile(tmp_path / "results/predictions" / f"{stem}.tif") as tif:
            labels = tif.asarray()
            assert labels.shape == shape and labels.dtype == np.uint16 and tif.pages[0].compression != 1
            assert np.array_equal(np.unique(labels[labels > 0]), np.arange(1, labels.max() + 1))
        assert iio.imread(tmp_path / "results/predictions" / f"{stem}.png").shape == (*shape, 3)


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_compressed_tiffs_are_read_whole(compression, tmp_path):
    file, gray = tmp_path / "a.tif", np.random.default_rng(0).integers(0, 65536, (60, 70)).astype(np.uint16)
    page, color = un.Image.fromarray(gray), np.stack([gray >> 8] * 3, -1).astype(np.uint8)
    page.save(file, compression=compression)
    assert un.read_image(file).dtype == np.uint16 and np.array_equal(un.read_image(file), gray)
    un.Image.fromarray(color).save(file, compression=compression)
    assert np.array_equal(un.read_image(file), gray >> 8)
    page.save(file, compression=compression, save_all=True, append_images=[page])
    with pytest.raises(un.UserError, match="stack"):
        un.read_image(file)
    page.save(file, compression=compression)
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(un.UserError, match="cannot be read"):
        un.read_image(file)


@pytest.mark.filterwarnings("ignore:The legacy")  # of a reader that imageio tries on what is no image
def test_one_bad_file_among_good_ones(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    iio.imwrite(tmp_path / "good.png", np.zeros((20, 20), np.uint8))
    (tmp_path / "bad.png").write_text("no image")
    status, _, err = call(["--checkpoint", trained["foreground"][0] / "model.pt", "--predict", tmp_path], capsys)
    assert status == 2 and err.startswith("error: ") and "bad.png" in err and len(err.splitlines()) == 1
    assert (tmp_path / "runs/foreground/predictions/good.tif").exists()


def test_predicting_again_loses_nothing(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        iio.imwrite(f"{name}.png", np.zeros((20, 20), np.uint8))
    words = ["--checkpoint", trained["foreground"][0] / "model.pt", "--out", "results", "--predict"]
    assert call([*words, "a.png", "b.png"], capsys)[0] == 0
    results = Path("results/predictions")
    (results / "a.tif").write_bytes(b"corrected by hand")
    assert call([*words, "a.png"], capsys)[0] == 0
    assert (results / "earlier-1/a.tif").read_bytes() == b"corrected by hand" != (results / "a.tif").read_bytes()
    names = {file.name for file in results.glob("*")}
    assert names == {"a.tif", "a.png", "b.tif", "b.png", "earlier-1"} and len(list(results.glob("earlier-1/*"))) == 2
    before = (results / "b.png").read_bytes()
    status, _, err = call([*words, results / "b.png"], capsys)
    one_line(status, err, "--out")
    assert (results / "b.png").read_bytes() == before


def test_evaluating_a_checkpoint_repeats_its_scores(trained, tmp_path, capsys):
    folder, _ = trained["boundary"]
    words = ["--epochs", "0", "--checkpoint", folder / "model.pt", "--data", folder.parents[1] / "data", "--out", tmp_path]
    status, _, _ = call(words, capsys)
    before, again = (json.loads((f / "metrics.json").read_text()) for f in (folder, tmp_path))
    assert status == 0 and before["f1@0.5"] == again["f1@0.5"] > 0 and before["ap@0.5:0.95"] == again["ap@0.5:0.95"] > 0


def without_times(history):
    times = ("seconds", "images_per_second")
    return [{name: v for name, v in row.items() if name not in times} for row in csv.DictReader(history.open())]


def same_run(a, b):
    one, two = (torch.load(f / "last.pt", weights_only=True) for f in (a, b))
    assert all(torch.equal(one["model"][name], two["model"][name]) for name in one["model"])
    assert without_times(a / "history.csv") == without_times(b / "history.csv")
    scores = [json.loads((f / "metrics.json").read_text()) for f in (a, b)]
    assert all(scores[0][name] == scores[1][name] for name in scores[0] if "@" in name)


def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path):
    write_data(tmp_path / "data", train=6)
    kills = int(os.environ.get("KILLS", "2"))
    words = ["--boundary", "--seed", 1, *SMALL, "--epochs", 10 * kills]
    assert run(*words, "--out", "whole", cwd=tmp_path)[0] == 0
    rng, last, resume = random.Random(0), tmp_path / "cut/last.pt", []
    for _ in range(kills):  # at random moments after an epoch: within the next, or a checkpoint
        before = last.stat().st_mtime_ns if resume else 0
        process = subprocess.Popen([sys.executable, SCRIPT, *map(str, words), "--out", "cut", *resume], cwd=tmp_path,
                                   stdout=subprocess.DEVNULL)  # fmt: skip
        until(lambda old=before: last.exists() and last.stat().st_mtime_ns > old)
        time.sleep(rng.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL  # else it ended by itself
        resume = ["--resume"]
    status, _, err = run(*words, "--out", "cut", *resume, cwd=tmp_path)
    assert status == 0, err
    same_run(tmp_path / "whole", tmp_path / "cut")


def until(condition, seconds=60):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end
        time.sleep(0.02)


def test_a_kill_while_writing_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    un.save_checkpoint(path, n=1)
    pid = os.fork()
    if pid == 0:  # the child dies between writing and moving
        os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        un.save_checkpoint(path, n=2)
    os.waitpid(pid, 0)
    assert un.load_checkpoint(path, dict) == {"n": 1}


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopping_says_how_to_resume(tmp_path, number, status):
    write_data(tmp_path / "data")
    words = [sys.executable, SCRIPT, "--boundary", *SMALL, "--epochs", "1000", "--out", "out"]
    process = subprocess.Popen(  # a suite started with `&` ignores SIGINT, and its processes would too
        words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # fmt: skip
    until(lambda: (tmp_path / "out/last.pt").exists())
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == status and len(err.splitlines()) == 1 and "--resume" in err


def test_a_new_run_keeps_the_earlier_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path / "data")
    write_data(tmp_path / "other", test=2)
    for _ in range(2):
        status, out, _ = call(["--boundary", *SMALL, "--out", "out"], capsys)
        assert status == 0
    assert "earlier-1" in out and (tmp_path / "out/earlier-1/model.pt").exists()
    same_run(tmp_path / "out", tmp_path / "out/earlier-1")  # two runs of one command are the same
    metrics = (tmp_path / "out/metrics.json").read_bytes()
    words = ("--epochs", "0", "--checkpoint", "out/model.pt", "--data", "other", "--out", "out")
    status, out, _ = call(words, capsys)
    assert status == 0 and "earlier-2" in out and (tmp_path / "out/earlier-2/metrics.json").read_bytes() == metrics
    assert (tmp_path / "out/model.pt").exists() and metrics != (tmp_path / "out/metrics.json").read_bytes()


def resuming(folder, out):
    """The words that resume the run in `folder` within `out`."""
    return ["--boundary", *LEARNING, "--data", folder.parents[1] / "data", "--out", out, "--resume"]


def test_resume_refuses_other_settings_and_takes_more_epochs(trained, tmp_path, capsys):
    folder, _ = trained["boundary"]
    shutil.copy(folder / "last.pt", tmp_path)
    status, _, err = call([*resuming(folder, tmp_path), "--lr", "0.1"], capsys)
    assert status == 2 and "0.1" in err and "0.05" in err
    status, _, err = call([*resuming(folder, tmp_path), "--epochs", "7"], capsys)  # last.pt alone is there
    assert status == 0, err
    assert [row["epoch"] for row in csv.DictReader((tmp_path / "history.csv").open())] == list("1234567")


def test_resume_of_a_finished_run_restores_the_best_model(trained, tmp_path, capsys):
    folder, _ = trained["boundary"]
    shutil.copy(folder / "last.pt", tmp_path)
    assert call(resuming(folder, tmp_path), capsys)[0] == 0
    assert (tmp_path / "model.pt").read_bytes() == (folder / "model.pt").read_bytes()


def test_resume_on_a_gpu_that_needs_a_loss_scale(trained, tmp_path):
    """What a CPU, or a GPU with bf16, began goes on on a T4: no scale is in the file."""
    shutil.copy(trained["boundary"][0] / "last.pt", tmp_path)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    assert un.resume(tmp_path / "last.pt", {"scaler": scaler}, {}) and scaler.get_scale() == 8


def full_disk(_):
    """In place of `os.fsync`."""
    raise OSError(28, "No space left on device")


def test_resume_onto_a_full_disk_says_so(trained, tmp_path, monkeypatch, capsys):
    folder, _ = trained["boundary"]
    shutil.copy(folder / "last.pt", tmp_path)
    monkeypatch.setattr(os, "fsync", full_disk)
    status, _, err = call(resuming(folder, tmp_path), capsys)
    one_line(status, err, "No space left")


def test_a_model_taken_away_while_training_is_written_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path / "data")
    losses = iter([1.0, 2.0])  # the second epoch is worse

    def validate(*_):
        Path("out/model.pt").unlink(missing_ok=True)
        return next(losses), 0.5, 0.5

    monkeypatch.setattr(un, "validate", validate)
    status, _, err = call([*SMALL, "--epochs", "2", "--out", "out"], capsys)
    assert status == 0 and Path("out/model.pt").exists(), err


@pytest.mark.parametrize("damage", [lambda state: state["optimizer"]["param_groups"].pop(), lambda state: state["model"].clear()],
                         ids=["optimizer", "model"])  # fmt: skip
def test_resume_refuses_the_parts_of_another_version(trained, tmp_path, capsys, damage):
    folder, _ = trained["boundary"]
    state = torch.load(folder / "last.pt", weights_only=True)
    damage(state)
    torch.save(state, tmp_path / "last.pt")
    status, _, err = call(resuming(folder, tmp_path), capsys)
    one_line(status, err, "this version")
    assert os.listdir(tmp_path) == ["last.pt"]


def test_a_full_disk_ends_with_one_line_and_the_last_checkpoint(tmp_path):
    """A limit on the size of files stands in for the disk."""
    out = tmp_path / "out"
    data = write_data(tmp_path / "data")
    command = f"ulimit -f 300; exec {sys.executable} {SCRIPT} --boundary --data {data} --width 4 --epochs 3 --out {out}"
    done = subprocess.run(["bash", "-c", "trap '' XFSZ; " + command], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
    assert not list(out.glob("*.part"))


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    un.save_checkpoint(path, n=1)
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError):
        un.save_checkpoint(path, n=2)
    assert un.load_checkpoint(path, dict) == {"n": 1} and os.listdir(tmp_path) == ["last.pt"]


@pytest.mark.parametrize("kind", [[], ["--boundary"]], ids=["foreground", "boundary"])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, kind):
    write_data(tmp_path / "data")
    status, _, err = run(*SMALL, *kind, "--epochs", "5", "--lr", "1e30", "--out", "out", cwd=tmp_path, timeout=300)
    assert status == 2 and "epoch" in err and "--lr" in err and len(err.splitlines()) == 1
    if (tmp_path / "out/last.pt").exists():
        assert all(v.isfinite().all() for v in un.load_checkpoint(tmp_path / "out/last.pt", dict)["model"].values())


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil-was-here",)


@pytest.mark.parametrize("case", ["evil", "truncated", "foreign", "text", "missing", "earlier version"])
def test_checkpoints_are_data(trained, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    path, good = tmp_path / "model.pt", (trained["boundary"][0] / "model.pt").read_bytes()
    if case == "evil":
        torch.save(Evil(), path)
    elif case == "foreign":
        torch.save(torch.nn.Linear(2, 2).state_dict(), path)
    elif case == "earlier version":
        state = torch.load(trained["boundary"][0] / "model.pt", weights_only=True)
        del state["settings"]["thresholds"]["sure"]
        torch.save(state, path)
    elif case != "missing":
        path.write_bytes(good[: len(good) // 2] if case == "truncated" else b"hello")
    with pytest.raises(un.UserError, match="model.pt"):
        un.load_model(path, CPU, torch.float32)
    assert not Path("evil-was-here").exists()


def test_a_model_of_the_other_kind_is_refused(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = trained["foreground"][0] / "model.pt"
    status, _, err = call(["--boundary", "--epochs", "0", "--checkpoint", model, "--data", "synthetic"], capsys)
    assert status == 2 and "foreground" in err and not (tmp_path / "runs").exists()


def test_two_processes_train_as_one(tmp_path):
    write_data(tmp_path / "data", train=12)
    words = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(random.randint(20_000, 40_000))]
    probe = tmp_path / "probe.py"  # runs the script and writes what each rank ends with
    probe.write_text(
        "import sys, torch\nsys.path.insert(0, sys.argv.pop(1))\nimport unet_nuclei as un\n"
        "build = un.build_model\nmodels = []\n"
        "un.build_model = lambda *a: models.append(build(*a)) or models[-1]\nun.main(sys.argv[1:])\n"
        "torch.save([p.detach() for p in models[0].parameters()], f'rank{un.RANK}.pt')\n"
    )
    done = subprocess.run([sys.executable, *words, probe, SCRIPT.parent, "--boundary", *SMALL, "--out", "out"],
                          cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Mean f1 score") == 1 and sorted(os.listdir(tmp_path / "out")) == sorted(un.OUTPUTS)
    assert all(np.isfinite(float(v)) for row in csv.DictReader((tmp_path / "out/history.csv").open()) for v in row.values())
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert all(torch.equal(a, b) for a, b in zip(*ranks))
    evaluate = ["--epochs", "0", "--checkpoint", "out/model.pt", "--data", "data", "--out", "again"]
    done = subprocess.run([sys.executable, *words, SCRIPT, *evaluate], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.count("Mean f1 score") == 1, done.stderr


# ---------------------------------------------------------------- bad input
def tif(path, array):
    path.unlink(missing_ok=True)
    iio.imwrite(path, array, plugin="tifffile")


def edit(name, change):
    """A change of train/{name}/0.tif of a data folder by a function of its array."""
    return lambda root: tif(root / f"train/{name}/0.tif", change(iio.imread(root / f"train/{name}/0.tif")))


def put(name, data):
    return lambda root: (root / name).write_bytes(data)


def truncate(root):
    file = root / "train/images/0.tif"
    file.write_bytes(file.read_bytes()[:-2000])


def zipped(cut):
    def change(root):
        with zipfile.ZipFile(root.parent / "whole.zip", "w") as members:
            for file in root.rglob("*.tif"):
                members.write(file, file.relative_to(root))
        shutil.rmtree(root)
        root.write_bytes((root.parent / "whole.zip").read_bytes()[: -1000 if cut else None])

    return change


def read_only_link(root):
    root.rename(root.parent / "real ü")
    root.symlink_to("real ü", target_is_directory=True)
    for folder in (root, root / "train", root / "train/images"):
        folder.chmod(0o555)


def nan(image):
    image = image.astype(np.float32)
    image[3, 3] = np.nan
    return image


def two_of_255(mask):
    return (squares((2, 2, 9, 9), (30, 30, 9, 9), shape=mask.shape) > 0) * np.uint8(255)


INPUTS = [  # name, what is done to a good data folder, a word of the one line (None: it works)
    ("path missing", shutil.rmtree, "does not exist"),
    ("folder empty", lambda root: (shutil.rmtree(root), root.mkdir()), "train/"),
    ("no zip", lambda root: (shutil.rmtree(root), root.write_text("hello")), "no zip"),
    ("zip", zipped(cut=False), None),
    ("zip truncated", zipped(cut=True), "no zip"),
    ("no masks/", lambda root: shutil.rmtree(root / "train/masks"), "masks"),
    ("mask missing", lambda root: (root / "train/masks/1.tif").unlink(), "1.tif"),
    ("image missing", lambda root: (root / "train/images/1.tif").unlink(), "1.tif"),
    ("pair of different shape", edit("masks", lambda mask: mask[:-1]), "0.tif"),
    ("image is text", put("train/images/0.tif", b"hello"), "0.tif"),
    ("image is empty", put("train/images/0.tif", b""), "0.tif"),
    ("image is truncated", truncate, "0.tif"),
    ("3-D stack", edit("images", lambda image: np.stack([image] * 5)), "2-D"),
    ("colour image with alpha", edit("images", lambda image: np.stack([image.astype(np.uint8)] * 4, -1)), None),
    ("12 bits in 16", edit("images", lambda image: image.clip(0, 4095)), None),
    ("float image", edit("images", lambda image: image.astype(np.float32) / 1000), None),
    ("float with NaN", edit("images", nan), "NaN"),
    ("float with infinity", edit("images", lambda image: np.where(image > image.mean(), np.inf, 0)), "infinite"),
    ("float beyond float32", edit("images", lambda image: image * 1e300), "huge"),
    ("constant image", edit("images", lambda image: image * 0 + 7), None),
    ("mask all background", edit("masks", lambda mask: mask * 0), None),
    ("negative ids", edit("masks", lambda mask: -mask.astype(np.int16)), "negative"),
    ("fractional ids", edit("masks", lambda mask: mask.astype(np.float32) / 2), "fractional"),
    ("mask as three equal channels", edit("masks", lambda mask: np.stack([mask.astype(np.uint8)] * 3, -1)), None),
    ("colour-coded mask", edit("masks", lambda mask: np.stack([mask, mask * 5, mask * 7], -1).astype(np.uint8)), "coloured"),
    ("0/255 mask", edit("masks", two_of_255), "own"),
    ("one training image", lambda root: [f.unlink() for f in root.glob("train/*/[12].tif")], "at least two"),
    ("a hidden file of macOS", put("train/images/._0.tif", b"hello"), None),
    ("two training images", lambda root: [f.unlink() for f in root.glob("train/*/2.tif")], None),
    ("no test image", lambda root: [f.unlink() for f in root.glob("test/*/*.tif")], "no image"),
    ("read-only, a link, not ASCII", read_only_link, None),
]
FLAGS = [
    ("--epochs -1", "--epochs"), ("--width 0", "--width"), ("--batch-size 0", "--batch-size"), ("--lr nan", "--lr"),
    ("--lr 0", "--lr"), ("--epochs many", "--epochs"), ("--device cuda:9", "cuda"), ("--device tpu", "tpu"),
    ("--out file", "file"), ("--out file/below", "file"), ("--predict data", "--checkpoint"), ("--resume", "last.pt"),
    ("--checkpoint none.pt --predict data", "none.pt"), ("--checkpoint {model} --predict empty", "no image"),
    ("--checkpoint {model} --predict none.tif", "none.tif"), ("--checkpoint {model}", "--epochs 0"),
    ("--epochs 0", "--checkpoint"), ("--no-such-flag", "--no-such-flag"),
    ("--checkpoint {model} --epochs 0 --width 3", "--width"), ("--device meta", "meta"),
    ("--checkpoint data/test/images/0.tif --epochs 0", "0.tif"),
]  # fmt: skip
TABLE = []


def one_line(status, err, word):
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1 and word in err, err


@pytest.mark.parametrize("name, change, word", INPUTS, ids=[name for name, *_ in INPUTS])
def test_data(tmp_path, monkeypatch, capsys, name, change, word):
    monkeypatch.chdir(tmp_path)
    change(write_data(tmp_path / "data"))
    status, _, err = call(SMALL, capsys)
    TABLE.append((name, status, err.strip().replace(str(tmp_path), "") or "works"))
    if word is None:
        assert status == 0, err
    else:
        one_line(status, err, word)
        assert not Path("runs").exists()  # nothing was written, nothing trained


@pytest.mark.parametrize("flags, word", FLAGS, ids=[flags for flags, _ in FLAGS])
def test_flags(trained, tmp_path, monkeypatch, capsys, flags, word):
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path / "data")
    Path("file").touch()
    Path("empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    words = flags.format(model=trained["boundary"][0] / "model.pt").split()
    status, _, err = call(["--data", "data", *words], capsys)
    TABLE.append((flags.replace("{model}", "model.pt"), status, err.strip().replace(str(tmp_path), "")))
    one_line(status, err, word)
    assert sorted(tmp_path.rglob("*")) == before


def test_print_the_table_of_inputs(capsys):
    with capsys.disabled():
        print("\n| input | status | answer |\n| --- | --- | --- |")
        for row in TABLE:
            print("| " + " | ".join(map(str, row)) + " |")
    assert all(status in (0, 2) for _, status, _ in TABLE)


def test_help_fits_a_screen(capsys):
    with pytest.raises(SystemExit) as end:
        un.main(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and len(text.splitlines()) <= 45
    assert text.count("(default:") == text.count("\n  --") > 0 and "None" not in text and "False" not in text


def test_progress_in_a_file_is_a_line_after_five_minutes_of_silence(capsys, monkeypatch):
    clock = iter([0, 299, 301, 301, 302])
    monkeypatch.setattr(un.time, "time", lambda: next(clock))
    un.say("start")
    for step in "abc":  # at 299, 301 and 302 seconds
        un.live(step)
    assert capsys.readouterr().out == "start\nb\n"


# ---------------------------------------------------------------- notebook
def test_pasted_into_a_notebook(tmp_path):
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    write_data(tmp_path / "data")
    train = 'metrics = main(["--boundary", "--data", "data", "--epochs", "1", "--width", "2"])\nprint(metrics["n_images"])'
    cells = ["import time as mine; sheet = 5", SCRIPT.read_text(), train, train, "main(['--lr', 'nan'])", "mine.time() and 1 + 1"]
    cells.insert(1, f"%%writefile unet_nuclei.py\n{SCRIPT.read_text()}")
    cells += ["main(['--help'])", f"!{sys.executable} unet_nuclei.py --boundary --data data --epochs 1 --width 2 --out shell"]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    client = nbclient.NotebookClient(book, timeout=300, allow_errors=True, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    _, _, pasted, first, second, wrong, after, flags, shell = book.cells
    assert "main([" in pasted.outputs[0]["text"] and len(pasted.outputs) == 1
    assert "--boundary" in flags.outputs[0]["text"] and len(flags.outputs) == 1
    for cell in (first, second):
        assert not any(output["output_type"] == "error" for output in cell.outputs)
        text = "".join(output.get("text", "") for output in cell.outputs)
        assert "Mean f1 score" in text and "main(['--checkpoint', 'runs/boundary/model.pt', '--predict', 'FOLDER'])" in text
        assert sum("image/png" in output.get("data", {}) for output in cell.outputs) == 3
    assert [output["traceback"] for output in wrong.outputs if output["output_type"] == "error"][0][0].startswith("error: ")
    assert after.outputs[0]["data"]["text/plain"] == "2"
    assert "Mean f1 score" in "".join(output.get("text", "") for output in shell.outputs)
    (tmp_path / "executed.ipynb").write_text(nbformat.writes(book))


# ---------------------------------------------------------------- make bench
def notebook_steps(width, n):
    """The notebook's loop (batch 1, float32, channels first, no normalization): seconds a crop to train, GiB, to predict."""
    model, image, target = un.UNet(1, 1, width, norm=False), torch.randn(1, 1, 256, 256), torch.ones(1, 1, 256, 256)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)

    def step():
        optimizer.zero_grad()
        torch.nn.functional.binary_cross_entropy_with_logits(model(image), target).backward()
        optimizer.step()

    with replaced(CONCATENATED):
        step()
        return clock(step, n, 3), peak_memory(), clock(lambda: no_grad(model, image), n, 3)


def peak_memory():
    """Of this process so far, in GiB."""
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def no_grad(model, image):
    with torch.no_grad():
        return model.eval()(image)


def clock(function, n, turns=1):
    """Seconds a call, the least of some turns of n calls each."""
    return min(timeit.repeat(function, gc.enable, number=n, repeat=turns)) / n  # timeit switches collection off, a run does not


def script_steps(width, n, batch=4):
    """The script's own loop: seconds a crop to train on images, GiB, seconds to predict, and to train on one fixed batch."""
    device, precision = un.choose_device("cpu", "auto")
    settings = {"boundary": True, "width": width, "normalization": {}, "thresholds": un.BOUNDARY_THRESHOLDS}
    model = un.build_model(settings, device, precision)
    un.keep_memory()
    optimizer = un.Muon(model, 1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    samples = un.synthetic(0)[0][:20]
    images, masks = [un.rescale(s.image) for s in samples], [s.mask for s in samples]
    dataset = un.NucleiDataset(images, masks, None, un.nucleus_target, un.augment)
    loader = torch.utils.data.DataLoader(dataset, batch, sampler=[i % 20 for i in range(n)])
    fixed = [next(iter(loader))] * (n // batch)
    un.train_epoch(model, fixed[:1], optimizer, schedule, scaler)
    turns, end = [], time.time() + 30
    while time.time() < end:  # the least of a few turns, of more on a fast machine
        turns.append([clock(lambda crops=crops: un.train_epoch(model, crops, optimizer, schedule, scaler), 1) / n
                      for crops in (fixed, loader)])
    (bare, real), memory = np.min(turns, axis=0), peak_memory()
    with tempfile.TemporaryDirectory() as folder:
        un.save_checkpoint(Path(folder, "model.pt"), settings=settings, model=model.state_dict())
        model = un.load_model(Path(folder, "model.pt"), device, precision)
    return real, memory, clock(lambda: un.predict(model, images[0]), n, 3), bare


def in_a_process(code):
    """The numbers that a function returns in a process of its own, whose peak memory is its own."""
    code = f"import test_unet_nuclei as t; print(*t.{code})"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=SCRIPT.parent)
    return [float(word) for word in output.stdout.split()]


def bench():
    """Print the README's ratios, each against a reference of a few lines, measured in this one run."""
    print(f"{os.cpu_count()} cores, torch {torch.__version__}, computing in {un.choose_device('cpu', 'auto')[1]}")
    for width, n in ((64, 4), (16, 32)):
        notebook, (*script, bare) = in_a_process(f"notebook_steps({width}, {n})"), in_a_process(f"script_steps({width}, {n})")
        for what, slow, fast in ("training", notebook[0], script[0]), ("prediction", notebook[2], script[2]):
            rates = f"notebook {1 / slow:.2f}, script {1 / fast:.2f} images/s, ratio {slow / fast:.2f}"
            print(f"width {width} {what}: {rates}", flush=True)
        sizes = f"notebook {notebook[1]:.2f}, script {script[1]:.2f} GiB, ratio {script[1] / notebook[1]:.2f}"
        print(f"width {width} peak memory of training: {sizes}", flush=True)
        print(f"width {width}: data pipeline takes {max(0, 1 - bare / script[0]):.1%} of the training loop", flush=True)
    for size, side in ((5000, 1500), (20_000, 8192)):
        grid = np.arange(side) * int(size**0.5) // side
        mask = (grid[:, None] * int(size**0.5) + grid + 1).astype(np.int32)
        mask[:: side // int(size**0.5)] = 0
        seg = np.roll(mask, 3, 1)
        fast = clock(lambda seg=seg, mask=mask: un.match_counts(seg, mask), 1)
        if size > 5000:
            print(f"match_counts of {mask.max()} objects on {side}x{side}: {fast:.1f} s")
        else:
            slow = clock(lambda seg=seg, mask=mask: dense_match_counts(seg, mask, 0.5), 1)
            assert dense_match_counts(seg, mask, 0.5) == un.match_counts(seg, mask)
            print(f"match_counts of {mask.max()} objects: dense {slow:.2f} s, script {fast:.2f} s, ratio {slow / fast:.1f}")


# ---------------------------------------------------------------- the README's table of limits
def limits(checkpoint, data):
    """Print the scores of a model on the validation images of `data` as they are and changed in known ways."""
    rng, blur = np.random.default_rng(0), scipy.ndimage.gaussian_filter

    def photons(n):
        return lambda image: rng.poisson(np.clip(image / np.percentile(image, 99.8), 0, 4) * n + 2)

    def sized(factor, image, mask):  # of what is magnified, a corner, for the time
        image, mask = (a[: 900 // factor, : 900 // factor] if factor > 1 else a for a in (image, mask))
        shape = tuple(int(side * factor) for side in image.shape)
        return un.resize(image.astype(np.float32), shape), un.resize(mask, shape)

    def grained(factor, sigma, after, image, mask):  # coarse chromatin, then blurred
        image, mask = sized(factor, image, mask)
        grain, dark = blur(rng.normal(size=image.shape), sigma), np.percentile(image, 1)
        return blur(dark + (image - dark) * np.exp(0.4 * grain / grain.std()), after), mask

    def hazy(image, mask):
        contrast = np.median(image[mask > 0]) - np.median(image[mask == 0])
        return image + np.linspace(0, 2 * contrast, image.shape[1]), mask

    changes = {"as they are": lambda image: image, "16 bit, x257": lambda image: image.astype(np.uint16) * 257,
               "ten times dimmer, rounded": lambda image: (image / 10).round().astype(np.uint8),
               "photon noise, 50 at the brightest": photons(50), "photon noise, 12 at the brightest": photons(12),
               "gamma 1.8": lambda image: (image / image.max()) ** 1.8,
               "blur, sigma 2": lambda image: blur(image.astype(np.float32), 2)}
    changes = {name: lambda image, mask, f=f: (f(image), mask) for name, f in changes.items()}
    for name, factor in ("halved", 0.5), ("magnified 2x", 2), ("magnified 3x", 3):
        changes[name] = partial(sized, factor)
    for name, factor, grain in ("grain of 1.5 pixels", 1, 1.5), ("magnified 3x, grain of 3 pixels", 3, 3):
        for end, after in ("", 0), (f", then blur, sigma {2 * grain:g}", 2 * grain):
            changes[name + end] = partial(grained, factor, grain, after)
    changes["haze, rising by twice the nuclei's contrast"] = hazy
    model, samples = un.load_model(checkpoint, *un.choose_device("cpu", "auto")), un.load_data(data)[0][19::20]
    for name, change in changes.items():
        changed = [un.Sample(s.name, *change(s.image, s.mask)) for s in samples]
        scores, _ = un.evaluate(model, changed)
        with replaced(WITHOUT_AT_PREDICTION["one look, in place of one to six"]):
            once, _ = un.evaluate(model, changed)
        print(f"| {name} | " + " | ".join([*cells(scores), cells(once)[1]]) + " |", flush=True)


def kinds(data, without="the script as it is", width="16", epochs="10"):
    """Print scores, seed 0 / seed 1, on the training images of sizes that training left out: other cells and microscopes.

    without: a row of `WITHOUT`.
    """
    train, sizes = un.load_data(data)[0], {(256, 256), (256, 320), (520, 696)}
    known, strange = ([sample for sample in train if (sample.image.shape in sizes) == kept] for kept in (True, False))
    rows = {}
    for seed in "01":
        with network(WITHOUT[without], known, strange, width, epochs, seed) as (model, together):
            scores = {"together": together}
            for shape in sorted({sample.image.shape for sample in strange}):
                of_shape = [sample for sample in strange if sample.image.shape == shape]
                scores["{} x {}".format(*shape)], _ = un.evaluate(model, of_shape)
        for name, score in scores.items():
            rows.setdefault(f"{name} | {score['n_images']} | {score['n_objects']}", []).append(cells(score))
    print_rows(rows)


# ---------------------------------------------------------------- the README's table of what each part gives
def hard_target(mask):
    return torch.nn.functional.one_hot(un.boundary_target(mask), 3).permute(2, 0, 1).float()


def plain_markers(foreground, boundary, threshold, rise):
    """Instances from the components of the smoothed foreground, in place of its summits."""
    depth, inside = scipy.ndimage.gaussian_filter(foreground, 1), foreground + boundary > threshold
    return watershed(-depth, np.where(inside, label(depth > 0.5), 0), mask=inside)


def adam(model, lr):
    return torch.optim.Adam(model.parameters(), 0.06 * lr)


WITHOUT = {  # names of the script and what they are replaced by, for training and scoring
    "the script as it is": {},
    "Adam for all weights, in place of Muon": {"Muon": adam},
    "hard classes, in place of the depth": {"depth_target": hard_target},
    "flips and turns only, for augmentation": {"PLAIN": 1.0},
    "every crop augmented, not half of them": {"PLAIN": 0.0},
    "no channels dropped": {"DROPOUT": 0.0},
    "no offsets to learn": {"OFFSET_WEIGHT": 0.0},
    "gray levels / 255, in place of percentiles": {"rescale": lambda image: np.asarray(image, np.float32) / 255},
}
WITHOUT_AT_PREDICTION = {  # the same for scoring the script's own network
    "one look, in place of one to six": {"MOST": 0, "BLURRED": ()},
    "markers: foreground above 0.5, in place of summits": {"instance_segmentation": plain_markers},
}


def ablation(data, width="16", epochs="1"):
    """Print scores of networks trained without one part of the script, seed 0 / seed 1, on validation and test images."""
    train, test = un.load_data(data)
    validation = train[19::20]
    print("| | validation F1 | AP | AP 0.5:0.95 | test F1 | AP | AP 0.5:0.95 |\n" + "| --- " * 7 + "|")
    for name, parts in WITHOUT.items():
        rows = {name: {}} if parts else {name: {}, **WITHOUT_AT_PREDICTION}
        scores = {row: [] for row in rows}
        for seed in "01":
            with network(parts, train, test, width, epochs, seed) as (model, tested):
                for row, more in rows.items():
                    with replaced(more):  # the network's own test scores need not be computed again
                        both = un.evaluate(model, validation)[0], un.evaluate(model, test)[0] if more else tested
                    scores[row].append([cell for score in both for cell in cells(score)])
        print_rows(scores)


def cells(scores):
    return [f"{scores[key]:.3f}" for key in ("f1@0.5", "ap@0.5", "ap@0.5:0.95")]


def print_rows(rows):
    """Rows of a table, in each cell the values of all seeds."""
    for name, seeds in rows.items():
        print(f"| {name} | " + " | ".join(map(" / ".join, zip(*seeds))) + " |", flush=True)


@contextlib.contextmanager
def network(parts, train, test, width, epochs, seed):
    """(boundary model, its test scores), trained with some names of the script replaced, which they are until the end."""
    with tempfile.TemporaryDirectory() as out, replaced(parts | {"load_data": lambda *_: (train, test)}):
        with contextlib.redirect_stdout(sys.stderr):
            tested = un.main(["--boundary", "--width", width, "--epochs", epochs, "--seed", seed, "--out", out])
        yield un.load_model(Path(out, "model.pt"), *un.choose_device("cpu", "auto")), tested


@contextlib.contextmanager
def replaced(parts):
    """The script with some of its names replaced."""
    with pytest.MonkeyPatch.context() as patch:
        for name, instead in parts.items():
            patch.setattr(un, name, instead)
        yield


if __name__ == "__main__" and sys.argv[1:]:
    {"bench": bench, "limits": limits, "kinds": kinds, "ablation": ablation}[sys.argv[1]](*sys.argv[2:])
