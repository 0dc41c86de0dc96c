"""Images to batches: one order wherever they are kept, some held out, broken ones skipped or named."""

import itertools
import multiprocessing
import pickle
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import numbered_images, training_images, write_image
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from configuration import UserError
from media import BrokenImageError, find_images

EMOJI = Path(__file__).parent.parent / "data" / "emoji"


def take(images, count: int, first: int = 0) -> list[torch.Tensor]:
    """The batches `first` to `first + count - 1`."""
    batches = images.batches(first)
    try:
        return list(itertools.islice(batches, count))
    finally:
        batches.close()


def numbers(batch: torch.Tensor) -> list[int]:
    """Which of the `numbered_images` a batch holds, flipped or not."""
    return [round(value * 255) - 1 for value in batch.amax((1, 2, 3)).tolist()]


def held_out_numbers(images, limit: int | None = None) -> list[int]:
    return numbers(images.held_out(limit).float() / 255)


def flipped(batch: torch.Tensor) -> list[bool]:
    return (batch[..., 0].sum((1, 2)) < batch[..., -1].sum((1, 2))).tolist()


def test_batches_are_floats_from_0_to_1_wherever_images_are_kept(tmp_path):
    write_image(tmp_path / "a.png", Image.new("RGB", (16, 16), (255, 0, 51)))
    needed = 3 * 16 * 16 / 1e9
    for memory_gb, storage in ((needed, "memory"), (needed * 0.99, "stream")):
        images = training_images(tmp_path, batch_size=3, memory_gb=memory_gb)
        (batch,) = take(images, 1)
        assert (images.storage, batch.shape, batch.dtype) == (storage, (3, 3, 16, 16), torch.float32)
        assert batch[0, :, 0, 0].tolist() == pytest.approx([1, 0, 0.2])
    (batch,) = take(training_images(tmp_path, channels=1), 1)
    assert batch.shape == (4, 1, 16, 16)


@pytest.mark.parametrize("kind", [{}, *({"memory_gb": 0, "workers": workers} for workers in (0, 1, 2))])
@pytest.mark.parametrize("batch_size", [3, 16])
def test_batches_depend_on_seed_and_number_alone(tmp_path, kind, batch_size):
    """Not on storage, workers, resumption or processes; and torch's own random numbers stay as they are."""
    state = torch.manual_seed(0).get_state()
    options = {"batch_size": batch_size, "seed": 5, "mirror": True}
    whole = take(training_images(numbered_images(tmp_path, 7), **options), 9)
    images = training_images(tmp_path, **options, **kind)
    for first in (0, 1, 2, 7):  # batch 7 of 3 images begins an epoch
        rest = take(images, 9 - first, first)
        assert all(torch.equal(a, b) for a, b in zip(whole[first:], rest, strict=True))
    assert len(take(images, 1, 10**12)) == 1
    for rank in range(2):
        shards = take(training_images(tmp_path, shard=slice(rank, None, 2), **options, **kind), 9)
        assert all(torch.equal(shard, batch[rank::2]) for shard, batch in zip(shards, whole, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_seeds_and_epochs_give_other_orders(tmp_path):
    numbered_images(tmp_path, 32)
    first, second = (numbers(batch) for batch in take(training_images(tmp_path, batch_size=32), 2))
    (other,) = take(training_images(tmp_path, batch_size=32, seed=1), 1)
    assert first != second
    assert first != numbers(other)
    assert first != sorted(first)


@pytest.fixture(scope="module")
def sets_of_each_size(tmp_path_factory):
    return {count: numbered_images(tmp_path_factory.mktemp("set"), count) for count in range(1, 10)}


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


def test_mirror_flips_about_half_and_the_same_ones_each_time(tmp_path):
    numbered_images(tmp_path, 10)
    images, plain = (training_images(tmp_path, batch_size=100, mirror=mirror) for mirror in (True, False))
    (first, second), (again,), (unmirrored,) = take(images, 2), take(images, 1), take(plain, 1)
    assert torch.equal(first, again)
    assert 30 <= sum(flipped(first)) <= 70
    assert sum(flipped(unmirrored)) == 0
    flip_back = torch.tensor(flipped(first))[:, None, None, None]
    assert torch.equal(torch.where(flip_back, first.flip(-1), first), unmirrored)  # the same order with and without
    assert flipped(first) != flipped(second)


@pytest.mark.parametrize("memory_gb", [0, 4])
def test_fixed_sample_is_spread_evenly_and_never_mirrored(tmp_path, memory_gb):
    images = training_images(numbered_images(tmp_path, 10), mirror=True, memory_gb=memory_gb)
    assert numbers(images.fixed_sample(5)) == [0, 2, 4, 6, 8]
    sample = images.fixed_sample(12)
    assert (sample.shape, sample.dtype) == ((12, 3, 16, 16), torch.float32)
    assert numbers(sample) == [*range(10), 0, 1]
    assert not any(flipped(sample))


def test_what_workers_read_can_be_pickled(tmp_path):
    images = training_images(numbered_images(tmp_path / "class", 3).parent, memory_gb=0)
    batch, broken = pickle.loads(pickle.dumps(images._reader))[[2, 0]]  # as workers that are not forked need it
    assert (numbers(batch.float() / 255), broken) == ([2, 0], [])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_batches_equal_the_cpu_and_never_wait(tmp_path):
    numbered_images(tmp_path, 7)
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
        pairs = zip(expected, batches, strict=True)
        assert all(torch.allclose(a, b.cpu(), rtol=1e-6, atol=0) for a, b in pairs)  # a GPU multiplies by 1 / 255
        assert torch.equal(images.fixed_sample(4).cpu(), training_images(tmp_path).fixed_sample(4))


@pytest.mark.parametrize("memory_gb", [0, 4])
def test_held_out_images_are_never_in_a_batch(tmp_path, memory_gb):
    images = training_images(numbered_images(tmp_path, 20), holdout=0.25, seed=3, memory_gb=memory_gb)
    held_out = held_out_numbers(images)
    assert (images.count, images.held_out_count, len(held_out)) == (15, 5, 5)
    seen = {number for batch in take(images, 30) for number in numbers(batch)} | set(numbers(images.fixed_sample(15)))
    assert seen == set(range(20)) - set(held_out)
    assert "5 more are held out" in images.description
    assert held_out_numbers(images, 2) == held_out[:2]
    halves = [numbers(half.float() / 255) for half in images.held_out_halves()]
    assert halves == [held_out[0::2], held_out[1::2]]
    Path(images._held_out.paths[4]).write_bytes(b"broken")  # the third of the first half is not decoded
    assert [numbers(half.float() / 255) for half in images.held_out_halves(2)] == [held_out[0:4:2], held_out[1:4:2]]


def test_names_alone_decide_what_is_held_out(tmp_path):
    here, there = (numbered_images(tmp_path / name, 20) for name in ("here", "there"))
    quarter, elsewhere, half = (
        training_images(folder, holdout=fraction, seed=seed)
        for folder, fraction, seed in ((here, 0.25, 0), (there, 0.25, 9), (here, 0.5, 0))
    )
    assert held_out_numbers(quarter) == held_out_numbers(elsewhere) == held_out_numbers(half)[:5]
    assert sorted(held_out_numbers(quarter)) != list(range(5))
    assert quarter.fingerprint == elsewhere.fingerprint
    assert len({training_images(here).fingerprint, quarter.fingerprint, half.fingerprint}) == 3


def test_copies_of_a_file_are_on_one_side(tmp_path):
    for path in list(numbered_images(tmp_path, 20).iterdir()):
        (tmp_path / f"copy{path.name}").write_bytes(path.read_bytes())
    images = training_images(tmp_path, holdout=0.25)
    held_out = held_out_numbers(images)
    assert Counter(Counter(held_out).values()) == {2: 5}
    for number in range(100):  # they would be all that is held out
        (tmp_path / f"more{number}.png").write_bytes((tmp_path / f"{held_out[0]:03}.png").read_bytes())
    assert held_out[0] not in held_out_numbers(training_images(tmp_path, holdout=0.1))
    assert not set(held_out) & {number for batch in take(images, 8) for number in numbers(batch)}


def test_another_image_held_out_is_another_fingerprint(tmp_path):
    before = training_images(numbered_images(tmp_path, 20), holdout=0.25)
    Path(before._held_out.paths[0]).rename(tmp_path / "OTHER.png")  # held out as well
    after = training_images(tmp_path, holdout=0.25)
    assert after._reader.paths == before._reader.paths
    assert after.fingerprint != before.fingerprint


def test_of_few_images_one_is_held_out_and_never_all(tmp_path):
    images = training_images(numbered_images(tmp_path, 2), holdout=0.01)
    assert (images.count, images.held_out_count) == (1, 1)
    assert training_images(tmp_path, holdout=0.9).count == 1
    (tmp_path / "001.png").unlink()
    with pytest.raises(UserError, match=r"data\.holdout=0\.9: .* holds one image only; set it to 0"):
        training_images(tmp_path, holdout=0.9)


def test_a_broken_image_that_is_held_out(tmp_path):
    first, second = held_out_numbers(training_images(numbered_images(tmp_path, 20), holdout=0.1))
    (tmp_path / f"{first:03}.png").write_bytes(b"broken")
    images = training_images(tmp_path, holdout=0.1, on_broken="skip")
    assert held_out_numbers(images) == [second]
    with pytest.raises(BrokenImageError, match=f"{first:03}.png"):
        training_images(tmp_path, holdout=0.1).held_out()
    (tmp_path / f"{second:03}.png").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"data\.holdout: none of 2 images can be read"):
        images.held_out()


@pytest.fixture
def some_broken(tmp_path):
    """Eight images in one folder; numbers 2, 3 and 7 are broken."""
    whole = (numbered_images(tmp_path / "all", 8) / "002.png").read_bytes()
    for number, content in ((2, whole[: len(whole) // 2]), (3, b""), (7, b"this is no image")):
        (tmp_path / "all" / f"{number:03}.png").write_bytes(content)
    return tmp_path


def test_memory_skip_drops_and_lists(some_broken):
    images = training_images(some_broken, on_broken="skip", batch_size=5)
    assert (images.storage, images.count, images.class_counts) == ("memory", 5, {"all": 5})
    assert [path.name for path, reason in images.skipped if reason] == ["002.png", "003.png", "007.png"]
    assert "skipped 3 broken" in images.description
    assert "003.png (the file is empty (0 bytes))" in images.description
    assert sorted(numbers(take(images, 1)[0])) == [0, 1, 4, 5, 6]
    with pytest.raises(BrokenImageError, match=r"002\.png"):  # the first, with on_broken=error
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


def test_a_lack_of_shared_memory_is_an_error_of_the_main_process(tmp_path, monkeypatch, capfd):
    def fail(*_):
        raise RuntimeError("unable to allocate shared memory(shm)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", fail)  # workers are forked
    with pytest.raises(RuntimeError, match=r"^unable to allocate shared memory\(shm\)$"):
        take(training_images(numbered_images(tmp_path, 3), memory_gb=0, workers=1, on_broken="skip"), 1)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("memory_gb", [0, 4])
def test_nothing_but_broken_images(tmp_path, memory_gb):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(b"this is no image")
    with pytest.raises(UserError, match=r"data\.root: none of the images") as error:
        take(training_images(tmp_path, on_broken="skip", memory_gb=memory_gb), 1)
    assert str(tmp_path) in str(error.value)


def test_embedded_images():
    for file in find_images(EMOJI)[0]:
        with Image.open(file) as image:
            assert (image.format, image.size, image.mode) == ("WEBP", (128, 128), "RGB"), file
    images = training_images(EMOJI, size=128)
    assert "1,871 images in 9 class folders" in images.description
    assert "92.0 MB decoded" in images.description
    assert images.class_counts["flags"] == 256
    corners = images.fixed_sample(1871)[:, :, ::127, ::127]
    assert (corners.amin((1, 2, 3)) > 0.9).float().mean() > 0.9  # white behind; some flags reach the edge
