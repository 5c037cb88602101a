"""Nothing in a checkpoint is ever run, and each kind of bad file gives one sentence within a second."""
import argparse
import gzip
import os
import pickle
import time
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from common.errors import UserError
from common.safe_load import safe_torch_load, save_safetensors
from tests.kits.errors import Hostile
from tests.kits.errors import refused as sentence

MISSING, OTHER, DAMAGED, UNSAFE = "missing_checkpoint", "not_a_checkpoint", "damaged_checkpoint", "unsafe_checkpoint"


def refused(path, code, named=""):
    """`path` is refused with `code`, soon, in one sentence with `named` and none of torch's advice in it."""
    started = time.process_time()  # the machine may be busy with other tests
    with sentence(code, named) as caught:
        safe_torch_load(path)
    assert time.process_time() - started < 1
    assert "weights_only" not in str(caught.value) and "safe_globals" not in str(caught.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_published_training_file_loads_with_its_namespace_as_a_dict(tmp_path, zipped):
    args, path = argparse.Namespace(lr=4e-3, model="hornet_tiny_7x7", opt_betas=[0.9, 0.999]), tmp_path / "c.pth"
    args.__dict__.update({"keys": 1, "get": "x", "__class__": "int", "__init__": None})
    scalars = {"best": np.float64(83.25), "n": np.int64(7), "f": np.float32(0.5), "t": np.bool_(True)}
    content = {"model": OrderedDict(w=torch.arange(6.0).view(2, 3)), "args": args, "epoch": 3, **scalars}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    loaded = safe_torch_load(path)
    assert type(loaded["args"]) is dict and (loaded["args"]["__class__"], loaded["args"]["lr"]) == ("int", 4e-3)
    assert [loaded[name] for name in scalars] == [83.25, 7, 0.5, True]
    assert [type(loaded[name]) for name in scalars] == [float, int, float, bool]
    assert torch.equal(loaded["model"]["w"], content["model"]["w"])


def rewritten(path, old, new):
    """The zip file `path` again, with other bytes in its members."""
    with zipfile.ZipFile(path) as archive:
        members = {m.filename: archive.read(m) for m in archive.infolist()}
    assert any(old in content for content in members.values())
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content.replace(old, new))
    return path


def test_numpy_scalars_written_by_numpy_1_load_too(tmp_path):
    torch.save({"best": np.float64(1.5)}, tmp_path / "c.pth")
    path = rewritten(tmp_path / "c.pth", b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert safe_torch_load(path) == {"best": 1.5}


@pytest.mark.parametrize("code, named, write", [
    (UNSAFE, "mkdir", lambda path, evil: torch.save({"args": evil}, path)),
    (UNSAFE, "mkdir", lambda path, evil: torch.save({"args": evil}, path, _use_new_zipfile_serialization=False)),
    (UNSAFE, "mkdir", lambda path, evil: torch.save({"args": argparse.Namespace(lr=evil)}, path)),
    (f"{OTHER} {UNSAFE}", "", lambda path, evil: torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(path))),
    *((f"{OTHER} {UNSAFE} {DAMAGED}", "", lambda path, evil, protocol=protocol: path.write_bytes(
        pickle.dumps(evil, protocol=protocol))) for protocol in (0, 2, 4, 5))])
def test_no_pickle_is_executed(tmp_path, code, named, write):
    path, mark = tmp_path / "evil.pth", tmp_path / "executed"
    write(path, Hostile(mark))
    refused(path, code, named)
    assert not mark.exists()


@pytest.mark.parametrize("data, code, named", [
    (b"", OTHER, "b''"), (b"hello\nworld\n", OTHER, "hello"), (b"<!DOCTYPE html><html>404</html>", OTHER, "<!DOCTYPE"),
    (b"version https://git-lfs.github.com/spec/v1\n", OTHER, "git-lfs"), (gzip.compress(b"x" * 99, mtime=0), OTHER, ""),
    (b"\x80\x02garbage" * 9, DAMAGED, ""), ((1 << 60).to_bytes(8, "little") + b"{}", OTHER, "")])
def test_bytes_that_are_no_checkpoint_are_named(tmp_path, data, code, named):
    (tmp_path / "a.pth").write_bytes(data)
    refused(tmp_path / "a.pth", code, named)
    (tmp_path / "a.safetensors").write_bytes(data)
    refused(tmp_path / "a.safetensors", DAMAGED)


def test_places_that_hold_no_checkpoint_are_named(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path, code, named in ((tmp_path / "none.pth", MISSING, "none.pth"), (tmp_path / ("x" * 300), MISSING, "..."),
                              (tmp_path / "nul\0byte", MISSING, ""), (tmp_path / "loop", MISSING, ""),
                              (tmp_path, OTHER, "folder"), (tmp_path / "pipe", OTHER, "regular file"),
                              ("/dev/zero", OTHER, "regular file")):
        refused(path, code, named)


def looped():
    """A list that holds itself."""
    content = []
    content.append(content)
    return content


@pytest.mark.parametrize("code, name, make", [
    (UNSAFE, "meta", lambda: torch.empty(3, device="meta")), (UNSAFE, "sparse", lambda: torch.eye(3).to_sparse()),
    (UNSAFE, "sparse_rows", lambda: torch.eye(3).to_sparse_csr()),
    (UNSAFE, "quantised", lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)),
    (UNSAFE, "expanded", lambda: torch.ones(1).expand(1 << 40)), (DAMAGED, "", looped)])
@pytest.mark.filterwarnings("ignore")
def test_content_that_is_not_dense_tensors_is_refused(tmp_path, code, name, make):
    torch.save({"model": [{name: make()}]}, tmp_path / "odd.pth")
    refused(tmp_path / "odd.pth", code, name)


def test_small_files_that_claim_to_be_huge_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}q\x00.")
        archive.writestr("archive/data/0", bytes(200_000_000))
    refused(tmp_path / "bomb.pth", UNSAFE)
    torch.save({"model": {"w": torch.zeros(1000)}}, tmp_path / "huge.pth")
    # 1000 = 0x3e8 as BININT2 becomes 2**31 - 1 as BININT
    refused(rewritten(tmp_path / "huge.pth", b"M\xe8\x03", b"J\xff\xff\xff\x7f"), DAMAGED)


def test_every_truncation_and_bit_flip_is_seen(tmp_path):
    path, bad = tmp_path / "c.pth", tmp_path / "bad.pth"
    torch.save({"model": {f"w{i}": torch.randn(40, 25) for i in range(4)}}, path)
    data, rng = path.read_bytes(), np.random.default_rng(0)
    want = safe_torch_load(path)["model"]
    for length in rng.integers(0, len(data), 40):
        bad.write_bytes(data[:length])
        refused(bad, f"{DAMAGED} {OTHER} {UNSAFE}")
    harmless = 0
    for bit in rng.integers(0, 8 * len(data), 200):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << (bit % 8)
        bad.write_bytes(flipped)
        try:
            got = safe_torch_load(bad)["model"]
        except UserError:
            continue
        harmless += 1  # flips in padding or in zip fields nobody reads: the content must then be correct
        assert all(torch.equal(got[k], want[k]) for k in want)
    assert harmless < 30


def test_safetensors_come_back_with_their_metadata(tmp_path):
    path = tmp_path / "w.safetensors"
    tensors = {"w": torch.randn(3, 4).t(), "b": torch.ones(2, dtype=torch.bfloat16)}
    save_safetensors(path, tensors, {"classes": ["a", "é"], "input_size": 64})
    loaded = safe_torch_load(path)
    assert loaded["classes"] == ["a", "é"] and loaded["input_size"] == 64
    assert torch.equal(loaded["model"]["w"], tensors["w"]) and torch.equal(loaded["model"]["b"], tensors["b"])
    save_file({"w": tensors["b"], "b": tensors["b"].clone()}, path)
    assert set(safe_torch_load(path)) == {"w", "b"}
    path.write_bytes(path.read_bytes()[:-3])
    refused(path, DAMAGED)
