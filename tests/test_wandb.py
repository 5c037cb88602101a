"""What Weights & Biases is given, recorded by a module of that name."""
import sys
import types

import main
from tests.kits.runs import arguments, write_images


class Recorder(types.ModuleType):
    """Stands for the package, which the tests do not install."""

    def __init__(self):
        super().__init__("wandb")
        self.calls: list[tuple] = []

    def init(self, **settings):
        self.calls.append(("init", settings["project"], settings["name"]))
        return self

    def log(self, numbers, step):
        self.calls.append(("log", step, sorted(numbers)))

    def log_artifact(self, path, type):
        self.calls.append(("artifact", path.rsplit("/")[-1], type))

    def finish(self):
        self.calls.append(("finish",))


def test_figures_and_at_the_end_the_best_and_the_last_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", recorder := Recorder())
    argv = arguments(write_images(tmp_path / "pictures"), tmp_path / "run", epochs=1, enable_wandb="true",
                     wandb_ckpt="true", exp_name="first")
    assert main.main(argv) == 0
    calls = recorder.calls
    assert calls[0] == ("init", "hornet", "first") and calls[-1] == ("finish",)
    assert any("epoch/test_acc1" in call[2] for call in calls if call[0] == "log")
    assert [call[1] for call in calls if call[0] == "artifact"] == [
        "checkpoint-best.pth", "checkpoint-best-ema.pth", "checkpoint-0.pth"]
