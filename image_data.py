"""Images from a folder to batches on the training device.

`open_images` is the way in: it finds the images below `data.root`, decodes them once if they fit `data.memory_gb` (else
they stream through worker processes), and returns `TrainingImages`, whose `batches()` never end. What a batch holds
depends on the seed and its number alone: not on where the images are kept, how many workers read them, or where a run
was stopped and resumed.
"""

import copy
import hashlib
import math
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

from configuration import DataConfig, ImageConfig, UserError
from image_files import (
    BrokenImageError,
    FlatImageFolder,
    absolute,
    background_colour,
    class_name,
    decode_image,
    find_images,
    names_digest,
    shown_path,
)

if TYPE_CHECKING:
    from class_folder import ClassImageFolder

    Folder = ClassImageFolder | FlatImageFolder


class TrainingImages:
    """The images of a run as endless batches; `open_images` makes it.

    Attributes:
        count: number of images. Broken ones found while loading into memory are not among them; when streaming they
            are, and the next readable image takes their place.
        class_names: names of the class folders, sorted and printable; empty for a flat folder.
        class_counts: class name -> number of its images.
        fingerprint: SHA-256 of the images' names below `data.root`, in their order, and of those held out; the same
            wherever the folder lies.
        storage: `device` (uint8 on the GPU), `memory` (uint8 in RAM) or `stream` (decoded by workers as needed).
    """

    def __init__(self, folder: "Folder", data: DataConfig, image: ImageConfig, *,
                 batch_size: int, seed: int, device: torch.device | str, progress: bool = True,
                 share: slice = slice(None)):  # fmt: skip
        folder, self._held_out = split_off(folder, data.holdout)
        self.held_out_count = len(self._held_out)
        self.share = share
        self.batch_size, self.seed, self.device = batch_size, seed, torch.device(device)
        self._folder, self._mirror, self._workers = folder, data.mirror, data.workers
        self._items = _Items(folder, skip=data.on_broken == "skip")
        self._broken: dict[int, str] = {}  # index in the folder -> reason
        self._images: Tensor | None = None  # uint8 (count, C, H, W) unless streaming
        shape = (len(folder), image.channels, image.size, image.size)
        kept = list(range(len(folder)))
        if math.prod(shape) > data.memory_gb * 1e9:
            self.storage = "stream"
        else:
            self._images, kept = self._load(shape, progress)
            self.storage = "memory"
            # At most half of what is free, so that a large set never makes the networks run out of memory.
            if self.device.type == "cuda" and self._images.nbytes <= torch.cuda.mem_get_info(self.device)[0] / 2:
                self._images = self._images.to(self.device)
                self.storage = "device"
        numbers = [folder.samples[index][1] for index in kept]
        self.count = len(numbers)
        self._megabytes = self.count * math.prod(shape[1:]) / 1e6
        self.class_names = [shown_path(name) for name in folder.classes]  # names of folders may hold anything
        per_class = Counter(numbers)
        self.class_counts = {name: per_class[number] for number, name in enumerate(self.class_names)}
        names = [folder.samples[index][0].removeprefix(folder.root) for index in kept]
        if self.held_out_count:
            names += ["held out", *(path.removeprefix(folder.root) for path, _ in self._held_out.samples)]
        self.fingerprint = names_digest(names)

    @property
    def skipped(self) -> list[tuple[Path, str]]:
        """(path, reason) of each broken image met so far; when streaming, the list grows as they are met."""
        return [(Path(self._folder.samples[index][0]), reason) for index, reason in self._broken.items()]

    @property
    def description(self) -> str:
        """One or two lines for the log: how many images, from where, where kept, and what was skipped."""
        layout = f"in {len(self.class_names)} class folders of" if self.class_names else "as one set from"
        place = {"device": f"kept on {self.device}", "memory": "kept in memory", "stream": "streamed"}[self.storage]
        text = f"{self.count:,} images {layout} {shown_path(self._folder.root)}, {place}"
        text += f" ({self._megabytes:,.1f} MB decoded"
        text += f", {self._workers} workers)" if self.storage == "stream" else ")"
        if self.held_out_count:
            text += f"; {self.held_out_count:,} more are held out for evaluation"
        if self.skipped:
            some = ", ".join(f"{shown_path(path)} ({reason})" for path, reason in self.skipped[:3])
            text += f"\nskipped {len(self.skipped):,} broken: {some}{', ...' if len(self.skipped) > 3 else ''}"
        return text

    def batches(self, first: int = 0) -> Iterator[Tensor]:
        """Batches number `first`, `first` + 1, ... without end: float32 (B, C, H, W) in [0, 1] on the device.

        The images of all batches are one permutation of the set per epoch, one after the other; batch k takes the
        places k·B to (k + 1)·B of that row, across the borders of epochs. Starting anywhere costs one permutation.
        Of several processes each gets its `share` of every batch.

        Raises:
            BrokenImageError: when streaming with `data.on_broken=error`, once the image's batch is due.
            UserError: when streaming with `data.on_broken=skip`, if no image at all can be read.
        """
        if self._images is not None:
            for indices, coins in self._order(first):
                yield self._finish(self._images[indices], coins)
        loaded = iter(self._loader(first))
        try:
            for _, coins in self._order(first):
                yield self._finish(self._checked(*next(loaded)), coins)
        finally:  # ends its workers; left to an error's traceback, they would live on and then end slowly
            del loaded

    def fixed_sample(self, n: int) -> Tensor:
        """The same `n` images every time, spread evenly over the sorted set and never mirrored, for sample grids.

        Returns float32 (n, C, H, W) in [0, 1] on the device; with fewer images than `n`, they repeat.
        Raises BrokenImageError or UserError as `batches` does.
        """
        indices = [i * self.count // n if n <= self.count else i % self.count for i in range(n)]
        if self._images is not None:
            return self._finish(self._images[indices])
        return self._finish(self._checked(*_collate([self._items[index] for index in indices])))

    def held_out(self, limit: int | None = None) -> Tensor:
        """The pictures that are never trained on, or `limit` of them: uint8 (n, C, H, W) on the CPU, never mirrored.

        They are decoded at each call, in an order that depends on their names alone and mixes the classes. Broken ones
        are left out with `data.on_broken=skip`.

        Raises BrokenImageError with `data.on_broken=error`; UserError where none can be read.
        """
        items = _Items(self._held_out, self._items.skip)
        found: list[Tensor] = []
        for index in range(len(self._held_out) if limit is None else min(limit, len(self._held_out))):
            image, reason = items.read(index)
            if image is not None:
                found.append(image)
            elif not items.skip:
                raise BrokenImageError(self._held_out.samples[index][0], reason)
        if not found:
            raise UserError(
                f"data.holdout: none of the {len(self._held_out):,} images held out can be read; change the share"
            )
        return torch.stack(found)

    def held_out_halves(self) -> tuple[Tensor, Tensor]:
        """`held_out()` in two: pictures to fit the critic's probability to, and pictures to test it on."""
        pictures = self.held_out()
        return pictures[0::2], pictures[1::2]

    def _epoch(self, epoch: int) -> Tensor:
        """int64 (2, count): the order of the images in this epoch, and for each a coin (0 or 1): mirrored or not."""
        # A generator of its own for each epoch: nothing else shifts the order, and every epoch is equally near.
        generator = np.random.default_rng([self.seed, epoch])
        order = generator.permutation(self.count)
        return torch.from_numpy(np.stack([order, generator.integers(0, 2, self.count)]))

    def _order(self, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Indices (B,) and mirror coins (B,), both int64, of batches `first`, `first` + 1, ...; of these the share.

        They lie where the images do, and reach the GPU an epoch at a time, so that no batch waits for a copy.
        """
        epoch, start = divmod(first * self.batch_size, self.count)
        device = self.device if self.storage == "device" else torch.device("cpu")
        ahead = _to(self._epoch(epoch)[:, start:], device)
        while True:
            if (missing := self.batch_size - ahead.shape[1]) > 0:
                epochs = range(epoch + 1, epoch + 1 + math.ceil(missing / self.count))  # many if shorter than a batch
                epoch = epochs[-1]
                ahead = torch.cat([ahead, _to(torch.cat([self._epoch(number) for number in epochs], 1), device)], 1)
            yield ahead[0, : self.batch_size][self.share], ahead[1, : self.batch_size][self.share]
            ahead = ahead[:, self.batch_size :]

    def _finish(self, images: Tensor, coins: Tensor | None = None) -> Tensor:
        """uint8 anywhere to float32 in [0, 1] on the device, flipped where a coin is 1 (as uint8: fewer bytes)."""
        images = _to(images, self.device)
        if self._mirror and coins is not None:
            images = torch.where(_to(coins, self.device).bool()[:, None, None, None], images.flip(-1), images)
        return images.float().div_(255)

    def _load(self, shape: tuple[int, ...], progress: bool) -> tuple[Tensor, list[int]]:
        """Decodes every image, in threads (Pillow's decoders leave the GIL): the readable ones and their indices."""
        images = torch.empty(shape, dtype=torch.uint8)
        kept: list[int] = []
        bar = tqdm(total=shape[0], desc="decoding", unit="image", leave=False, disable=None if progress else True)
        pool = ThreadPoolExecutor(min(32, os.cpu_count() or 1))
        try:
            for index, (decoded, reason) in enumerate(pool.map(self._items.read, range(shape[0]))):
                bar.update()
                if decoded is not None:
                    images[len(kept)] = decoded
                    kept.append(index)
                else:
                    self._note([(index, reason)])
        finally:
            pool.shutdown(cancel_futures=True)  # after an error or Ctrl-C: don't decode those still queued
            bar.close()
        return self._checked(images[: len(kept)] if kept else None, []), kept

    def _loader(self, first: int) -> DataLoader:
        # The row of batches never ends, so the workers live on through all epochs. A generator of its own, because the
        # loader draws a seed for its workers, and torch's global random numbers must not depend on the storage.
        return DataLoader(
            self._items,
            batch_sampler=(indices.tolist() for indices, _ in self._order(first)),
            num_workers=self._workers,
            collate_fn=_collate,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_ignore_interrupt,
            generator=torch.Generator(),
        )

    def _checked(self, images: Tensor | None, broken: list[tuple[int, str]]) -> Tensor:
        self._note(broken)
        if images is None:
            (path, reason), root = self.skipped[0], shown_path(self._folder.root)
            raise UserError(f"data.root: none of the images in {root} can be read; {shown_path(path)}: {reason}")
        return images

    def _note(self, broken: list[tuple[int, str]]) -> None:
        for index, reason in broken:
            if not self._items.skip:
                raise BrokenImageError(self._folder.samples[index][0], reason)
            self._broken[index] = reason


def split_off(folder: "Folder", share: float) -> "tuple[Folder, Folder]":
    """The folder in two: pictures to train on, in its order, and a `share` that is held out, in the order of a hash.

    A hash of its name below the root decides on each picture: those with the smallest ones are held out, at least one
    and never all. So the choice is the same on every machine, at every resumption and for every seed.

    Raises:
        UserError: a single picture cannot be shared out.
    """
    training, held_out = copy.copy(folder), copy.copy(folder)
    held_out.samples = []
    if share == 0:
        return training, held_out
    if len(folder) < 2:
        raise UserError(f"data.holdout={share:g}: {shown_path(folder.root)} holds one image only; set it to 0")
    count = min(max(1, round(share * len(folder))), len(folder) - 1)

    def hashed(sample: tuple[str, int]) -> bytes:
        name = Path(sample[0].removeprefix(folder.root)).as_posix()
        return hashlib.sha256(name.encode(errors="surrogateescape")).digest()

    by_hash = sorted(folder.samples, key=hashed)
    kept = set(by_hash[count:])
    training.samples = [sample for sample in folder.samples if sample in kept]
    held_out.samples = by_hash[:count]
    return training, held_out


class _Items(Dataset):
    """What a worker reads. Broken images come back as data: an exception would reach the user with a traceback."""

    def __init__(self, folder: "Folder", skip: bool):
        self.folder, self.skip = folder, skip

    def read(self, index: int) -> tuple[Tensor | None, str]:
        """The image, uint8 (C, H, W), or None and the reason."""
        try:
            return self.folder[index][0], ""
        except BrokenImageError as error:
            return None, error.reason

    def __getitem__(self, index: int) -> tuple[Tensor | None, list[tuple[int, str]]]:
        """The image (when skipping: or the next readable one), and (index, reason) of the broken ones met."""
        broken: list[tuple[int, str]] = []
        for step in range(len(self.folder) if self.skip else 1):
            place = (index + step) % len(self.folder)
            image, reason = self.read(place)
            if image is not None:
                return image, broken
            broken.append((place, reason))
        return None, broken


def _collate(items: list[tuple[Tensor | None, list[tuple[int, str]]]]) -> tuple[Tensor | None, list[tuple[int, str]]]:
    images = [image for image, _ in items]
    broken = [entry for _, entries in items for entry in entries]
    return None if any(image is None for image in images) else default_collate(images), broken


def _ignore_interrupt(_worker: int) -> None:
    # Ctrl-C reaches the whole process group; the main process decides when to stop, and needs its workers until then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    """To the device without waiting for it: only copies from pinned memory run beside the host."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def open_folder(root: str | Path, loader: Callable[[str], Tensor]) -> "Folder":
    """The dataset that suits the folder: by class if no image lies loose at the top, else flat.

    Images both at the top and in folders make one flat set. `ImageFolder` would drop the loose ones in silence, and
    refusing would help nobody: training doesn't need the classes, and the run's log says that the set is one.
    """
    files = find_images(root)
    if not all(class_name(str(absolute(root)), file) for file in files):
        return FlatImageFolder(root, files, loader)
    from class_folder import ClassImageFolder  # here: torchvision takes a second or two to load

    return ClassImageFolder(root, files, loader)


def open_images(data: DataConfig, image: ImageConfig, *, batch_size: int, seed: int, device: torch.device | str,
                progress: bool = True, share: slice = slice(None)) -> TrainingImages:  # fmt: skip
    """Finds the images below `data.root` and makes them ready: batches of `batch_size` on `device`, in `seed`'s order.

    `progress` shows a bar while decoding, if standard error is a terminal. `share` are the places of each batch that
    this process takes, where several share the batches.

    Raises:
        UserError: `data.root` is missing or holds no readable image, or `data.background` is no colour.
        BrokenImageError: with `data.on_broken=error`, the first broken image (when streaming, `batches` raises it).
    """
    background_colour(data.background)  # before anything slow
    loader = partial(decode_image, size=image.size, channels=image.channels, fit=data.fit, background=data.background)
    folder = open_folder(data.root, loader)
    return TrainingImages(folder, data, image, batch_size=batch_size, seed=seed, device=device, progress=progress,
                          share=share)  # fmt: skip
