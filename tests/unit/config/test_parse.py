"""The command line and recipes: origins, mistakes with a code and one sentence, what is written back."""
import subprocess
import sys
from itertools import takewhile

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from common.errors import UserError
from config.options import OPTIONS, Options
from config.parse import RECIPES, check_model, differences, help_text, parse, published_recipe
from config.rules import plan_batch
from dense.options import DetectionOptions, SegmentationOptions
from tests.kits.docs import ROOT
from tests.kits.errors import refused

MODELS = ("hornet_tiny_7x7", "hornet_tiny_gf", "hornet_small_7x7", "hornet_nano_7x7")
DATA = ["--data_path", "/data"]


# Flags

def test_published_training_command():
    resolved = parse("--model hornet_tiny_7x7 --drop_path 0.2 --clip_grad 5 --batch_size 128 --lr 4e-3 "
                     "--update_freq 4 --model_ema true --model_ema_eval true --data_path /imagenet "
                     "--output_dir ./logs".split())
    o = resolved.options
    assert (o.drop_path, o.clip_grad, o.batch_size, o.lr, o.update_freq, o.model_ema, o.data_path) == (
        0.2, 5, 128, 4e-3, 4, True, "/imagenet")
    assert resolved.notices == []
    assert differences(o) == {"clip_grad": (5, 100)}


def test_switches_several_values_none_and_the_last_of_two_equal_flags():
    for text, value in zip("true True 1 yes false False 0 no".split(), [True] * 4 + [False] * 4):
        for argv in (["--model_ema", text], [f"--model_ema={text}"]):
            assert parse([*argv, *DATA]).options.model_ema is value
    argv = ("--eval --model_ema --resume a.pth b.pth --scale 0.5 1 --opt_betas 0.9 0.99 --aa None --clip_grad none "
            "--lr 1 --lr 2 --output_dir runs/a--model")
    o = parse(argv.split() + DATA).options
    assert (o.model_ema, o.resume, o.scale, o.opt_betas, o.aa, o.clip_grad, o.lr, o.output_dir) == (
        True, ("a.pth", "b.pth"), (0.5, 1.0), (0.9, 0.99), None, None, 2, "runs/a--model")
    assert parse(["--resume", "", *DATA]).options.resume == ()


def test_published_flags_without_effect_are_accepted_with_one_notice_and_the_launchers_rank_quietly(tmp_path):
    for argv in (["--local-rank=3"], ["--local_rank", "3"], ["--local-rank", "3"]):
        assert parse([*argv, *DATA]).notices == []
    argv = "--dist_on_itp true --world_size 8 --dist-eval false --dist_url tcp://x".split()
    [notice] = parse([*write(tmp_path, "resplit: false\nlocal_rank: -1"), *argv]).notices
    assert all(name in notice for name in ("--dist_on_itp", "--world_size", "--dist_eval", "--dist_url", "--resplit"))


# What is refused, by code. Each sentence names the first word, or what is in brackets.
MISTAKES = {
    "unknown_flag": """--bach_size 3 [--batch_size?] | --batch-size 3 [--batch_size?]
        | --batch 3 [--batch_size?] | --zzzz [--help all] | -lr 3 [--lr?] | \u2014lr 3 [--lr?] | -- | --=3""",
    # The first three: what the shell makes of the original README's `--clip_grad 5\\` before a further line.
    "stray_value": r"""--clip_grad 5--batch_size 128 [5--batch_size] | --data_path /a--output_dir b [--output_dir]
        | --model_ema true--model_ema_eval true [--model_ema_eval]
        | train | --lr 1 2 ['2'] | --lr=1 2 ['2'] | \ [backslash]""",
    "missing_value": "--lr | --lr --epochs 3 | --resume",
    "invalid_value": """--lr= [--lr ''] | --lr fast [above 0] | --lr nan | --lr inf | --lr 1e999 | --lr 0
        | --lr -1 | --epochs 0 | --epochs 1.5 | --batch_size 0 | --batch_size none | --update_freq 0
        | --drop_path 1 [below 1]
        | --mixup_prob 1.1 | --smoothing 1 | --weight_decay -0.05 | --layer_decay 0 | --model_ema_decay 1
        | --clip_grad 0 [or none] | --input_size 16 [from 32] | --crop_pct 0 | --num_workers -1 | --scale 0.5
        | --scale 1 0.5 | --cutmix_minmax 0.2 nan | --opt_betas 0.9 1 | --model_ema maybe [true or false]
        | --clip_by norms [norm, value or agc] | --data_set IMAGENET [IMNET] | --device gpu [auto, cpu]
        | --model_ema true--lr=1 [true or false] | --aa rnd-m9 [rand-m9-mstd0.5-inc1] | --amp_dtype fp8 [bf16 or fp16]""",
}


@pytest.mark.parametrize("code, row", [(code, " ".join(row.split())) for code, rows in MISTAKES.items()
                                       for row in rows.split("|")])
def test_a_mistake_is_one_sentence_with_value_and_fix(code, row):
    argv, _, named = row.rstrip("]").partition(" [")
    argv = argv.split()
    with refused(code, named or argv[0]):
        parse([*argv, *DATA] if argv[0] in ("--lr", "--resume") else [*DATA, *argv])


def test_an_unknown_model_is_named_with_the_nearest_or_all():
    for name, named in (("hornet_tny_7x7", "did you mean hornet_tiny_7x7?"), ("resnet50", "known are hornet")):
        with refused("unknown_model", name, named):
            check_model(name, MODELS)


def test_what_is_too_long_is_refused_in_short():
    for argv in (["--epochs", "9" * 5000], ["--model", "x" * 300], ["--output_dir", "runs/" + "x" * 300],
                 ["--resume", "a/" * 3000]):
        with refused("invalid_value", argv[0], "..."):
            parse([*DATA, *argv])
    assert differences(parse(["--model", "x" * 255, *DATA]).options) == {}
    assert parse(["--eval", "--resume", "https://x/" + "x" * 300, *DATA]).options.resume


def test_help_shows_twenty_options_and_help_all_every_one(capsys):
    for argv, count in ((["--help"], 20), (["-h"], 20), (["--lr", "nonsense", "--help"], 20),
                        (["--help", "all"], len(OPTIONS)), (["--help=all"], len(OPTIONS))):
        with pytest.raises(SystemExit) as ended:
            parse(argv)
        assert ended.value.code == 0
        text = capsys.readouterr().out
        assert sum(line.startswith("  --") for line in text.splitlines()) == count
        assert max(map(len, text.splitlines())) <= 125
    assert "[0.004]" in help_text()


def test_print_config_shows_value_origin_and_published_value():
    resolved = parse(["--config", str(RECIPES / "hornet_tiny_7x7.yaml"), "--print_config", "--lr", "1e-3"])
    rows = {line.split(":")[0]: line for line in resolved.to_yaml().splitlines()}
    plain = (str, int, float, bool, type(None), list)
    assert all(type(v) in plain for v in resolved.to_dict().values()) and set(resolved.to_dict()) == set(OPTIONS)
    assert rows["lr"] == "lr: 0.001  # flag, published: 0.004"
    assert rows["drop_path"].endswith("# recipe") and rows["seed"] == "seed: 0  # default"


def test_options_do_not_import_torch():
    code = "import sys, config.parse; assert 'torch' not in sys.modules and 'timm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


# Recipes

# model, drop path, clipping, images per process, global batch, GPUs published, RandAugment magnitude
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
    "hornet_large_gf_ft1k_384": ("hornet_large_gf_img384", 0.4, 1, 16, 512, 32, 9)}


def resolve(name, *flags):
    return parse(["--config", str(RECIPES / f"{name}.yaml"), *DATA, *flags])


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_recipe_has_the_published_values(name):
    model, drop_path, clip, batch, global_batch, gpus, magnitude = PUBLISHED[name]
    resolved = resolve(name)
    o = resolved.options
    epochs, *more = ((30, 5e-5, 1e-8, 0, 0.7, 384, 0, 0) if "ft1k" in name else
                     (90, 4e-3, 0.1, 5, 1.0, 224, 0.8, 1.0) if "in22k" in name else
                     (300, 4e-3, 0.05, 20, 1.0, 224, 0.8, 1.0))
    expected = (model, drop_path, clip, batch, global_batch, f"rand-m{magnitude}-mstd0.5-inc1", True, True, 0.9999, 1e-6,
                epochs, *more)
    names = ("model drop_path clip_grad batch_size global_batch aa model_ema model_ema_eval model_ema_decay min_lr epochs "
             "lr weight_decay warmup_epochs layer_decay input_size mixup cutmix")
    assert tuple(getattr(o, name) for name in names.split()) == expected and global_batch % (batch * gpus) == 0
    assert published_recipe(o)["drop_path"] == drop_path
    assert differences(o) == {} and resolved.notices == [] and resolved.lr_batch == global_batch


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_parses_and_its_head_holds_a_command_that_names_it(path):
    head = "\n".join(takewhile(lambda line: line.startswith("#"), path.read_text().splitlines()))
    kinds = {"main.py": Options, "dense.segmentation": SegmentationOptions, "dense.detection": DetectionOptions}
    commands = [(program, line[1:].split()) for line in head.splitlines() for program in kinds if program in line]
    assert commands
    for program, command in commands:
        argv = command[command.index(program) + 1:]
        argv[argv.index("--config") + 1] = str(ROOT / argv[argv.index("--config") + 1])
        argv += [] if program == "main.py" else ["--data_path", "x"]
        assert parse(argv, kinds[program]).origins["model"] in ("recipe", "flag")


def write(tmp_path, text):
    path = tmp_path / "r.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return ["--config", str(path), *DATA]


def test_yaml_values_are_converted_as_flags_are(tmp_path):
    for text in ("lr: 4e-3", "lr: 0.004", "lr: '4e-3'", "lr: 4E-3  # absolute"):
        assert parse(write(tmp_path, text)).options.lr == 4e-3
    o = parse(write(tmp_path, "scale: [0.5, 1.0]\nmodel_ema: yes\nclip_grad: null\nresume: [a, b]\n"
                              "eval: True\naa: none\nexp_name: 010\nepochs: 030\n")).options
    assert (o.scale, o.model_ema, o.clip_grad, o.resume, o.aa) == ((0.5, 1.0), True, None, ("a", "b"), None)
    assert (o.exp_name, o.epochs) == ("010", 30)
    assert parse(write(tmp_path, "# nothing\n")).options.lr == 4e-3


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    argv = [*write(tmp_path, "output_dir: ~/run\nlog_dir: ~\n"), "--finetune=~/x", "--exp_name", "~run"]
    o = parse(argv).options
    assert (o.output_dir, o.finetune, o.log_dir, o.exp_name) == ("/home/me/run", "/home/me/x", None, "~run")


@pytest.mark.parametrize("text, code, named", [
    ("lr: 1\nlr: 2", "invalid_recipe", "line 2"), ("learning_rate: 1", "unknown_key", "'learning_rate'"),
    ("batch-size: 8", "unknown_key", "batch_size?"), ("epoch: 8", "unknown_key", "epochs?"),
    ("lr: .nan", "invalid_value", "lr .nan"), ("lr: nan", "invalid_value", "lr nan"),
    ("epochs: 1.5", "invalid_value", "1.5"), ("lr:", "invalid_value", "lr"),
    ("lr: {a: 1}", "invalid_recipe", ""), ("- lr", "invalid_recipe", ""), ("just words", "invalid_recipe", ""),
    ("lr: [1, 2", "invalid_recipe", ""),
    ("lr: 1\n\tepochs: 2", "invalid_recipe", "line 2"), ("? [a]\n: 1", "invalid_recipe", ""),
    ("lr: !!python/object/apply:os.system [ls]", "invalid_value", "lr ls"), ("<<: 1", "unknown_key", "'<<'"),
    ("[" * 3000, "invalid_recipe", ""), (b"\xff\xfe\x00lr", "invalid_recipe", ""),
    (b"lr: 1\x00", "invalid_recipe", ""), ("data_path: \"a\\0b\"", "invalid_value", "data_path"),
    ("#" * (1 << 20) + "#", "unreadable_file", "more than")])
def test_a_mistake_in_a_recipe_is_one_sentence(tmp_path, text, code, named):
    with refused(code, "r.yaml", named):
        parse(write(tmp_path, text))


def test_a_recipe_that_is_missing(monkeypatch):
    for folder, path, named in (
            (ROOT, "recipes/quickstrat.yaml", ["quickstrat.yaml", "did you mean recipes/quickstart.yaml?"]),
            (ROOT, "recipes", ["recipes cannot be read"]), (ROOT, "", []), (ROOT, "x" * 255, []),
            (ROOT / "docs", "recipes/quickstart.yaml", ["did you mean ../recipes/quickstart.yaml?"])):  # the way from there
        monkeypatch.chdir(folder)
        with refused("missing_recipe unreadable_file", *named):
            parse(["--config", path, *DATA])


def test_flags_override_the_recipe_and_origins_show_it():
    resolved = resolve("hornet_tiny_7x7", "--lr", "1e-3", "--epochs=10", "--warmup_epochs", "1")
    assert (resolved.options.lr, resolved.options.epochs, resolved.options.drop_path) == (1e-3, 10, 0.2)
    assert [resolved.origins[n] for n in ("lr", "drop_path", "seed")] == ["flag", "recipe", "default"]
    assert differences(resolved.options) == {"lr": (1e-3, 4e-3), "epochs": (10, 300), "warmup_epochs": (1, 20)}


def test_the_saved_configuration_is_itself_a_recipe(tmp_path):
    first = resolve("hornet_small_gf", "--scale", "0.3", "0.9", "--exp_name", "ünï 'x': #y\n\x7f",
                    "--opt_betas", "0.9", "0.95", "--seed", "123456789012345678")
    again = parse(write(tmp_path, first.to_yaml()))
    assert again.notices == []
    assert again.to_dict() | {"config": None} == first.to_dict() | {"config": None}


# Anything at all

flag = st.sampled_from([f"--{name}" for name in (*OPTIONS, "local-rank")])
word = st.one_of(st.text(max_size=12),
                 st.sampled_from(["true", "none", "0", "-1", "1e-3", "nan", " ", "\\", "=", "", "-", "--"]),
                 st.floats().map(str), st.integers().map(str))
token = st.one_of(flag, word, st.builds("{}={}".format, flag, word), st.builds("{}{}".format, word, flag))


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(token, max_size=8))
@example(["--lr", "\ud800"])
def test_no_command_line_makes_a_traceback(argv):
    try:
        plan_batch(parse(argv), 3)
    except UserError as error:
        assert str(error).strip()
    except SystemExit as ended:
        assert ended.code == 0 and any(part.startswith(("-h", "--help")) for part in argv)


yaml_text = st.one_of(
    st.text(max_size=80), st.binary(max_size=80),
    st.lists(st.builds("{}: {}".format, st.sampled_from(list(OPTIONS)), word), max_size=5).map("\n".join))


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=yaml_text)
@example(text="a: &a [*a]")
@example(text="lr: &a [*a]")
@example(text="!!timestamp 2001-99-99: 1")
def test_no_recipe_makes_a_traceback(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    try:
        parse(["--config", str(path)])
    except UserError as error:
        assert str(error).strip()
