"""tools.zoo: list and get; hub is tested with models/hub.py."""
import shutil
from dataclasses import replace

import torch

from common.files import sha256_file
from models import zoo
from tests.kits.trained import lively
from tools.zoo import main


def test_list_shows_every_published_model_and_where_files_are(tmp_path, capsys):
    (tmp_path / zoo.PUBLISHED["hornet_tiny_gf"].files[0].name).write_bytes(b"")
    assert main(["--folder", str(tmp_path), "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[2:-1]] == list(zoo.VARIANTS)
    assert "82.98" in lines[3] and " yes " in lines[3] and " yes " not in lines[2]
    assert "22,409,512" in lines[2] and "none published" in lines[8]


def test_get_prints_the_path_of_a_checked_file_or_one_sentence_with_where_to_put_it(tmp_path, monkeypatch, capfd):
    """What a server does is in tests/unit/models/test_download.py; here none listens."""
    monkeypatch.setattr("models.download._PAUSE", 0.0)
    torch.save({"model": lively().state_dict()}, tmp_path / "weights")
    path, get = tmp_path / "published.pth", ["--folder", str(tmp_path), "get", "hornet_tiny_7x7"]
    file = zoo.PublishedFile(path.name, "https://127.0.0.1:9/x.pth", sha256_file(tmp_path / "weights")[:8])
    monkeypatch.setitem(zoo.VARIANTS, "hornet_tiny_7x7", replace(zoo.VARIANTS["hornet_tiny_7x7"], files=(file,)))
    for argv, named in ((get, path.name), (["get", "hornet_pico_gf"], "pico_gf"), (["hub", "gone", "--out", "x"], "gone")):
        assert main(argv) == 2 and named in capfd.readouterr().err.splitlines()[-1]
    shutil.copy(tmp_path / "weights", path)
    assert main(get) == 0 and capfd.readouterr().out.strip() == str(path)
