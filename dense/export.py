"""ONNX of segmentors: `python -m dense.export --resume FILE --out segmentor.onnx`.

Input `images` float32 (B, 3, H, W), normalised (`dense.pixels`), any size from 64 pixels on; output logits
(B, classes, H, W) of one window. The file's metadata names the classes and the normalisation.
"""
import argparse
import json
import sys
from typing import cast

from common.log import logger
from common.outcome import ExitCode
from dense.evaluation import load_segmentor
from dense.pixels import MEAN, STD
from models.export import check_exported, export_onnx, exported_program, onnx_function
from models.hornet import HorNet
from models.trained import locate
from tools.command import run_command


def run(args: argparse.Namespace) -> int:
    """Export, then compare the file with the network at four sizes."""
    trained = load_segmentor(locate(args.resume))
    side = min(trained.options.crop_size, 128)
    network = cast(HorNet, trained.model)  # what these ask of one, a segmentor has too
    program = exported_program(network, side)
    about = {"classes": json.dumps(trained.classes), "mean": json.dumps(MEAN), "std": json.dumps(STD),
             "crop_size": str(trained.options.crop_size)}
    export_onnx(program, args.out, about)
    difference = check_exported(network, onnx_function(args.out), side)
    logger.info("%s: %d classes; at four sizes at most %.1e from the network", args.out, len(trained.classes),
                difference)
    return ExitCode.DONE


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m dense.export", allow_abbrev=False, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resume", required=True, metavar="FILE", help="run folder, checkpoint or address")
    parser.add_argument("--out", required=True, metavar="FILE", help="the ONNX file")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(arguments(), run, None))
