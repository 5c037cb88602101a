"""The recipe files hold what was published, and a recipe is read strictly."""
from dataclasses import asdict
from pathlib import Path

import pytest

from common.errors import UserError
from config.parse import Options, parse
from config.recipe import read

RECIPES = Path(__file__).parent.parent / "recipes"
DATA = ["--data_path", "/data"]
# model, drop path, clipping, pictures per process, global batch, GPUs of the published run, RandAugment magnitude
PUBLISHED = {
    "hornet_tiny_7x7": ("hornet_tiny_7x7", 0.2, 100, 128, 4096, 32, 9),
    "hornet_tiny_gf": ("hornet_tiny_gf", 0.2, 1, 128, 4096, 32, 9),
    "hornet_small_7x7": ("hornet_small_7x7", 0.4, 5, 64, 4096, 32, 9),
    "hornet_small_gf": ("hornet_small_gf", 0.4, 1, 64, 4096, 32, 12),
    "hornet_base_7x7": ("hornet_base_7x7", 0.5, 5, 64, 4096, 32, 9),
    "hornet_base_gf": ("hornet_base_gf", 0.5, 1, 64, 4096, 32, 15),
    "hornet_large_7x7_in22k": ("hornet_large_7x7", 0.2, 5, 32, 4096, 64, 9),
    "hornet_large_gf_in22k": ("hornet_large_gf", 0.2, 1, 32, 4096, 64, 9),
    "hornet_large_7x7_ft1k_384": ("hornet_large_7x7", 0.4, 1, 16, 512, 32, 9),
    "hornet_large_gf_ft1k_384": ("hornet_large_gf_img384", 0.4, 1, 16, 512, 32, 9),
}


def resolve(name, *flags):
    return parse(["--config", str(RECIPES / f"{name}.yaml"), *DATA, *flags])


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_recipe_has_the_published_values(name):
    model, drop_path, clip, batch, global_batch, gpus, magnitude = PUBLISHED[name]
    resolved = resolve(name)
    o = resolved.options
    assert (o.model, o.drop_path, o.clip_grad, o.batch_size, o.global_batch) == (
        model, drop_path, clip, batch, global_batch)
    assert global_batch % (batch * gpus) == 0
    assert o.aa == f"rand-m{magnitude}-mstd0.5-inc1"
    assert o.model_ema and o.model_ema_eval and o.model_ema_decay == 0.9999 and o.min_lr == 1e-6
    if "ft1k" in name:
        expected = (30, 5e-5, 1e-8, 0, 0.7, 384, 0, 0)
    elif "in22k" in name:
        expected = (90, 4e-3, 0.1, 5, 1.0, 224, 0.8, 1.0)
    else:
        expected = (300, 4e-3, 0.05, 20, 1.0, 224, 0.8, 1.0)
    assert (o.epochs, o.lr, o.weight_decay, o.warmup_epochs, o.layer_decay, o.input_size, o.mixup, o.cutmix) == expected
    assert resolved.published is not None and resolved.published.name == f"recipes/{name}.yaml"
    assert resolved.differences() == {}
    assert resolved.notices == []


def test_values_that_a_published_recipe_leaves_out_are_the_defaults():
    values = asdict(resolve("hornet_tiny_gf").options)
    standard = asdict(Options())
    named = read(str(RECIPES / "hornet_tiny_gf.yaml")).values
    assert all(values[name] == standard[name] for name in values if name not in named | {"config": 0, "data_path": 0})


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_parses_and_its_head_holds_a_command_that_names_it(path):
    head = path.read_text().split("\nmodel:")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    commands = [line[1:].split() for line in head.splitlines() if "main.py" in line]
    assert commands
    for command in commands:
        argv = command[command.index("main.py") + 1:]
        argv[argv.index("--config") + 1] = str(RECIPES.parent / argv[argv.index("--config") + 1])
        assert parse(argv).recipe.name.endswith(path.name)


def test_quickstart_turns_everything_on():
    o = parse(["--config", str(RECIPES / "quickstart.yaml")]).options
    assert o.data_set == "SAMPLE" and o.data_path == "data/digits" and o.opt == "adamw"
    assert o.model_ema and o.mixup > 0 and o.drop_path > 0 and o.clip_grad > 0 and o.hflip == 0
    assert o.global_batch == 2 * o.batch_size


def write(tmp_path, text):
    path = tmp_path / "r.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return ["--config", str(path), *DATA]


@pytest.mark.parametrize("text, value", [
    ("lr: 4e-3", 4e-3), ("lr: 0.004", 4e-3), ("lr: '4e-3'", 4e-3), ("lr: 4E-3  # absolute", 4e-3)])
def test_numbers_in_yaml_need_no_dot(tmp_path, text, value):
    assert parse(write(tmp_path, text)).options.lr == value


def test_yaml_values_are_converted_as_flags_are(tmp_path):
    o = parse(write(tmp_path, "scale: [0.5, 1.0]\nmodel_ema: yes\nclip_grad: null\nresume: [a, b]\neval: True\n"
                              "aa: none\nexp_name: 010\nepochs: 030\n")).options
    assert (o.scale, o.model_ema, o.clip_grad, o.resume, o.aa) == ((0.5, 1.0), True, None, ("a", "b"), None)
    assert (o.exp_name, o.epochs) == ("010", 30)


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    o = parse([*write(tmp_path, "output_dir: ~/run\nlog_dir: ~\n"), "--finetune=~/x.pth", "--exp_name", "~run"]).options
    assert (o.output_dir, o.finetune, o.log_dir, o.exp_name) == ("/home/me/run", "/home/me/x.pth", None, "~run")


@pytest.mark.parametrize("text, words", [
    ("lr: 1\nlr: 2", ["'lr' is given twice", "line 2"]),
    ("learning_rate: 1", ["unknown key 'learning_rate'"]),
    ("batch-size: 8", ["'batch-size'", "did you mean batch_size?"]),
    ("epoch: 8", ["'epoch'", "did you mean epochs?"]),
    ("lr: .nan", ["lr", ".nan"]),
    ("lr: nan", ["lr nan is out of range"]),
    ("lr: {a: 1}", ["plain value"]),
    ("epochs: 1.5", ["epochs '1.5'", "whole number"]),
    ("lr:", ["lr", "a number"]),
    ("- lr", ["name: value"]),
    ("just words", ["name: value"]),
    ("lr: [1, 2", ["cannot be read"]),
    ("lr: 1\n\tepochs: 2", ["cannot be read", "line 2"]),
    ("? [a]\n: 1", ["a key is not a plain word"]),
    ("lr: !!python/object/apply:os.system [ls]", ["lr 'ls' is not accepted"]),
    ("<<: {lr: 1}", ["unknown key '<<'"]),
    ("[" * 3000, ["cannot be read"]),
    (b"\xff\xfe\x00lr", ["not a text file"]),
    (b"lr: 1\x00", ["cannot be read"]),
    ("data_path: \"a\\0b\"", ["data_path holds a NUL"]),
])
def test_a_mistake_in_a_recipe_is_one_sentence(tmp_path, text, words):
    with pytest.raises(UserError) as caught:
        parse(write(tmp_path, text))
    assert all(word in str(caught.value) for word in [*words, "r.yaml"])
    assert "\n" not in str(caught.value)


def test_an_empty_recipe_changes_nothing(tmp_path):
    assert parse(write(tmp_path, "# nothing\n")).options.lr == 4e-3


@pytest.mark.parametrize("path, words", [
    ("recipes/quickstrat.yaml", ["quickstrat.yaml", "did you mean recipes/quickstart.yaml?"]),
    ("recipes", ["is a folder"]), ("", ["needs the path"]), ("a\0b", ["NUL"]), ("x" * 5000, ["cannot be opened"])])
def test_a_recipe_that_is_not_there(path, words, monkeypatch):
    monkeypatch.chdir(RECIPES.parent)
    with pytest.raises(UserError) as caught:
        parse(["--config", path, *DATA])
    assert all(word in str(caught.value) for word in words)


def test_flags_override_the_recipe_and_origins_say_so():
    resolved = resolve("hornet_tiny_7x7", "--lr", "1e-3", "--epochs=10", "--warmup_epochs", "1")
    assert (resolved.options.lr, resolved.options.epochs, resolved.options.drop_path) == (1e-3, 10, 0.2)
    assert [resolved.origins[n] for n in ("lr", "epochs", "drop_path", "seed")] == ["flag", "flag", "recipe", "default"]
    assert resolved.differences() == {"lr": (1e-3, 4e-3), "epochs": (10, 300), "warmup_epochs": (1, 20)}


def test_the_saved_configuration_is_itself_a_recipe(tmp_path):
    first = resolve("hornet_small_gf", "--scale", "0.3", "0.9", "--exp_name", "ünï 'x': #y\n\x7f",
                    "--opt_betas", "0.9", "0.95")
    again = parse(write(tmp_path, first.to_yaml()))
    ignored = {"config"}
    assert again.notices == []
    assert {k: v for k, v in again.to_dict().items() if k not in ignored} == {
        k: v for k, v in first.to_dict().items() if k not in ignored}
