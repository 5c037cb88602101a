"""What `dense.predict` does with a detector: boxes and masks over images, plain and COCO's rows."""
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.devices import float32_products
from dense.coco_images import Scales, network_input, test_transform
from dense.detection_evaluation import load_detector
from dense.detection_task import rows_of
from dense.detector import Detections
from dense.draw import drawn
from dense.evaluation import Trained


@dataclass(frozen=True)
class BoxPredictor:
    """A detector ready for images of any size: called with one it gives its Detections, best first."""
    trained: Trained
    device: torch.device

    @classmethod
    def load(cls, path: str | os.PathLike, device: torch.device) -> "BoxPredictor":
        """From a checkpoint of this project or a published file."""
        return cls(load_detector(path, device=device), device)

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
