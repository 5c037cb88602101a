"""Models in the layout of the Hugging Face Hub: model.safetensors, config.json and a card, README.md.

    import models, timm
    timm.create_model("local-dir:FOLDER", pretrained=True)      # or hf-hub:USER/NAME
    models.load("FOLDER")                                       # with classes and transform

timm and transformers read config.json. `models.load`, `--resume` and `--finetune` read the weights' file
alone, whose header says the same.
"""
from dataclasses import asdict
from pathlib import Path

from common.errors import UserError
from common.files import write_json, write_text
from common.safe_load import save_safetensors
from models.download import HUB_WEIGHTS
from models.inspect import class_titles
from models.trained import Trained

# What timm keeps of a model's settings; any other entry would be refused by it.
_TIMM = ("input_size", "crop_pct", "crop_mode", "mean", "std", "interpolation", "num_classes", "first_conv",
         "classifier")


def write_hub(trained: Trained, folder: Path, card: str, licence: str) -> None:
    """Write the three files; `card` is the Markdown of README.md."""
    folder.mkdir(parents=True, exist_ok=True)
    # In the header, as a checkpoint has it: without it the file alone would be given other images.
    about = {"format": 3, "classes": trained.classes,
             "args": {"model": trained.name, **asdict(trained.settings)}}
    save_safetensors(folder / HUB_WEIGHTS, trained.model.state_dict(), about)
    known = vars(trained.model)["pretrained_cfg"]
    config = {"architecture": trained.name, "num_classes": len(trained.classes), "global_pool": "avg",
              "num_features": trained.model.num_features, "label_names": trained.classes,
              "label_descriptions": dict(zip(trained.classes, class_titles(trained.classes))),
              "pretrained_cfg": {**{name: known[name] for name in _TIMM}, "custom_load": False,
                                 "license": licence}}
    if trained.settings.layer_scale_init_value == 0:  # otherwise its values are among the weights
        config["model_args"] = {"layer_scale_init_value": 0.0}
    write_json(folder / "config.json", config)
    write_text(folder / "README.md", card)


def push(folder: Path, name: str) -> str:
    """Upload the folder as the model USER/NAME, which is made if it is missing; returns its address.

    Raises UserError (`push_failed`).
    """
    from huggingface_hub import HfApi

    try:
        url = HfApi().create_repo(name, exist_ok=True)
        HfApi().upload_folder(repo_id=name, folder_path=folder)
    except (OSError, ValueError) as error:  # no network, no login, no right, no such name
        raise UserError(f"{folder} was not pushed to {name} ({' '.join(str(error).split())[:200]}); log in "
                        "with `hf auth login` and try again.", code="push_failed") from error
    return str(url)
