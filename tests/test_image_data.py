"""Images to batches: one order for all storages, some held out, broken ones skipped or named."""

import multiprocessing
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_images import flipped, make_broken, numbered, numbers, save, take, training_images
from PIL import Image

from configuration import DataConfig, ImageConfig, UserError
from image_data import open_images
from image_files import BrokenImageError, find_images

EMOJI = Path(__file__).parent.parent / "data" / "emoji"

# -------------------------------------------------------------------------------------------------------------- batches


def test_batches_are_floats_from_0_to_1(tmp_path):
    save(tmp_path / "a.png", Image.new("RGB", (16, 16), (255, 0, 51)))
    for memory_gb in (0, 4):
        (batch,) = take(training_images(tmp_path, batch_size=3, memory_gb=memory_gb), 1)
        assert (batch.shape, batch.dtype) == ((3, 3, 16, 16), torch.float32)
        assert batch[0, :, 0, 0].tolist() == pytest.approx([1, 0, 0.2])
    (batch,) = take(training_images(tmp_path, channels=1), 1)
    assert batch.shape == (4, 1, 16, 16)


def test_memory_budget_decides_where_images_are_kept(tmp_path):
    numbered(tmp_path, 4)
    needed = 4 * 3 * 16 * 16 / 1e9
    assert training_images(tmp_path, memory_gb=needed).storage == "memory"
    assert training_images(tmp_path, memory_gb=needed * 0.99).storage == "stream"


def test_the_order_and_the_pixels_do_not_depend_on_storage_or_workers(tmp_path):
    numbered(tmp_path, 7)
    kinds = [{}, *({"memory_gb": 0, "workers": workers} for workers in (0, 1, 2))]
    runs = [take(training_images(tmp_path, batch_size=3, seed=5, mirror=True, **kind), 9) for kind in kinds]
    for run in runs[1:]:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("kind", [{}, {"memory_gb": 0, "workers": 2}], ids=["memory", "stream"])
@pytest.mark.parametrize("batch_size", [3, 16])
def test_resuming_at_any_batch_is_exact(tmp_path, kind, batch_size):
    images = training_images(numbered(tmp_path, 7), batch_size=batch_size, mirror=True, **kind)
    whole = take(images, 9)
    for first in (1, 2, 7) if kind else range(9):  # 7 = the first of an epoch
        rest = take(images, 9 - first, first)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(whole[first:], rest, strict=True))


def test_seeds_and_epochs_give_other_orders(tmp_path):
    numbered(tmp_path, 32)
    first, second = (numbers(batch) for batch in take(training_images(tmp_path, batch_size=32), 2))
    (other,) = take(training_images(tmp_path, batch_size=32, seed=1), 1)
    assert first != second
    assert first != numbers(other)
    assert first != sorted(first)


@pytest.fixture(scope="module")
def sets_of_each_size(tmp_path_factory):
    roots = {}
    for count in range(1, 10):
        roots[count] = numbered(tmp_path_factory.mktemp("set"), count)
    return roots


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 9), batch_size=st.integers(1, 20), seed=st.integers(0, 2**62), first=st.integers(0, 1000))
def test_every_epoch_is_a_permutation(sets_of_each_size, count, batch_size, seed, first):
    images = training_images(sets_of_each_size[count], batch_size=batch_size, seed=seed)
    start = first * batch_size % count  # places of the first batch's epoch that lie before it
    row = [number for batch in take(images, 3 * -(-count // batch_size) + 1, first) for number in numbers(batch)]
    assert all(image in range(count) for image in row)
    row = row[(count - start) % count :]
    for epoch in range(len(row) // count):
        assert sorted(row[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_far_batches_are_as_near_as_the_first(tmp_path):
    images = training_images(numbered(tmp_path, 3), batch_size=2)
    assert len(take(images, 1, 10**12)) == 1


def test_batches_leave_the_global_random_numbers_alone(tmp_path):
    numbered(tmp_path, 3)
    torch.manual_seed(0)
    expected = torch.rand(3)
    for kind in ({}, {"memory_gb": 0}, {"memory_gb": 0, "workers": 1}):
        torch.manual_seed(0)
        take(training_images(tmp_path, mirror=True, **kind), 2)
        assert torch.equal(torch.rand(3), expected)


def test_mirror_flips_about_half_and_the_same_ones_each_time(tmp_path):
    numbered(tmp_path, 10)
    images, plain = (training_images(tmp_path, batch_size=100, mirror=mirror) for mirror in (True, False))
    (first,), (again,), (unmirrored,) = take(images, 1), take(images, 1), take(plain, 1)
    assert torch.equal(first, again)
    assert 30 <= sum(flipped(first)) <= 70
    assert sum(flipped(unmirrored)) == 0
    flip_back = torch.tensor(flipped(first))[:, None, None, None]
    assert torch.equal(torch.where(flip_back, first.flip(-1), first), unmirrored)  # the same order with and without
    both = [tuple(flipped(batch)) for batch in take(images, 2)]
    assert both[0] != both[1]


@pytest.mark.parametrize("memory_gb", [0, 4])
def test_fixed_sample_is_spread_evenly_and_never_mirrored(tmp_path, memory_gb):
    images = training_images(numbered(tmp_path, 10), mirror=True, memory_gb=memory_gb)
    assert numbers(images.fixed_sample(5)) == [0, 2, 4, 6, 8]
    assert numbers(images.fixed_sample(10)) == list(range(10))
    assert numbers(images.fixed_sample(12)) == [*range(10), 0, 1]
    sample = images.fixed_sample(12)
    assert (sample.shape, sample.dtype) == ((12, 3, 16, 16), torch.float32)
    assert not any(flipped(sample))


def test_no_bar_when_standard_error_is_no_terminal(tmp_path, capfd):
    config = DataConfig(root=str(numbered(tmp_path, 3)))
    open_images(config, ImageConfig(size=16), batch_size=1, seed=0, device="cpu", progress=True)
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_batches_equal_the_cpu_and_never_wait(tmp_path):
    numbered(tmp_path, 7)
    expected = take(training_images(tmp_path, batch_size=3, mirror=True), 9)
    for kind, storage in (({}, "device"), ({"memory_gb": 0, "workers": 2}, "stream")):
        images = training_images(tmp_path, batch_size=3, mirror=True, device="cuda", **kind)
        assert images.storage == storage
        torch.cuda.set_sync_debug_mode("error" if storage == "device" else "default")
        try:
            batches = take(images, 9)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(batch.device.type == "cuda" for batch in batches)
        assert all(torch.equal(ours, theirs.cpu()) for ours, theirs in zip(expected, batches, strict=True))
        assert torch.equal(images.fixed_sample(4).cpu(), training_images(tmp_path).fixed_sample(4))


# ------------------------------------------------------------------------------------------------------ held-out images


@pytest.mark.parametrize("kind", [{}, {"memory_gb": 0, "workers": 0}], ids=["memory", "stream"])
def test_held_out_images_are_never_in_a_batch(tmp_path, kind):
    images = training_images(numbered(tmp_path, 20), holdout=0.25, seed=3, **kind)
    held_out = numbers(images.held_out().float() / 255)
    assert (images.count, images.held_out_count, len(held_out)) == (15, 5, 5)
    seen = {number for batch in take(images, 30) for number in numbers(batch)} | set(numbers(images.fixed_sample(15)))
    assert seen == set(range(20)) - set(held_out)
    assert "5 more are held out" in images.description
    assert numbers(images.held_out(2).float() / 255) == held_out[:2]
    halves = [numbers(half.float() / 255) for half in images.held_out_halves()]
    assert sorted([*halves[0], *halves[1]]) == sorted(held_out)
    assert len(halves[0]) == 3


def test_names_alone_decide_what_is_held_out(tmp_path):
    first, second = (numbered(tmp_path / name, 20) for name in ("here", "there"))
    chosen = [
        sorted(numbers(training_images(folder, holdout=share, seed=seed).held_out().float() / 255))
        for folder, share, seed in ((first, 0.25, 0), (second, 0.25, 9), (first, 0.5, 0))
    ]
    assert chosen[0] == chosen[1] != list(range(5))
    assert set(chosen[0]) < set(chosen[2])
    prints = [training_images(first, holdout=share).fingerprint for share in (0, 0.25, 0.5)]
    assert len(set(prints)) == 3  # a run is not resumed with other pictures held out
    assert training_images(second, holdout=0.25).fingerprint == prints[1]
    before = set(find_images(second)) - {path for path, _ in training_images(second, holdout=0.25)._held_out.samples}
    renamed = Path(second / f"{chosen[0][0]:03}.png")
    for number in range(1000):  # to another name that is held out, so that training's pictures stay the same
        renamed = renamed.rename(second / f"other{number}.png")
        images = training_images(second, holdout=0.25)
        if before == set(find_images(second)) - {path for path, _ in images._held_out.samples}:
            break
    assert images.fingerprint != prints[1]


def test_of_few_images_one_is_held_out_and_never_all(tmp_path):
    images = training_images(numbered(tmp_path, 2), holdout=0.01)
    assert (images.count, images.held_out_count) == (1, 1)
    assert training_images(tmp_path, holdout=0.9).count == 1
    (tmp_path / "001.png").unlink()
    with pytest.raises(UserError, match=r"data\.holdout=0\.9: .* holds one image only; set it to 0"):
        training_images(tmp_path, holdout=0.9)


def test_a_broken_image_that_is_held_out(tmp_path):
    held_out = numbers(training_images(numbered(tmp_path, 20), holdout=0.1).held_out().float() / 255)
    for left, number in ((1, held_out[0]), (0, held_out[1])):
        (tmp_path / f"{number:03}.png").write_bytes(b"broken")
        images = training_images(tmp_path, holdout=0.1, on_broken="skip")
        if left:
            assert numbers(images.held_out().float() / 255) == held_out[1:]
        else:
            with pytest.raises(UserError, match=r"data\.holdout: none of the 2 images held out can be read"):
                images.held_out()
    with pytest.raises(BrokenImageError, match=f"{held_out[0]:03}.png"):
        training_images(tmp_path, holdout=0.1).held_out()


# ------------------------------------------------------------------------------------------ broken images, bad settings


@pytest.fixture
def some_broken(tmp_path):
    """Eight images in one folder; numbers 2, 3 and 7 are broken."""
    numbered(tmp_path / "all", 8)
    for number, kind in ((2, "truncated"), (3, "zero bytes"), (7, "text")):
        make_broken(tmp_path / "all" / f"{number:03}.png", kind)
    return tmp_path


def test_memory_skip_drops_and_lists(some_broken):
    images = training_images(some_broken, on_broken="skip", batch_size=5)
    assert (images.storage, images.count, images.class_counts) == ("memory", 5, {"all": 5})
    assert [(path.name, bool(reason)) for path, reason in images.skipped] == [
        ("002.png", True),
        ("003.png", True),
        ("007.png", True),
    ]
    assert "skipped 3 broken" in images.description
    assert "003.png (the file is empty (0 bytes))" in images.description
    assert sorted(numbers(take(images, 1)[0])) == [0, 1, 4, 5, 6]


def test_memory_error_stops_at_the_first(some_broken):
    with pytest.raises(BrokenImageError, match=r"002\.png"):
        training_images(some_broken)


@pytest.mark.parametrize("workers", [0, 2])
def test_stream_skip_takes_the_next_readable_image(some_broken, workers):
    images = training_images(some_broken, on_broken="skip", batch_size=8, memory_gb=0, workers=workers)
    assert (images.storage, images.count, images.skipped) == ("stream", 8, [])
    (batch,) = take(images, 1)
    assert Counter(numbers(batch)) == {0: 2, 1: 1, 4: 3, 5: 1, 6: 1}  # 7 wraps round to 0; 2 and 3 become 4
    assert sorted(path.name for path, _ in images.skipped) == ["002.png", "003.png", "007.png"]
    assert "skipped 3 broken" in images.description
    assert numbers(images.fixed_sample(8)) == [0, 1, 4, 4, 4, 5, 6, 0]


@pytest.mark.parametrize("workers", [0, 2])
def test_stream_error_is_one_plain_line(some_broken, workers):
    images = training_images(some_broken, batch_size=8, memory_gb=0, workers=workers)
    with pytest.raises(BrokenImageError, match=r"00[237]\.png") as error:
        take(images, 1)
    assert multiprocessing.active_children() == []
    assert type(error.value) is BrokenImageError
    assert "\n" not in str(error.value)
    with pytest.raises(BrokenImageError, match=r"002\.png"):
        images.fixed_sample(8)


@pytest.mark.parametrize("memory_gb", [0, 4])
def test_nothing_but_broken_images(tmp_path, memory_gb):
    for number in range(3):
        make_broken(tmp_path / f"{number}.png", "text")
    with pytest.raises(UserError, match=r"data\.root: none of the images") as error:
        take(training_images(tmp_path, on_broken="skip", memory_gb=memory_gb), 1)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("colour", ["blurple", "", "#12", "rgb(1,2)"])
def test_bad_background_names_the_setting(tmp_path, colour):
    save(tmp_path / "x.png")
    with pytest.raises(UserError, match=r"data\.background") as error:
        training_images(tmp_path, background=colour, memory_gb=0)  # nothing is decoded yet
    assert repr(colour) in str(error.value)


# ------------------------------------------------------------------------------------------------------ embedded images


def test_embedded_images():
    files = [Path(path) for path in find_images(EMOJI)]
    assert len(files) == 1871
    assert sum(file.stat().st_size for file in files) < 6_000_000
    for file in files:
        with Image.open(file) as image:
            assert (image.format, image.size, image.mode) == ("WEBP", (128, 128), "RGB"), file
    images = training_images(EMOJI, size=128)
    assert "1,871 images in 9 class folders" in images.description
    assert "92.0 MB decoded" in images.description
    assert images.class_counts == {
        "activities": 85,
        "animals_and_nature": 157,
        "flags": 256,
        "food_and_drink": 128,
        "objects": 261,
        "people_and_body": 361,
        "smileys_and_emotion": 167,
        "symbols": 238,
        "travel_and_places": 218,
    }
    corners = images.fixed_sample(1871)[:, :, ::127, ::127]
    assert (corners.amin((1, 2, 3)) > 0.9).float().mean() > 0.9  # white behind; some flags reach the edge
