"""Class folders: complete, sorted as text, and what is no image is counted."""
import os

from datasets.index import IndexCache, Source
from datasets.readers import open_reader
from tests.kits.errors import refused


def listed(root):
    reader = open_reader(Source.of(str(root)), IndexCache("/dev/null/none"))
    return reader, [os.path.relpath(reader.name(i), root) for i in range(len(reader))]


def make(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_images_are_listed_by_class_in_text_order(tmp_path):
    make(tmp_path, "b/2.JPEG", "b/10.jpg", "b/sub/x.png", "a/1.webp", ".git/z.jpg", "a/.hidden/y.jpg")
    reader, names = listed(tmp_path)
    assert reader.classes == ["a", "b"] and reader.labels.tolist() == [0, 1, 1, 1] and not reader.left_out
    assert names == ["a/1.webp", "b/10.jpg", "b/2.JPEG", "b/sub/x.png"]


def test_hidden_files_are_no_images_and_every_other_file_is_an_image_or_counted(tmp_path):
    make(tmp_path, "a/._1.jpg", "a/1.gif", "a/2.jfif", "a/3.TIF", "a/4.avif", "a/5.jp2", "a/notes.txt", "a/b/Makefile",
         "a/6.svg", "a/7.svg", "loose.jpg")
    reader, names = listed(tmp_path)
    assert names == ["a/1.gif", "a/2.jfif", "a/3.TIF", "a/4.avif", "a/5.jp2"]
    assert reader.left_out == {".jpg beside the class folders": 1, ".txt": 1, ".svg": 2, "without an ending": 1}


def test_loops_of_links_end_and_links_to_folders_are_followed(tmp_path):
    root = tmp_path / "data"
    make(root, "a/1.webp", "b/1.jpg")
    (root / "a" / "up").symlink_to(root)
    (root / "b" / "here").symlink_to(".")
    (root / "loop").symlink_to("loop")
    (root / "linked").symlink_to(root / "a")
    reader, names = listed(root)
    assert reader.classes == ["a", "b", "linked"] and "linked/1.webp" in names and len(names) < 40


def test_a_class_folder_that_one_may_not_read_is_one_sentence(tmp_path, monkeypatch):
    make(tmp_path, "a/1.jpg")
    scandir = os.scandir

    def denied(path):
        if str(path).endswith("/a"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)
    monkeypatch.setattr(os, "scandir", denied)
    with refused("unreadable_data", f"{tmp_path}/a"):
        listed(tmp_path)
