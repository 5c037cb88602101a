"""The command line and recipes: origins, mistakes with a code and one sentence, what is written back."""
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from common.errors import UserError
from config.options import OPTIONS, Options
from config.parse import RECIPES, differences, parse
from config.rules import plan_batch
from dense.options import DetectionOptions, SegmentationOptions
from tests.kits.docs import ROOT
from tests.kits.errors import refused

DATA = ["--data_path", "/data"]


def write(tmp_path, text):
    """The words that take `text` as a recipe."""
    path = tmp_path / "r.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    return ["--config", str(path), *DATA]


def test_the_published_training_command():
    resolved = parse("--model hornet_tiny_7x7 --drop_path 0.2 --clip_grad 5 --batch_size 128 --lr 4e-3 --update_freq 4 "
                     "--model_ema true --model_ema_eval true --data_path /imagenet --output_dir ./logs".split())
    assert resolved.notices == [] and differences(resolved.options) == {"clip_grad": (5, 100)}


def test_switches_several_values_none_tilde_and_the_last_of_two_equal_flags(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for text, value in zip("true True 1 yes false False 0 no".split(), [True] * 4 + [False] * 4):
        for argv in (["--model_ema", text], [f"--model_ema={text}"]):
            assert parse([*argv, *DATA]).options.model_ema is value
    argv = ("--eval --model_ema --resume a.pth b.pth --scale 0.5 1 --opt_betas 0.9 0.99 --aa None --clip_grad none "
            "--lr 1 --lr 2 --output_dir runs/a--model --finetune=~/x --exp_name ~run")
    o = parse(argv.split() + DATA).options
    assert (o.model_ema, o.resume, o.scale, o.opt_betas, o.aa, o.clip_grad, o.lr, o.output_dir) == (
        True, ("a.pth", "b.pth"), (0.5, 1.0), (0.9, 0.99), None, None, 2, "runs/a--model")
    assert (o.finetune, o.exp_name) == ("/home/me/x", "~run")
    assert parse(["--resume", "", *DATA]).options.resume == ()


def test_recipes_are_converted_as_flags_are_and_flags_win(tmp_path):
    for text in ("lr: 4e-3", "lr: 0.004", "lr: '4e-3'", "lr: 4E-3  # absolute", "# nothing\n"):
        assert parse(write(tmp_path, text)).options.lr == 4e-3
    text = ("scale: [0.5, 1.0]\nmodel_ema: yes\nclip_grad: null\nresume: [a, b]\nlog_dir: ~\nseed: 7\n"
            "eval: True\naa: none\nexp_name: 010\nepochs: 030\n")
    resolved = parse([*write(tmp_path, text), "--seed", "8"])
    o = resolved.options
    assert (o.scale, o.model_ema, o.clip_grad, o.resume, o.aa) == ((0.5, 1.0), True, None, ("a", "b"), None)
    assert (o.exp_name, o.epochs, o.log_dir, o.seed) == ("010", 30, None, 8)
    assert [resolved.origins[name] for name in ("seed", "epochs", "lr")] == ["flag", "recipe", "default"]


def test_published_flags_without_effect_are_accepted_with_one_notice_and_the_launchers_rank_quietly(tmp_path):
    for argv in (["--local-rank=3"], ["--local_rank", "3"], ["--local-rank", "3"]):
        assert parse([*argv, *DATA]).notices == []
    argv = "--dist_on_itp true --world_size 8 --dist-eval false --dist_url tcp://x".split()
    [notice] = parse([*write(tmp_path, "resplit: false\nlocal_rank: -1"), *argv]).notices
    assert all(name in notice for name in ("--dist_on_itp", "--world_size", "--dist_eval", "--dist_url", "--resplit"))


# What is refused, by code. Each sentence names the first word, or what is in brackets.
MISTAKES = {
    "unknown_flag": """--bach_size 3 [--batch_size?] | --batch-size 3 [--batch_size?] | --batch 3 [--batch_size?]
        | --zzzz [--help all] | -lr 3 [--lr?] | \u2014lr 3 [--lr?] | -- | --=3""",
    # The first three: what the shell makes of the original README's `--clip_grad 5\\` before a further line.
    "stray_value": r"""--clip_grad 5--batch_size 128 [5--batch_size] | --data_path /a--output_dir b [--output_dir]
        | --model_ema true--model_ema_eval true [--model_ema_eval] | train | --lr 1 2 ['2'] | --lr=1 2 ['2']
        | \ [backslash]""",
    "missing_value": "--lr | --lr --epochs 3 | --resume",
    "invalid_value": """--lr= [--lr ''] | --lr fast [above 0] | --lr nan | --lr inf | --lr 1e999 | --lr 0
        | --lr -1 | --epochs 0 | --epochs 1.5 | --batch_size 0 | --batch_size none | --update_freq 0
        | --drop_path 1 [below 1] | --mixup_prob 1.1 | --weight_decay -0.05 | --layer_decay 0
        | --clip_grad 0 [or none] | --input_size 16 [from 32] | --crop_pct 0 | --num_workers -1 | --scale 0.5
        | --scale 1 0.5 | --cutmix_minmax 0.2 nan | --opt_betas 0.9 1 | --model_ema maybe [true or false]
        | --clip_by norms [norm, value or agc] | --data_set IMAGENET [IMNET] | --device gpu [auto, cpu]
        | --model_ema true--lr=1 [true or false] | --aa rnd-m9 [rand-m9-mstd0.5-inc1]"""}


@pytest.mark.parametrize("code, row", [(code, " ".join(row.split())) for code, rows in MISTAKES.items()
                                       for row in rows.split("|")])
def test_a_mistake_is_one_sentence_with_value_and_fix(code, row):
    argv, _, named = row.rstrip("]").partition(" [")
    argv = argv.split()
    with refused(code, named or argv[0]):
        parse([*argv, *DATA] if argv[0] in ("--lr", "--resume") else [*DATA, *argv])


def test_what_is_too_long_is_refused_in_short():
    for argv in (["--epochs", "9" * 5000], ["--model", "x" * 300], ["--output_dir", "runs/" + "x" * 300],
                 ["--resume", "a/" * 3000]):
        with refused("invalid_value", argv[0], "..."):
            parse([*DATA, *argv])
    assert differences(parse(["--model", "x" * 255, *DATA]).options) == {}
    assert parse(["--eval", "--resume", "https://x/" + "x" * 300, *DATA]).options.resume


@pytest.mark.parametrize("text, code, named", [
    ("lr: 1\nlr: 2", "invalid_recipe", "line 2"), ("learning_rate: 1", "unknown_key", "'learning_rate'"),
    ("batch-size: 8", "unknown_key", "batch_size?"), ("lr: .nan", "invalid_value", "lr .nan"),
    ("lr:", "invalid_value", "lr"), ("lr: {a: 1}", "invalid_recipe", ""), ("- lr", "invalid_recipe", ""),
    ("just words", "invalid_recipe", ""), ("lr: 1\n\tepochs: 2", "invalid_recipe", "line 2"),
    ("? [a]\n: 1", "invalid_recipe", ""), ("lr: !!python/object/apply:os.system [ls]", "invalid_value", "lr ls"),
    ("<<: 1", "unknown_key", "'<<'"), ("[" * 3000, "invalid_recipe", ""), (b"\xff\xfe\x00lr", "invalid_recipe", ""),
    ("data_path: \"a\\0b\"", "invalid_value", "data_path"), ("#" * (1 << 20) + "#", "unreadable_file", "more than")])
def test_a_mistake_in_a_recipe_is_one_sentence(tmp_path, text, code, named):
    with refused(code, "r.yaml", named):
        parse(write(tmp_path, text))


@pytest.mark.parametrize("folder, path, named", [
    ("", "recipes/quickstrat.yaml", "did you mean recipes/quickstart.yaml?"), ("", "recipes", "recipes cannot be read"),
    ("", "", ""), ("", "x" * 255, ""), ("docs", "recipes/quickstart.yaml", "did you mean ../recipes/quickstart.yaml?")])
def test_a_recipe_that_is_missing(monkeypatch, folder, path, named):
    monkeypatch.chdir(ROOT / folder)
    with refused("missing_recipe unreadable_file", named):
        parse(["--config", path, *DATA])


def test_help_shows_twenty_options_and_help_all_every_one(capsys):
    for argv, count in ((["--help"], 20), (["-h"], 20), (["--lr", "nonsense", "--help"], 20),
                        (["--help", "all"], len(OPTIONS)), (["--help=all"], len(OPTIONS))):
        with pytest.raises(SystemExit) as ended:
            parse(argv)
        text = capsys.readouterr().out
        assert ended.value.code == 0 and "[0.004]" in text and max(map(len, text.splitlines())) <= 125
        assert sum(line.startswith("  --") for line in text.splitlines()) == count


def test_the_printed_configuration_shows_origins_and_is_itself_a_recipe(tmp_path):
    config = ["--config", str(RECIPES / "hornet_tiny_7x7.yaml"), *DATA]
    first = parse([*config, "--print_config", "--exp_name", "ünï 'x': #y\n\x7f",
                   *"--lr 1e-3 --scale 0.3 0.9 --opt_betas 0.9 0.95".split()])
    text = first.to_yaml()
    assert "\nlr: 0.001  # flag, published: 0.004\n" in text and "\nseed: 0  # default\n" in text
    assert "\ndrop_path: 0.2  # recipe\n" in text
    assert differences(first.options).items() >= {"lr": (1e-3, 4e-3), "scale": ((0.3, 0.9), (0.08, 1.0))}.items()
    again = parse(write(tmp_path, text))
    assert again.notices == [] and set(again.to_dict()) == set(OPTIONS)
    per_launch = {"config": None, "print_config": None}
    assert again.to_dict() | per_launch == first.to_dict() | per_launch


def test_options_do_not_import_torch():
    code = "import sys, config.parse; assert 'torch' not in sys.modules and 'timm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_parses_and_its_head_holds_a_command_that_names_it(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    kinds = {"main.py": Options, "dense.segmentation": SegmentationOptions, "dense.detection": DetectionOptions}
    commands = [(kind, line.partition(program)[2].split()) for line in path.read_text().splitlines()
                for program, kind in kinds.items() if line.startswith("#") and program in line]
    assert commands and all(f"recipes/{path.name}" in argv for _, argv in commands)
    for kind, argv in commands:
        assert parse([*argv, *DATA], kind).origins["model"] in ("recipe", "flag")


# Anything at all

flag = st.sampled_from([f"--{name}" for name in (*OPTIONS, "local-rank")])
word = st.one_of(st.text(max_size=12), st.floats().map(str), st.integers().map(str),
                 st.sampled_from(["true", "none", "0", "-1", "1e-3", "nan", " ", "\\", "=", "", "-", "--"]))
token = st.one_of(flag, word, st.builds("{}={}".format, flag, word), st.builds("{}{}".format, word, flag))
line = st.builds("{}: {}".format, st.sampled_from(list(OPTIONS)), word)
recipe = st.one_of(st.text(max_size=80), st.binary(max_size=80), st.lists(line, max_size=5).map("\n".join))


@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
@given(given=st.one_of(st.lists(token, max_size=8), recipe))
@example(given=["--lr", "\ud800"])
@example(given="a: &a [*a]")
@example(given="lr: &a [*a]")
@example(given="!!timestamp 2001-99-99: 1")
def test_no_command_line_and_no_recipe_makes_a_traceback(tmp_path_factory, given):
    argv = given if isinstance(given, list) else write(tmp_path_factory.getbasetemp(), given)
    try:
        plan_batch(parse(argv).options, 3, 10 ** 9)
    except UserError as error:
        assert str(error).strip()
    except SystemExit as ended:
        assert ended.code == 0 and any(part.startswith(("-h", "--help")) for part in argv)
