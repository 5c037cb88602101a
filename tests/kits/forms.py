"""One data set in every form: the same images, from a tree of ROOT/{train,val}/CLASS/NAME."""
import gzip
import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
from scipy.io import savemat

from datasets.index import IndexCache
from datasets.pack import pack
from datasets.readers import Reader, open_reader, source_of
from tests.kits.images import jpeg

PUBLIC = {"train": "train", "val": "validation"}  # what others call the splits
NO_CACHE = IndexCache("/dev/null/none")
Tree = dict[str, list[tuple[str, str, bytes]]]  # split → (class, name, bytes) in the order of class and name


def read(root: Path, cache: IndexCache = NO_CACHE, order: str | None = None) -> Reader:
    """The training images in the folder `root`, by default without a kept index."""
    return open_reader(source_of(str(root), "train"), cache, order)


def tar_bytes(members) -> bytes:
    """A plain tar of (name, bytes)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def write_tar(path: Path, members) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_bytes(members))


def shuffled(rows: list) -> list:
    return [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]


def tars(root: Path, tree: Tree) -> None:
    """Tars with class folders, images mixed over three of them."""
    for part, rows in tree.items():
        for number in range(3):
            write_tar(root / part / f"{number}.tar",
                      [(f"./{part}/{name}/{file}", data) for name, file, data in shuffled(rows)[number::3]])


def tar_per_class(root: Path, tree: Tree) -> None:
    for part, rows in tree.items():
        for name in {row[0] for row in rows}:
            write_tar(root / part / f"{name}.tar", [(file, data) for folder, file, data in rows if folder == name])


def meta_file(ids: dict[str, int]) -> bytes:
    """The devkit's meta.mat for these synsets and their ILSVRC2012_IDs."""
    kinds = [("ILSVRC2012_ID", object), ("WNID", object), ("words", object)]
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": np.array([(number, name, "words") for name, number in ids.items()], kinds)})
    return buffer.getvalue()


def devkit(path: Path, synsets: list[str], order: list[str]) -> None:
    """The labels of validation images whose synsets in order of name are `order`."""
    ids = {name: 2 * number + 1 for number, name in enumerate(shuffled(synsets))}
    truth = "".join(f"{ids[name]}\n" for name in order).encode()
    path.write_bytes(gzip.compress(tar_bytes((f"ILSVRC2012_devkit_t12/data/{name}", data) for name, data in (
        ("meta.mat", meta_file(ids)), ("ILSVRC2012_validation_ground_truth.txt", truth)))))


def originals(root: Path, tree: Tree) -> None:
    classes = sorted({row[0] for row in tree["train"]})
    write_tar(root / "ILSVRC2012_img_train.tar", [
        (f"{name}.tar", tar_bytes([(file, data) for folder, file, data in tree["train"] if folder == name]))
        for name in classes])
    by_name = sorted(tree["val"], key=lambda row: row[1])
    write_tar(root / "ILSVRC2012_img_val.tar", [(file, data) for _, file, data in shuffled(by_name)])
    devkit(root / "ILSVRC2012_devkit_t12.tar.gz", classes, [row[0] for row in by_name])


def webdataset(root: Path, tree: Tree, info: bool = False) -> None:
    """As timm publishes it: mixed samples, `.jpg` whatever the file was called, its name in the json."""
    classes, splits = sorted({row[0] for row in tree["train"]}), {}
    for part, rows in tree.items():
        parts = {f"imagenet1k-{PUBLIC[part]}-{number:04}.tar": shuffled(rows)[number::3] for number in range(3)}
        for file, samples in parts.items():
            write_tar(root / file, [
                (f"{Path(image).stem}.{kind}", content) for name, image, data in samples for kind, content in (
                    ("jpg", data), ("cls", str(classes.index(name)).encode()),
                    ("json", json.dumps({"label": classes.index(name), "filename": f"{name}/{image}"}).encode()))])
        splits[PUBLIC[part]] = {"name": PUBLIC[part], "num_samples": len(rows), "alt_label": "", "filenames": [*parts],
                                "shard_lengths": [*map(len, parts.values())]}
    if info:
        (root / "_info.json").write_text(json.dumps({"name": "imagenet1k", "splits": splits}))


def parquet(root: Path, tree: Tree, group: int = 7) -> None:
    """As Hugging Face has it: mixed rows in groups, the synset at the end of each name."""
    import pyarrow
    from pyarrow import parquet
    (root / "data").mkdir(parents=True)
    classes = sorted({row[0] for row in tree["train"]})
    features = {"image": {"_type": "Image"}, "label": {"names": [f"text {n}" for n in classes], "_type": "ClassLabel"}}
    for part, rows in tree.items():
        for number in range(2):
            mine = shuffled(rows)[number::2]
            images = [{"bytes": data, "path": f"{Path(file).stem}_{name}.JPEG"} for name, file, data in mine]
            table = pyarrow.table({"image": images, "label": [classes.index(name) for name, _, _ in mine]})
            table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
            parquet.write_table(table, root / "data" / f"{PUBLIC[part]}-{number:05}-of-00002.parquet", row_group_size=group)


def packed(root: Path, tree: Tree) -> None:
    """What tools.data makes of class folders."""
    source = root.with_name(f"{root.name}-source")
    folders(source, tree)
    pack(str(source), str(root), tar_bytes=100_000, resize=0, cache=NO_CACHE)
    shutil.rmtree(source)


def folders(root: Path, tree: Tree) -> None:
    for part, rows in tree.items():
        for name, file, data in rows:
            (root / part / name).mkdir(parents=True, exist_ok=True)
            (root / part / name / file).write_bytes(data)


FORMS = {"folders": folders, "tars": tars, "tar per class": tar_per_class, "originals": originals,
         "webdataset": webdataset, "webdataset with _info.json": lambda root, tree: webdataset(root, tree, True),
         "parquet": parquet, "packed": packed}


def write_all(root: Path, classes: list[str], train: int, val: int) -> dict[str, Path]:
    """So many JPEGs of `classes` in every form below `root`, in names of ImageNet's pattern: form → its folder."""
    tree = {"train": [], "val": []}
    for number in range(train):
        name = classes[number % len(classes)]
        tree["train"].append((name, f"{name}_{number * 7}.JPEG", jpeg(number, (40 + number % 9, 36))))
    for number in range(val):
        tree["val"].append((classes[number * 3 % len(classes)], f"ILSVRC2012_val_{number + 1:08}.JPEG", jpeg(10 ** 6 + number)))
    tree = {part: sorted(rows) for part, rows in tree.items()}
    for name, write in FORMS.items():
        write(root / name.replace(" ", "_"), tree)
    return {name: root / name.replace(" ", "_") for name in FORMS}
