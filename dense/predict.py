"""What a segmentor or detector sees: `python -m dense.predict PATH… --resume FILE --out FOLDER`.

For each image a drawing over it, and one `predictions.json`; for a segmentor a label map (PNG with a palette)
and `coco.json` with a mask per class and image, too. In Python:

    from dense.predict import load
    predictor = load("runs/mine")                        # a run's folder, a file or an address
    labels = predictor(image)                            # PIL image or uint8 (H, W, 3) → uint8 (H, W)
"""
import argparse
import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.devices import float32_products
from common.errors import UserError
from common.files import write_json
from common.log import logger
from common.outcome import ExitCode
from common.safe_load import safe_torch_load
from common.text import printable
from datasets.images import BadImage, decode, read_file
from dense.coco import run_lengths
from dense.coco_images import Scales, network_input, test_transform
from dense.data import at_scales
from dense.detection_task import rows_of
from dense.detector import Detections
from dense.draw import drawn, overlay, palette
from dense.evaluation import Trained, load_detector, load_segmentor
from dense.inference import label_map
from launch.process import choose_device
from models.trained import locate
from models.weights import select_weights
from tools.command import run_command
from tools.predict import find_images


@dataclass(frozen=True)
class Predictor:
    """A model ready for images of any size, on its device."""
    trained: Trained
    device: torch.device


class SegmentPredictor(Predictor):
    """A segmentor ready for images of any size: called with one it gives labels, uint8 (H, W)."""

    @torch.no_grad()
    def __call__(self, image: Image.Image | np.ndarray) -> np.ndarray:
        pixels, options = np.asarray(image), self.trained.options
        scaled = [each.to(self.device) for each in at_scales(pixels, options)]
        labels = label_map(self.trained.model, scaled, (pixels.shape[0], pixels.shape[1]), options)
        return labels.numpy().astype(np.uint8)

    def save(self, image: np.ndarray, stem: Path) -> tuple[dict, list[dict]]:
        """Write the drawing and the label map; the record in plain words and in COCO's form."""
        labels, classes = self(image), self.trained.classes
        Image.fromarray(overlay(image, labels, len(classes))).save(f"{stem}.jpg", quality=90)
        map_ = Image.fromarray(labels, mode="P")
        map_.putpalette(palette(len(classes)).tobytes())
        map_.save(f"{stem}.png")
        present = [int(label) for label in np.unique(labels)]
        shares = [{"class": classes[label], "share": round(float((labels == label).mean()), 6)}
                  for label in present]
        return ({"classes": sorted(shares, key=lambda row: -row["share"])},
                [{"category_id": label + 1, "segmentation": run_lengths(labels == label)}
                 for label in present])


class BoxPredictor(Predictor):
    """A detector ready for images of any size: called with one it gives its Detections, best first."""

    def __call__(self, image: Image.Image | np.ndarray) -> Detections:
        pixels, options = np.asarray(image), self.trained.options
        scaled = test_transform(pixels, Scales(test=options.test_side, longest=options.longest_side))
        with float32_products():
            return self.trained.model.detect(network_input(scaled, self.device), scaled.shape[:2],
                                             pixels.shape[:2])

    def save(self, image: np.ndarray, stem: Path) -> tuple[dict, list[dict]]:
        """Write the drawing; the record in plain words and in COCO's form."""
        found, names = self(image), self.trained.classes
        Image.fromarray(drawn(image, found, names)).save(f"{stem}.jpg", quality=90)
        rows = rows_of(found, 0, range(1, len(names) + 1))
        plain = [{"class": names[row["category_id"] - 1], "score": round(row["score"], 4),
                  "box": [round(side, 1) for side in box]} for row, box in zip(rows, found.boxes.tolist())]
        return {"objects": plain}, rows


def load(source: str | os.PathLike, device: str | torch.device = "cpu", ms_flip: bool = False):
    """The predictor of a run's folder, a file or an address: `SegmentPredictor`, or a detector's."""
    path = locate(source)
    state, _ = select_weights(safe_torch_load(path), str(path))
    if any("roi_head." in name for name in state):
        return BoxPredictor(load_detector(path, device=torch.device(device)), torch.device(device))
    trained = load_segmentor(path, device=device)
    trained = replace(trained, options=replace(trained.options, ms_flip=ms_flip))
    return SegmentPredictor(trained, torch.device(device))


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m dense.predict", allow_abbrev=False, description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", metavar="PATH", help="images, or folders of them")
    parser.add_argument("--resume", required=True, metavar="FILE", help="run folder, checkpoint or address")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where the results go")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, …")
    parser.add_argument("--ms_flip", action="store_true", help="six scales and flips (segmentors)")
    return parser


def run(args: argparse.Namespace) -> int:
    """Predict the images of a command line."""
    paths, out = find_images(args.paths), Path(args.out)
    predictor = load(args.resume, choose_device(args.device, 0, 1), args.ms_flip)
    plain, coco, names = [], [], set()
    try:
        out.mkdir(parents=True, exist_ok=True)
        for number, path in enumerate(paths):
            name = Path(path).stem
            name = f"{name}-{number}" if name in names else name
            names.add(name)
            try:
                image = np.array(decode(read_file(path), exif_orientation=True))
                about, found = predictor.save(image, out / name)
            except BadImage as error:
                logger.warning("%s cannot be read (%s): it is skipped", printable(path), error)
                about, found = {"error": str(error)}, []
            plain.append({"path": path, "name": name, **about})
            coco += [{**each, "image_id": number, "file_name": path} for each in found]
        write_json(out / "predictions.json", plain)
        (out / "coco.json").write_text(json.dumps(coco))
    except OSError as error:
        raise UserError(f"--out {printable(str(out))} cannot be written ({error.strerror}); name another "
                        "folder.", code="unusable_folder") from None
    logger.info("%d of %d images: %s", sum("error" not in each for each in plain), len(plain), out)
    return ExitCode.DONE


if __name__ == "__main__":
    sys.exit(run_command(arguments(), run, None))
