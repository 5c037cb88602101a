"""The card of a published model: results with their interval, use, training, limits, as Markdown."""
import re
import shlex
from pathlib import Path

from jinja2 import Environment, FileSystemLoader

from common.errors import UserError
from common.files import read_json
from config.options import ImageSettings
from models.trained import Trained
from report.metrics import sampling_interval
from report.page import read_run
from report.results import crop_in_words


def model_card(trained: Trained, name: str, licence: str) -> str:
    """README.md of the model USER/NAME at the Hub, from what the folder of its checkpoint holds."""
    folder, settings = trained.source.parent, trained.settings
    manifest = Path(f"{trained.source}.json")
    about = read_json(manifest) if manifest.is_file() else {}
    try:
        run = read_run(folder)
    except UserError:
        run = None
    results = [row for row in (run.evaluation.get("results", [run.evaluation]) if run else ())
               if Path(row.get("checkpoint", "")).name == trained.source.name
               and row["weights"] == (trained.weights or "model")]
    command = shlex.join(run.environment.get("command", ())) if run else ""
    score, images = about.get("score"), run.data.get("val", {}).get("images", 0) if run else 0
    recipe = re.search(r"--config[ =](\S+)", command)
    world = Environment(loader=FileSystemLoader(Path(__file__).parent), trim_blocks=True, lstrip_blocks=True)
    return world.get_template("card.md").render(
        trained=trained, name=name, licence=licence, run=run, results=results, score=score, images=images,
        interval=sampling_interval(score or 0, images), epoch=about.get("epoch"), command=command,
        small=settings.input_size <= ImageSettings.SMALL, recipe=recipe and recipe[1],
        parameters=sum(p.numel() for p in trained.model.parameters()),
        transform=f"{crop_in_words(settings)}; mean {settings.mean}, deviation {settings.std}")
