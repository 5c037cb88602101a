"""An index of a million images loads fast, and costs a worker no memory: it is mapped and shared."""
import os
import time
from pathlib import Path

import numpy as np
import pytest

from datasets.dataset import ImageDataset, make_loader
from datasets.index import IndexCache, Rows, Source
from datasets.sampler import GlobalBatchSampler
from datasets.tars import members
from datasets.transforms import Erasing, train_transform
from tests.kits.forms import read, write_tar
from tests.kits.images import jpeg
from tests.kits.options import data_options
from tests.kits.processes import Child, environment

COUNT = 1_280_000
pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux' /proc")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """data/ with a tar of ten images, and cache/ with an index in which they are 1.28 million."""
    folder = tmp_path_factory.mktemp("million")
    write_tar(folder / "data" / "0.tar", [(f"{number}.jpg", jpeg(number, (32, 32))) for number in range(10)])
    os.utime(folder / "data", (time.time() - 3600,) * 2)
    found, rows, source = [member for _, member in members(str(folder / "data" / "0.tar"))], Rows(), Source.of(str(folder / "data"))
    for number in range(COUNT):
        place = found[number % 10]
        rows.add(f"class{number // 1280:03}", f"n01440764_{number}.JPEG", 0, place.offset_data, place.size)
    (folder / "cache").mkdir()
    rows.index(source, "tar files", ["0.tar", ""]).write(IndexCache(str(folder / "cache")).path("tars", source))
    return folder


def footprint(pid: int | str = "self") -> dict[str, int]:
    """KiB that a process shares with nobody, and of shared memory (batches on their way); its open files."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    rows = {name: int(rest.split()[0]) for name, rest in (line.split(":", 1) for line in lines)}
    return {"private": rows["Private_Clean"] + rows["Private_Dirty"], "shared memory": rows["Pss_Shmem"],
            "files": len(os.listdir(f"/proc/{pid}/fd"))}


def private(work) -> int:
    """KiB that a forked process shares with nobody after `work()`."""
    here, there = os.pipe()
    if not os.fork():
        try:
            work()
            os.write(there, b"%d" % footprint()["private"])
        finally:
            os._exit(0)
    os.wait()
    return int(os.read(here, 20))


def test_an_index_of_a_million_images_loads_fast_and_small_and_is_shared(folder):
    started = time.perf_counter()
    reader = read(folder / "data", IndexCache(str(folder / "cache")))
    assert time.perf_counter() - started < 2 and len(reader) == COUNT
    assert sum(values.nbytes for values in reader.index.arrays.values()) < 72e6
    assert private(lambda: [None for i in range(0, COUNT, 50) if not reader.name(i)]) < private(lambda: None) + 2000


def passes(folder) -> int:
    """Four passes over parts of an epoch: the first fills caches, and the others must find everything there."""
    options, reader = data_options(num_workers=2, input_size=32, pin_mem=False), read(folder / "data", IndexCache(str(folder / "cache")))
    dataset = ImageDataset(reader, reader.labels.astype(np.int64), train_transform(options), 32, erasing=Erasing(0.25, 1))
    batches, seen = [], []
    loader = make_loader(dataset, options, batches)
    for epoch in range(4):
        order = GlobalBatchSampler(COUNT, 1, 1, 1).order(epoch)[::512]
        batches[:] = [[(epoch, index, 0) for index in part.tolist()] for part in np.split(order, 50)]
        assert sum(len(batch.images) for batch in loader) == len(order)
        seen.append([footprint(), *(footprint(worker.pid) for worker in loader._iterator._workers)])
    (first, *workers), *later = seen
    for own, *workers_now in later:
        assert own["files"] <= first["files"] and own["shared memory"] <= first["shared memory"] + 1024, seen
        for now, before in zip(workers_now, workers, strict=True):
            # Python strings for the paths would be copied by the page as they are read: 10 MB per pass.
            assert now["private"] < before["private"] + 1500 and now["files"] <= before["files"], seen
    return 0


@pytest.mark.slow
def test_three_passes_cost_no_memory(folder):
    """In a process of its own: workers forked from a test runner share its gigabytes, whose pages they copy one by
    one as the counts of references in them change."""
    child = Child(passes, (folder,), environment())
    assert child.end(240) == 0, child.text()
