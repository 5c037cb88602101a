"""Training, evaluating and using segmentors and detectors on drawn scenes."""
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from common.random import key
from config.parse import parse
from datasets.sample import ensure_sample
from dense import coco, coco_images, detection, export, predict, scenes, segmentation, segmentation_task
from dense.coco_images import DetectionBatch, OrientedSampler
from dense.data import UpdateSampler
from dense.detector_losses import rpn_losses
from dense.evaluation import DETECTOR, SEGMENTOR, Subject, Trained, verdict
from dense.task import went_through
from launch import run_with_submitit
from launch.process import Process
from models.export import onnx_function
from report.page import read_run
from tests.kits.dense import DENSE, filled
from tests.kits.errors import refused
from tests.kits.processes import codes, in_processes
from tests.kits.runs import assert_equal_bits, result, start
from tests.slurm.conftest import cluster  # noqa: F401  a fixture

CPU = torch.device("cpu")
KINDS = {"segmentation": SEGMENTOR, "detection": DETECTOR}
RUN = {"segmentation": segmentation.run, "detection": detection.run}
IMAGES = {"segmentation": (20, 7), "detection": (14, 5)}
COMMON = {"model": "hornet_pico_gf", "head_width": 8, "device": "cpu", "batch_size": 2, "global_batch": 6,
          "warmup_steps": 2, "drop_path": 0.3, "layer_scale_init_value": 0.5, "num_workers": 0, "seed": 3}
OWN = {"segmentation": {"image_scale": "64 48", "crop_size": 48, "updates": 8, "check_every": 4, "lr": 0.01,
                        "clip_grad": 1},
       "detection": {"train_set": "training", "val_set": "validation", "train_sides": "64 80 96",
                     "test_side": 64, "longest_side": 120, "crops": "false", "epochs": 2, "milestones": 1,
                     "lr": 0.002, "roi_samples": 16}}
both = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """segmentation/ and detection/: a few drawn scenes in ADE20K's and in COCO's layout."""
    path = tmp_path_factory.mktemp("scenes")
    with pytest.MonkeyPatch.context() as patch:
        for kind, module, write, markers in (
                ("segmentation", scenes, scenes.write_segmentation, ("images", "annotations")),
                ("detection", coco, coco.write_scenes, ("annotations",))):
            patch.setattr(module, "COUNTS", dict(zip(("training", "validation"), IMAGES[kind])))
            ensure_sample(path / kind, write, markers)
    return path


def argv(kind, root, output=None, **changes):
    values = COMMON | OWN[kind] | {"data_path": root / kind, "output_dir": output}
    values |= {"classes": root / kind / "classes.txt"} if kind == "segmentation" else {}
    return [word for name, value in (values | changes).items() if value is not None
            for word in (f"--{name}", *str(value).split())]


def options(kind, root, **changes):
    return parse(argv(kind, root, **changes), KINDS[kind].options).options


def data(kind, root, train=True, evaluate=False, **changes):
    return KINDS[kind].find_data(options(kind, root, **changes), None, train=train, evaluate=evaluate)


def content(batch):
    """What each image of a batch of training brings, without its padding."""
    if not isinstance(batch, DetectionBatch):
        return list(zip(batch.images, batch.targets, batch.indices, batch.boxes))
    return [[image[:truth.size[0], :truth.size[1]], truth.boxes, truth.labels, truth.masks,
             torch.tensor([*truth.size, *truth.key])]
            for image, truth in zip(batch.images, batch.truths(3, 7, CPU))]


@both
def test_any_number_of_processes_sees_the_same_images(kind, root):
    train = data(kind, root).train
    seen = {}
    for world in (1, 2, 3):
        seen[world] = {}
        for rank in range(world):
            split = 6, 6 // world, 1, rank, world, 3
            sampler = (UpdateSampler(len(train), *split, updates=4) if kind == "segmentation"
                       else OrientedSampler(np.arange(len(train)) % 3 == 0, *split))
            sampler.set_start(1, 1)
            for number, items in enumerate(sampler):
                batch = train.__getitems__(items)
                seen[world] |= {(number, position): row
                                for position, row in zip(batch.positions.tolist(), content(batch))}
    assert len(seen[1]) == (18 if kind == "segmentation" else 6)
    for world in (2, 3):
        assert seen[world].keys() == seen[1].keys()
        assert all(torch.equal(one, other) for place, row in seen[1].items()
                   for one, other in zip(row, seen[world][place]))


def test_passes_leave_no_image_out():
    sampler = UpdateSampler(20, 6, 6, 1, 0, 1, 3, updates=10)
    indices = [index for items in sampler for _, index, _ in items]
    first, second = indices[:20], indices[20:40]
    assert sorted(first) == sorted(second) == list(range(20)) and first != second


def test_neighbours_have_one_orientation():
    landscape = np.random.default_rng(0).random(21) < 0.4
    sampler = OrientedSampler(landscape, 2, 2, 1, 0, 1, 3)
    order = sampler.order(4)
    assert sorted(order) == list(range(21)) and (order != sampler.order(5)).any()
    pairs = landscape[order[:18]].reshape(-1, 2)
    assert (pairs[:, 0] == pairs[:, 1]).all() and pairs.any() and not pairs.all()


def test_which_anchors_learn_does_not_depend_on_the_images_beside_one(root):
    """The losses of an image for itself, and padded to the size of a wider one."""
    values = options("detection", root, system="mask_rcnn", drop_path=0)
    model, batch = filled(DETECTOR.build(values, 5)), data("detection", root).train.__getitems__([(0, 1, 0)])
    sampled = []
    for wide in (0, 64):
        with torch.no_grad():
            maps = model.neck(model.backbone(F.pad(batch.network_input(CPU), (0, wide))))
            constant = [[value * 0 + one for value in part] for part, one in zip(model.rpn_head(maps), (1, 0))]
        sampled.append(rpn_losses(model.rules, *constant, batch.truths(3, 7, CPU)))
    assert all(torch.equal(sampled[0][name], sampled[1][name]) for name in sampled[0])


@both
def test_unreadable_images_are_replaced_as_in_classification(kind, root, tmp_path):
    """Three in a row of the training; one of the evaluation counts without a prediction."""
    shutil.copytree(root, tmp_path / "data")
    count = IMAGES[kind][0]
    bad = [1, *(key(3, "replace", 1, 1, attempt) % count for attempt in (0, 1))]
    folder = tmp_path / "data" / kind / ("images" if kind == "segmentation" else "")
    for name in ["validation/0001.png", *(f"training/{index:04d}.png" for index in bad)]:
        (folder / name).write_bytes(b"no image")
    found = data(kind, tmp_path / "data", evaluate=True)
    batch = found.train.__getitems__([(1, 1, 0)])
    assert len(set(bad)) == 3 and [index for index, _ in batch.unreadable][:3] == bad
    assert batch.indices.tolist() == [1] and batch.images.float().std() > 0
    whole = found.val.__getitems__([1])
    assert whole.unreadable[0][0] == 1
    if kind == "segmentation":
        assert whole.images == [] and whole.targets.shape == (1, *scenes.SIZE)
    else:
        assert whole.targets.tolist() == [-100] and whole.counts.tolist() == [0]


@pytest.mark.parametrize("pattern, content, code, named", [
    ("annotations/training/*.png", np.ones((12, 10), np.uint8), "unreadable_image", "10x12"),
    ("annotations/training/*.png", np.full(scenes.SIZE, 77, np.uint8), "unreadable_image", "label 77"),
    ("annotations/training/*.png", np.ones((*scenes.SIZE, 3), np.uint8), "unreadable_image", "mode RGB"),
    ("annotations/training/0003.png", None, "missing_data", "0003.png"),
    ("images/training/*.png", None, "missing_data", "no images"),
    ("images/training", None, "missing_data", "training"),
    ("classes.txt", "only", "unexpected_classes", "--classes"),
    ("classes.txt", None, "missing_data", "--classes")], ids=lambda value: value if isinstance(value, str) else "")
def test_bad_label_maps_are_one_sentence(root, tmp_path, pattern, content, code, named):
    shutil.copytree(root, tmp_path / "data")
    for path in (tmp_path / "data" / "segmentation").glob(pattern):
        if content is None:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        elif isinstance(content, str):
            path.write_text(content)
        else:
            Image.fromarray(content).save(path)
    with refused(code, named):
        data("segmentation", tmp_path / "data")


@pytest.mark.parametrize("kind, changes, named", [
    ("segmentation", dict(updates=7), "--check_every"), ("segmentation", dict(head="uper"), "--head"),
    ("segmentation", dict(mixup=0.8), "--mixup"), ("segmentation", dict(crop_size=8), "--crop_size"),
    ("segmentation", dict(batch_size=1, global_batch=1), "--batch_size"),
    ("segmentation", dict(data_path=None), "annotations/"),
    ("segmentation", dict(dry_run="true", eval="true", resume="x"), "--eval"),
    ("detection", dict(system="ssd"), "--system"), ("detection", dict(train_sides=8), "--train_sides"),
    ("detection", dict(train_set="train2017"), "instances_train2017.json")])
def test_mistakes_in_options_are_one_sentence(kind, root, capsys, caplog, changes, named):
    with caplog.at_level("ERROR", "hornet"):
        assert RUN[kind](argv(kind, root, **changes)) == 2
    text = caplog.text + capsys.readouterr().err
    assert named in text and "Traceback" not in text


@both
def test_a_dry_run(kind, root, capfd):
    assert RUN[kind](argv(kind, root, dry_run="true")) == 0
    text = "".join(capfd.readouterr())
    there = ("6 classes", "4 updates") if kind == "segmentation" else ("5 classes", "2 updates")
    assert all(words in text for words in there) and "Traceback" not in text


@pytest.fixture(scope="module")
def runs(root, tmp_path_factory):
    """Runs in half precision whose input of update 1 is infinite: folder, and the buffers before each update."""
    found = {}
    for name, kind, module, changes in (
            ("segmentation", "segmentation", segmentation_task, {}), ("detection", "detection", coco_images, {}),
            ("mask_rcnn", "detection", coco_images, {"system": "mask_rcnn"})):
        found[name] = folder, buffers = tmp_path_factory.mktemp(name), {}
        losses, normalised, now = KINDS[kind].task.losses, module.normalised, [-1]

        def noted(self, model, batch, update):
            now[0] = update
            buffers.setdefault(update, [buffer.clone() for buffer in model.buffers()])
            value = losses(self, model, batch, update)
            now[0] = -1
            return value

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(KINDS[kind].task, "losses", noted)
            patch.setattr(module, "normalised",
                          lambda *args: normalised(*args) + (math.inf if now[0] == 1 else 0))
            assert RUN[kind](argv(kind, root, folder, use_amp="true", **changes)) == 0
    return found


@pytest.mark.parametrize("name, normalises", [("segmentation", True), ("detection", True), ("mask_rcnn", False)])
def test_an_infinite_input_skips_its_update_and_the_statistics(name, normalises, runs):
    """And the rest of the run is as ever: figures, pictures, report."""
    (run, buffers), images = runs[name], IMAGES.get(name, IMAGES["detection"])[1]
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    skipped, = (event for event in events if event["kind"] == "nonfinite")
    assert (skipped["update"], skipped["action"]) == (1, "skip")
    assert skipped["first_module"].startswith("backbone.")
    assert len(skipped["images"]) == 6 and all(Path(path).is_file() for path in skipped["images"])
    kept = [all(map(torch.equal, buffers[update], buffers[update + 1])) for update in range(3)]
    assert kept == ([False, True, False] if normalises else [True] * 3)
    lines = [json.loads(line) for line in (run / "log.txt").read_text().splitlines()]
    assert len(lines) == 2 and all(math.isfinite(line["train_loss"]) for line in lines)
    assert len(list((run / "samples").glob("*.jpg"))) == images
    assert (run / "report.html").read_text().count("data:image/jpeg") == images
    read = read_run(run)
    assert read.config["data_set"] == "files" and not any(theirs for _, theirs in read.origins.values())


@pytest.mark.slow
@pytest.mark.parametrize("kind, update, end, changes", [
    ("segmentation", 6, 8, {"ms_flip": "true", "image_scale": "128 96"}), ("detection", 5, 6, {"global_batch": 4})])
def test_a_killed_run_resumes_with_equal_bits_and_any_ranks_evaluate_alike(
        kind, update, end, changes, root, tmp_path):
    """Killed in mid-epoch, stopped in the evaluation at the end."""
    run = tmp_path / "run"

    def ends(name, world=1, at=(), **more):
        call = argv(kind, root, run, **changes, **more)
        return codes(start(call, tmp_path / name, world, program=f"dense.{kind}", at=[*at]), 280)

    assert ends("whole") == [0]
    run.rename(tmp_path / "whole-run")
    kill = {"phase": "data", "update": update, "do": "SIGKILL"}
    assert ends("killed", at=[kill], save_every_minutes=1e-5) == [-9]
    assert list(run.glob("checkpoint-e1u*.pth"))
    stop = {"phase": "evaluation", "update": end, "do": "SIGTERM"}
    assert ends("stopped", at=[stop]) == [75]
    assert ends("resumed") == [0]
    assert_equal_bits(result(run), result(tmp_path / "whole-run"))
    state = torch.load(run / "checkpoint-1.pth", weights_only=True)["model"]
    moved = [value for name, value in state.items() if name.endswith("running_var")]
    assert moved and not any(torch.equal(value, torch.ones_like(value)) for value in moved)
    found = []
    for world in (1, 2, 3):
        assert ends(f"eval{world}", world, eval="true") == [0] * world
        found.append(json.loads((run / "eval.json").read_text()))
    assert found[0] == found[1] == found[2] and found[0]["images"] == IMAGES[kind][1]


@pytest.mark.slurm
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_slurm_job_of_two_processes_trains_a_segmentor(cluster, root, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    call = argv("segmentation", root, tmp_path / "run", batch_size=3)
    assert run_with_submitit.main([
        "--module", "dense.segmentation", "--nodes", "2", "--ngpus", "1", "--timeout", "1",
        "--cpus_per_task", "1", "--job_dir", "jobs/%j", *call]) == 0
    job = next(tmp_path.glob("jobs/*/job.json")).parent.name
    assert cluster.wait(job) == "COMPLETED", (tmp_path / "jobs" / job / f"{job}_0_log.err").read_text()
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.txt").read_text().splitlines()]
    assert segmentation.run([*call, "--eval", "true"]) == 0
    found = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert found["miou"] == max(line["test_miou"] for line in lines)


def statistics(process):
    """What BatchNorm has on this rank once an evaluation began, where each rank brought its own."""
    network = torch.nn.BatchNorm2d(3)
    network.running_mean += process.rank + 1
    went_through([network], [], process, lambda: False, print)
    return network.running_mean


def test_all_ranks_evaluate_with_the_statistics_of_the_first(tmp_path):
    first, second = in_processes(statistics, 2, tmp_path)
    assert torch.equal(first, torch.ones(3)) and torch.equal(second, first)


def test_own_folders_of_images_and_label_maps(root):
    folder = root / "segmentation"
    own = data("segmentation", root, data_path=folder / "images", label_path=folder / "annotations",
               zero_ignored="false", classes=None).train
    image, labels = own.read(0)
    assert own.path(0).endswith("images/training/0000.png")
    assert image.shape[:2] == labels.shape == scenes.SIZE and labels.min() >= 1


@both
def test_an_evaluation_gives_the_figures_of_the_training(kind, root, runs, tmp_path, capsys):
    own = dict.fromkeys(set(KINDS[kind].own) & (COMMON | OWN[kind]).keys())  # the checkpoint knows these
    call = argv(kind, root, tmp_path, **own, eval="true", check="true", resume=runs[kind][0])
    assert RUN[kind](call) == 1  # nothing published to compare with
    assert {"segmentation": "mIoU ", "detection": "box AP "}[kind] in capsys.readouterr().out
    found = json.loads((tmp_path / "eval.json").read_text())
    assert (found["images"], found["verdict"], found["model"]) == (IMAGES[kind][1], "", "hornet_pico_gf")
    lines, score = (runs[kind][0] / "log.txt").read_text().splitlines(), KINDS[kind].task.score
    assert found[score.removeprefix("test_")] == max(json.loads(line)[score] for line in lines)
    assert [*found["per_class"]][-5:] == [*scenes.NAMES]
    assert kind == "segmentation" or json.loads((tmp_path / "detections.json").read_text())[0]["bbox"]
    assert len(list((tmp_path / "samples").glob("*.jpg"))) == IMAGES[kind][1]


def test_verdicts_compare_with_the_published_figures_where_the_data_are_theirs():
    words = {48.19: "PASS", 47.82: "CLOSE", 48.45: "FAIL"}
    assert {value: verdict("", "mIoU", value, 48.1)["verdict"] for value in words} == words

    def of(kind, images, classes, bad=0, **changes):
        names = [str(number) for number in range(classes)]
        rows = coco.CocoSet(file=str(DENSE / "metrics" / "coco_annotations.json"), photos=[None] * images,
                            categories=dict(enumerate(range(classes))), class_names=names, left_out=[])
        val = SimpleNamespace(rows=rows) if kind is DETECTOR else range(images)
        options = kind.options(model="hornet_tiny_7x7", **changes)
        found = [] if kind is DETECTOR else torch.eye(classes, classes + 1, dtype=torch.int64)
        subject = Subject("", Trained(None, options, names, "model", True), SimpleNamespace(val=val),
                          Process(device=CPU), "")
        return kind.result_of(subject, found, bad)

    assert of(SEGMENTOR, 2000, 150)["published"] == 48.1
    assert of(SEGMENTOR, 2000, 150, ms_flip=True)["published"] == 48.9
    assert of(DETECTOR, 5000, 80)["published"] == 51.7
    others = [of(SEGMENTOR, 1999, 150), of(SEGMENTOR, 2000, 149), of(SEGMENTOR, 2000, 150, head_width=64),
              of(DETECTOR, 5000, 79), of(DETECTOR, 5000, 80, bad=1), of(DETECTOR, 5000, 80, system="mask_rcnn")]
    assert {other["verdict"] for other in others} == {""}


@both
def test_predictions_of_a_folder(kind, root, runs, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(root / kind / ("images/validation" if kind == "segmentation" else "validation"), images)
    (images / "0003.png").write_bytes(b"no image")
    call = [str(images), "--resume", str(runs[kind][0]), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert predict.run(predict.arguments().parse_args(call)) == 0
    plain, rows = (json.loads((tmp_path / "out" / name).read_text()) for name in ("predictions.json", "coco.json"))
    count = IMAGES[kind][1]
    assert len(plain) == count and "error" in plain[3] and len(list((tmp_path / "out").glob("*.jpg"))) == count - 1
    assert {row["image_id"] for row in rows} == set(range(count)) - {3}
    rows = [row for row in rows if row["image_id"] == 0]
    found = predict.load(runs[kind][0])(Image.open(images / "0000.png"))
    if kind == "segmentation":
        assert sum(row["share"] for row in plain[0]["classes"]) == pytest.approx(1, abs=1e-4)
        assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "0000.png")), found)
        masks = [found == row["category_id"] - 1 for row in rows]
    else:
        assert {"class", "score", "box"} == plain[0]["objects"][0].keys() and len(plain[0]["objects"]) == len(rows)
        assert [row["score"] for row in rows] == pytest.approx(found.scores.tolist())
        assert [row["category_id"] - 1 for row in rows] == found.labels.tolist()
        masks = found.masks.numpy()
    for row, mask in zip(rows, masks, strict=True):
        assert (coco.decoded(row["segmentation"], scenes.SIZE) == mask).all()


@pytest.mark.slow
def test_an_exported_segmentor_gives_the_same_logits(runs, tmp_path):
    pytest.importorskip("onnxruntime")
    call = ["--resume", str(runs["segmentation"][0]), "--out", str(tmp_path / "s.onnx")]
    assert export.run(export.arguments().parse_args(call)) == 0
    model, x = predict.load(runs["segmentation"][0]).trained.model, torch.randn(2, 3, 75, 96)
    with torch.no_grad():
        assert (onnx_function(tmp_path / "s.onnx")(x) - model(x)).abs().max() < 1e-4
