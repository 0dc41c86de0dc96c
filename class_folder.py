"""A folder of class folders, as torchvision reads it: a module of its own, since torchvision takes a second to load."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor
from torchvision.datasets import ImageFolder

from image_files import absolute, class_name, is_image_file


class ClassImageFolder(ImageFolder):
    """torchvision's `ImageFolder` over `files`: its own search enters hidden folders and loops of links.

    Items are `(loader(path), class number)`.
    """

    def __init__(self, root: str | Path, files: list[str], loader: Callable[[str], Tensor]):
        self._files = files
        super().__init__(str(absolute(root)), loader=loader, is_valid_file=is_image_file)

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        classes = sorted({class_name(directory, file) for file in self._files})
        return classes, {name: number for number, name in enumerate(classes)}

    def make_dataset(self, directory, class_to_idx, extensions=None, is_valid_file=None, allow_empty=False):
        return [(file, class_to_idx[class_name(directory, file)]) for file in self._files]
