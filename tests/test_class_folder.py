"""Which images a folder holds, and of which class: any layout, depth, name and link; and what is no such folder."""

import os
from pathlib import Path

import pytest
from made_images import numbered, save, training_images

from configuration import DataConfig, ImageConfig, UserError
from image_data import open_folder, open_images
from image_files import IMAGE_EXTENSIONS, BrokenImageError, FlatImageFolder, find_images, is_image_file


def test_class_folders_at_any_depth_and_any_case(tmp_path):
    for name in ("cats/a.PNG", "cats/deep/er/b.JpG", "dogs/c.Tiff", "dogs/readme.txt", "empty/notes.md"):
        save(tmp_path / name) if is_image_file(name) else (tmp_path / name).parent.mkdir(exist_ok=True)
    folder = open_folder(tmp_path, loader=str)
    assert folder.classes == ["cats", "dogs"]
    assert [(Path(path).name, number) for path, number in folder] == [("a.PNG", 0), ("b.JpG", 0), ("c.Tiff", 1)]
    images = training_images(tmp_path)
    assert (images.count, images.class_names) == (3, ["cats", "dogs"])
    assert images.class_counts == {"cats": 2, "dogs": 1}
    assert "3 images in 2 class folders" in images.description


def test_flat_folder(tmp_path):
    numbered(tmp_path, 3)
    folder = open_folder(tmp_path, loader=lambda path: Path(path).name)
    assert isinstance(folder, FlatImageFolder)
    assert list(folder) == [("000.png", 0), ("001.png", 0), ("002.png", 0)]
    images = training_images(tmp_path)
    assert (images.count, images.class_names, images.class_counts) == (3, [], {})


def test_loose_images_beside_class_folders_are_all_kept(tmp_path):
    numbered(tmp_path, 2)
    save(tmp_path / "cats" / "a.png")
    images = training_images(tmp_path)
    assert (images.count, images.class_names) == (3, [])
    assert "as one set" in images.description


@pytest.mark.parametrize("extension", IMAGE_EXTENSIONS)
def test_every_extension_counts(tmp_path, extension):
    for name in ("a" + extension, "b" + extension.upper(), "c" + extension + ".txt"):
        (tmp_path / name).touch()
    assert [Path(path).stem for path in find_images(tmp_path)] == ["a", "b"]


def test_hidden_files_and_folders_are_skipped(tmp_path):
    for name in ("cats/a.png", "cats/._a.png", ".cache/b.png", "cats/.thumbs/c.png"):
        save(tmp_path / name)
    assert find_images(tmp_path) == [str(tmp_path / "cats" / "a.png")]


@pytest.mark.parametrize("name", ["with space.png", "line\nbreak.png", "\U0001f600.png", "ünïcödé.png", "-dash.png"])
def test_odd_names(tmp_path, name):
    save(tmp_path / name)
    assert training_images(tmp_path).count == 1
    (tmp_path / name).write_bytes(b"damaged")
    with pytest.raises(BrokenImageError) as error:
        training_images(tmp_path)
    assert str(error.value).isprintable()  # one line
    assert name.split("\n")[0] in str(error.value)


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_links_are_followed_once_and_loops_end(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    save(root / "cats" / "a.png")
    save(root / "dogs" / "b.png")
    save(outside / "c.png")
    for number in range(12):  # each loop multiplies the paths: followed blindly they would never end
        (root / "cats" / f"loop{number}").symlink_to(root)
    (root / "aliases").symlink_to(root / "dogs")  # sorted before dogs, and yet dogs keeps its image
    (root / "birds").symlink_to(outside)
    (root / "self").symlink_to(root / "self")
    folder = open_folder(root, loader=lambda path: os.path.relpath(path, root))
    assert [path for path, _ in folder] == ["birds/c.png", "cats/a.png", "dogs/b.png"]


def test_missing_file_and_empty_folders_have_one_clear_line(tmp_path, monkeypatch):
    (tmp_path / "file.txt").write_text("x")
    (tmp_path / "empty" / "deeper").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for root, words in (("missing", "does not exist"), ("file.txt", "is not a folder"), ("empty", "holds no images")):
        with pytest.raises(UserError, match=words) as error:
            training_images(Path(root))
        message = str(error.value)
        assert message.startswith(f"data.root: {tmp_path / root} ")
        assert "jpg, jpeg, png, webp, bmp, gif, tif, tiff" in message
        assert "\n" not in message
    for root in ("", "  "):
        with pytest.raises(UserError, match=r"data\.root is empty"):
            open_images(DataConfig(root=root), ImageConfig(), batch_size=1, seed=0, device="cpu")
    with pytest.raises(UserError, match="does not exist"):
        training_images(Path("nul\0byte"))


def test_home_folder_is_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    save(tmp_path / "pictures" / "a.png")
    assert training_images(Path("~/pictures")).count == 1


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file_and_folder(tmp_path):
    save(tmp_path / "cats" / "a.png").chmod(0)
    with pytest.raises(BrokenImageError, match="Permission denied"):
        training_images(tmp_path)
    (tmp_path / "cats").chmod(0)
    with pytest.raises(UserError, match="cannot be read: Permission denied"):
        training_images(tmp_path)
    (tmp_path / "cats").chmod(0o700)
