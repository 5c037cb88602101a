"""Loader workers over an index of a million images: memory, open files and shared memory stay where they
are."""
import multiprocessing
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets.dataset import ImageDataset, make_loader
from datasets.index import Rows, Source
from datasets.readers import Reader
from datasets.sampler import epoch_order
from datasets.transforms import Erasing, train_transform
from tests.kits.options import data_options

ENTRIES, FILES, EVERY = 1_000_000, 10, 400


class Sparse:
    """Every 400th image of an epoch's order over all entries, in batches of 50."""

    epoch = 0

    def __len__(self):
        return ENTRIES // EVERY // 50

    def __iter__(self):
        order = epoch_order(ENTRIES, 0, self.epoch)[::EVERY].tolist()
        for start in range(0, len(order), 50):
            yield [(self.epoch, index, start + i) for i, index in enumerate(order[start:start + 50])]


def reader(folder: Path) -> Reader:
    """A million entries in a thousand classes that are links to one folder of ten images."""
    rng = np.random.default_rng(0)
    (folder / "class").mkdir(parents=True)
    for number in range(FILES):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / "class" / f"{number}.jpg")
    classes = [f"class{number:03}" for number in range(1000)]
    for name in classes:
        (folder / name).symlink_to("class")
    name = np.frombuffer(b"".join(b"%d.jpg" % number for number in range(FILES)), dtype=np.uint8)
    ends = np.arange(1, ENTRIES + 1, dtype=np.int64) * 5
    labels = (np.arange(ENTRIES) // (ENTRIES // 1000)).astype(np.int32)
    empty = Rows().index(Source.of(str(folder)), "class folders", [""])
    return Reader(replace(empty, classes=classes, arrays=empty.arrays | {
        "labels": labels, "ends": ends, "blob": np.tile(name, ENTRIES // FILES)}))


def footprint(pid: int) -> tuple[int, int, int]:
    """(memory in KiB with its part of what is shared, memory that it shares with nobody, open files)."""
    rows = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    private = sum(int(rows[name].split()[0]) for name in ("Private_Clean", "Private_Dirty"))
    return int(rows["Pss"].split()[0]), private, len(os.listdir(f"/proc/{pid}/fd"))


def shared_memory() -> int:
    """KiB of shared memory that this process maps (batches on their way from the workers)."""
    text = Path("/proc/self/smaps_rollup").read_text()
    return int(next(line.split()[1] for line in text.splitlines() if line.startswith("Pss_Shmem:")))


def measure(folder: Path, answer) -> None:
    """Footprints of workers and parent after each of four passes. In a process of its own: workers forked
    from a test runner share its gigabytes, whose pages they copy one by one as the counts of references in
    them change."""
    options = data_options(num_workers=2, input_size=32, pin_mem=False)
    source = reader(folder)
    dataset = ImageDataset(source, source.labels.astype(np.int64), train_transform(options), 32, seed=0,
                             erasing=Erasing(0.25, 1))
    sampler = Sparse()
    loader, seen = make_loader(dataset, options, sampler), []
    try:
        for epoch in range(4):
            sampler.epoch = epoch
            assert sum(len(batch.images) for batch in loader) == ENTRIES // EVERY
            workers = [worker.pid for worker in loader._iterator._workers]
            seen.append(([footprint(pid) for pid in workers], len(os.listdir("/proc/self/fd")), shared_memory()))
    finally:
        loader.close()
    answer.send(seen)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux' /proc")
def test_three_passes_cost_no_memory(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe(duplex=False)
    process = spawn.Process(target=measure, args=(tmp_path / "train", there))
    process.start()
    assert here.poll(240), "no answer"
    seen = here.recv()
    process.join(30)
    # The first pass fills caches; the three after it must find everything there.
    (first, files, shared), *later = seen
    for workers, own_files, own_shared in later:
        for (whole, private, opened), (whole_now, private_now, opened_now) in zip(first, workers):
            assert whole_now < 1.02 * whole, f"{whole} KiB after one pass, {whole_now} after more"
            # Python strings for the paths would be copied by the page as they are read: 10 MB per pass.
            assert private_now < private + 1500 and opened_now <= opened
        assert own_files <= files and own_shared <= shared + 1024
