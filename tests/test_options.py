"""Options: published names and defaults, mistakes answered in one sentence, the batch plan."""
import ast
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from common.errors import UserError
from config.parse import Options, help_text, parse, plan_batch, validate_after_index

ROOT = Path(__file__).parent.parent
MODELS = ("hornet_tiny_7x7", "hornet_tiny_gf", "hornet_small_7x7", "hornet_nano_7x7")
DATA = ["--data_path", "/data"]
PUBLISHED_DEFAULTS = dict(
    batch_size=64, epochs=300, update_freq=1, model="hornet_tiny_gf", drop_path=0, input_size=224,
    layer_scale_init_value=1e-6, model_ema=False, model_ema_decay=0.9999, model_ema_eval=False,
    model_ema_force_cpu=False, opt="adamw", opt_eps=1e-8, opt_betas=None, clip_grad=None, momentum=0.9,
    weight_decay=0.05, weight_decay_end=None, lr=4e-3, layer_decay=1.0, min_lr=1e-6, warmup_epochs=20,
    warmup_steps=-1, color_jitter=0.4, aa="rand-m9-mstd0.5-inc1", smoothing=0.1, train_interpolation="bicubic",
    crop_pct=None, reprob=0.25, remode="pixel", recount=1, resplit=False, mixup=0.8, cutmix=1.0, cutmix_minmax=None,
    mixup_prob=1.0, mixup_switch_prob=0.5, mixup_mode="batch", finetune="", head_init_scale=1.0,
    model_key="model|module", model_prefix="", data_path="", eval_data_path=None, imagenet_default_mean_and_std=True,
    data_set="IMNET", output_dir="", log_dir=None, device="auto", seed=0, resume=(), auto_resume=True, save_ckpt=True,
    save_ckpt_freq=1, save_ckpt_num=3, start_epoch=0, eval=False, dist_eval=True, disable_eval=False, num_workers=10,
    pin_mem=True, world_size=1, local_rank=-1, dist_on_itp=False, dist_url="env://", use_amp=False,
    enable_wandb=False, project="hornet", wandb_ckpt=False, exp_name="default", nb_classes=None,
    hflip=0.5, scale=(0.08, 1.0))


def refused(*argv, models=MODELS):
    with pytest.raises(UserError) as caught:
        parse(list(argv), models)
    sentence = str(caught.value)
    assert "\n" not in sentence and sentence[-1] in ".?", sentence
    return sentence


def test_defaults_are_the_published_ones():
    assert {name: asdict(Options())[name] for name in PUBLISHED_DEFAULTS} == PUBLISHED_DEFAULTS


def test_published_training_command():
    resolved = parse("--model hornet_tiny_7x7 --drop_path 0.2 --clip_grad 5 --batch_size 128 --lr 4e-3 --update_freq 4 "
                     "--model_ema true --model_ema_eval true --data_path /imagenet --output_dir ./logs".split(), MODELS)
    o = resolved.options
    assert (o.drop_path, o.clip_grad, o.batch_size, o.lr, o.update_freq, o.model_ema, o.data_path) == (
        0.2, 5, 128, 4e-3, 4, True, "/imagenet")
    assert resolved.notices == []
    assert resolved.differences() == {"clip_grad": (5, 100)}


@pytest.mark.parametrize("text, value", [("true", True), ("True", True), ("1", True), ("yes", True), ("", True),
                                         ("false", False), ("False", False), ("0", False), ("no", False)])
def test_switches(text, value):
    argv = ["--model_ema", text] if text else ["--model_ema"]
    assert parse([*argv, *DATA]).options.model_ema is value
    if text:
        assert parse([f"--model_ema={text}", *DATA]).options.model_ema is value


@pytest.mark.parametrize("argv", [["--local-rank=3"], ["--local_rank=3"], ["--local_rank", "3"], ["--local-rank", "3"]])
def test_the_launchers_rank_is_accepted_quietly(argv):
    resolved = parse([*argv, *DATA])
    assert resolved.options.local_rank == 3 and resolved.notices == []


def test_several_values_and_none():
    argv = "--eval --resume a.pth b.pth --scale 0.5 1 --opt_betas=0.9 0.99 --aa None --clip_grad none"
    o = parse(argv.split() + DATA).options
    assert (o.resume, o.scale, o.opt_betas, o.aa, o.clip_grad) == (
        ("a.pth", "b.pth"), (0.5, 1.0), (0.9, 0.99), None, None)
    assert parse(["--resume", "", *DATA]).options.resume == ()


def test_the_last_of_two_equal_flags_wins():
    assert parse(["--lr", "1", "--lr", "2", *DATA]).options.lr == 2


def test_a_flag_without_effect_has_one_notice():
    resolved = parse([*"--dist_on_itp true --world_size 8 --resplit --amp_dtype fp16 --check --report out".split(), *DATA])
    assert [notice.split()[0] for notice in resolved.notices] == [
        "--resplit", "--world_size", "--dist_on_itp", "--amp_dtype", "--check", "--report"]
    resolved = parse([*"--eval --compile --deterministic true".split(), *DATA])
    assert [notice.split()[0] for notice in resolved.notices] == ["--compile", "--deterministic"]
    for argv, expected in (("--input_size 384 --crop_pct 1", ["--crop_pct"]), ("--input_size 32 --scale 0.5 1", ["--scale"]),
                           ("--input_size 383 --crop_pct 1 --scale 0.5 1", []), ("--input_size 384", [])):
        assert [notice.split()[0] for notice in parse([*argv.split(), *DATA]).notices] == expected


@pytest.mark.parametrize("argv, words", [
    # What the shell makes of the original README's `--clip_grad 5\`: the next line's flag joins the value ...
    ("--model hornet_tiny_7x7 --clip_grad 5--batch_size 128 --lr 4e-3", ["5--batch_size", "stray backslash", "`5 \\`"]),
    ("--data_path /imagenet--output_dir logs", ["--output_dir", "stray backslash"]),
    ("--model_ema true--model_ema_eval true", ["--model_ema_eval", "stray backslash"]),
    ("--model_ema true--lr=1", ["--lr", "stray backslash"]),
])
def test_a_backslash_without_a_space_before_it(argv, words):
    sentence = refused(*argv.split())
    assert all(word in sentence for word in words)


@pytest.mark.parametrize("argv", [["--data_path", "/d", " "], ["--lr", "4e-3", " "], ["--model_ema", "true", "\\ "],
                                  ["--model_ema", " "], ["--resume", "a", " \r"], ["\\"]])
def test_a_backslash_with_a_space_after_it(argv):
    # ... and `\ ` ends the line with an argument that is one space.
    assert "stray backslash" in refused(*argv)


def test_a_path_may_hold_two_hyphens():
    assert parse(["--output_dir", "runs/a--model", *DATA]).options.output_dir == "runs/a--model"


@pytest.mark.parametrize("argv, words", [
    ("--bach_size 3", ["unknown flag --bach_size", "did you mean --batch_size?"]),
    ("--batch-size 3", ["did you mean --batch_size?"]),
    ("--batch 3", ["not abbreviated", "did you mean --batch_size?"]),
    ("--m hornet_tiny_7x7", ["unknown flag --m", "not abbreviated"]),
    ("--zzzz", ["unknown flag --zzzz", "--help all"]),
    ("-lr 3", ["two hyphens", "did you mean --lr?"]),
    ("\u2014lr 3", ["two hyphens", "did you mean --lr?"]),
    ("--", ["`--` alone"]), ("--=3", ["unknown flag --"]),
    ("train", ["'train' belongs to no flag"]),
    ("--lr 1 2", ["'2' belongs to no flag"]),
    ("--lr=1 2", ["'2' belongs to no flag"]),
    ("--lr", ["--lr needs a value"]), ("--lr --epochs 3", ["--lr needs a value"]),
    ("--lr=", ["--lr '' is not accepted"]),
    ("--lr fast", ["--lr 'fast'", "a number above 0"]),
    ("--lr nan", ["--lr nan is out of range"]), ("--lr inf", ["--lr inf"]), ("--lr 1e999", ["--lr 1e999"]),
    ("--lr 0", ["--lr 0 is out of range"]), ("--lr -1", ["--lr -1 is out of range"]),
    ("--epochs 0", ["--epochs 0"]), ("--epochs 1.5", ["whole number"]),
    ("--epochs " + "9" * 5000, ["--epochs '9", "..."]),
    ("--batch_size 0", ["--batch_size 0"]), ("--batch_size -8", ["--batch_size -8"]),
    ("--batch_size none", ["--batch_size 'none'"]), ("--update_freq 0", ["--update_freq 0"]),
    ("--drop_path 1", ["from 0 to below 1"]), ("--mixup_prob 1.1", ["from 0 to 1"]), ("--smoothing 1", ["--smoothing"]),
    ("--weight_decay -0.05", ["0 or more"]), ("--layer_decay 0", ["above 0 and at most 1"]),
    ("--model_ema_decay 1", ["--model_ema_decay 1"]), ("--clip_grad 0", ["--clip_grad 0", "or none"]),
    ("--input_size 16", ["from 32"]), ("--crop_pct 0", ["--crop_pct"]), ("--num_workers -1", ["--num_workers"]),
    ("--scale 0.5", ["twice"]), ("--scale 1 0.5", ["the lower one first"]), ("--cutmix_minmax 0.2 nan", ["nan"]),
    ("--opt_betas 0.9 1", ["below 1"]), ("--model_ema maybe", ["true or false"]),
    ("--clip_by norms", ["norm, value or agc"]), ("--data_set IMAGENET", ["IMNET, image_folder, CIFAR or SAMPLE"]),
    ("--device gpu", ["auto, cpu"]), ("--aa rnd-m9", ["rand-m9-mstd0.5-inc1"]), ("--amp_dtype fp8", ["bf16 or fp16"]),
    ("--model hornet_tny_7x7", ["did you mean hornet_tiny_7x7?"]), ("--model resnet50", ["known are hornet_tiny_7x7"]),
    ("--epochs 5", ["--warmup_epochs 20", "from 0 to 5"]), ("--min_lr 1", ["--min_lr 1", "--lr 0.004"]),
    ("--batch_size 7", ["--batch_size 7 is odd", "mixup"]), ("--start_epoch 300", ["--start_epoch 300"]),
    ("--global_batch 256 --update_freq 2", ["both given"]), ("--global_batch 32", ["below --batch_size 64"]),
    ("--pretrained --finetune x.pth", ["give one of them"]), ("--resume a b", ["--eval true"]),
    ("--weights both", ["--eval true"]),
])
def test_a_mistake_is_one_sentence_with_value_and_fix(argv, words):
    sentence = refused(*DATA, *argv.split())
    assert all(word in sentence for word in words), sentence


def test_data_path_is_asked_for():
    assert "--data_path is missing" in refused("--model", "hornet_tiny_7x7")
    assert parse(["--print_config", "true"]).options.data_path == ""
    assert parse(["--data_set", "SAMPLE"]).options.data_path == "data/digits"
    assert parse(["--eval", "--eval_data_path", "/val"]).options.eval


def test_evaluation_is_not_held_to_training_rules():
    parse([*"--eval true --batch_size 7 --epochs 1 --weights both --resume a b".split(), *DATA])


def test_odd_batches_are_fine_without_mixing():
    parse([*"--batch_size 7 --mixup 0 --cutmix 0".split(), *DATA])


def test_help_shows_twenty_options_and_help_all_every_one(capsys):
    for argv, count in ((["--help"], 20), (["-h"], 20), (["--lr", "nonsense", "--help"], 20),
                        (["--help", "all"], len(fields(Options))), (["--help=all"], len(fields(Options)))):
        with pytest.raises(SystemExit) as ended:
            parse(argv)
        assert ended.value.code == 0
        text = capsys.readouterr().out
        assert sum(line.startswith("  --") for line in text.splitlines()) == count
        assert max(map(len, text.splitlines())) <= 125
    assert all(f.metadata["help"] for f in fields(Options))
    assert "[0.004]" in help_text()


def test_print_config_tells_value_origin_and_difference():
    resolved = parse(["--config", str(ROOT / "recipes/hornet_tiny_7x7.yaml"), "--print_config", "--lr", "1e-3"])
    rows = {line.split()[0]: line for line in resolved.describe().splitlines() if line.startswith("  ")}
    assert set(rows) == {f.name for f in fields(Options)}
    assert rows["lr"].split()[1:] == ["0.001", "flag", "published:", "0.004"]
    assert "recipe" in rows["drop_path"] and "published" not in rows["drop_path"]
    assert rows["seed"].split()[1:] == ["0", "default"]
    assert "1 value(s) depart" in resolved.describe()


def test_a_model_without_a_published_recipe_has_no_differences():
    resolved = parse(["--model", "hornet_nano_7x7", *DATA], MODELS)
    assert resolved.differences() == {} and "no published recipe" in resolved.describe()


def test_to_dict_is_plain():
    values = parse(["--resume", "a", *DATA]).to_dict()
    assert values["resume"] == ["a"] and values["scale"] == [0.08, 1.0]
    plain = (str, int, float, bool, type(None), list)
    assert all(type(v) in plain for v in values.values()) and set(values) == {f.name for f in fields(Options)}


def test_options_do_not_import_torch():
    code = "import sys, config.parse; assert 'torch' not in sys.modules and 'timm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_every_option_that_the_code_reads_exists():
    names = {f.name for f in fields(Options)}
    unknown = []
    rooms = ("datasets", "optim", "launch", "models", "run")
    paths = [*ROOT.glob("*.py"), *(path for room in rooms for path in (ROOT / room).rglob("*.py"))]
    for path in paths:
        if path.name == "run_with_submitit.py":  # it calls the launcher's own options so
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "options":
                if node.attr not in names:
                    unknown.append(f"{path.name}:{node.lineno} {node.attr}")
    assert unknown == []


def plan(argv, world_size, **kwargs):
    return plan_batch(parse([*argv.split(), *DATA], MODELS), world_size, **kwargs)


def test_the_accumulation_follows_from_the_global_batch():
    result = plan("--global_batch 4096 --batch_size 128", 8)
    assert (result.update_freq, result.global_batch, result.lr) == (4, 4096, 4e-3)
    assert result.equation == "4096 pictures per update = 128 per forward pass x 4 forward passes x 8 processes"
    applied = result.apply(Options())
    assert (applied.update_freq, applied.global_batch) == (4, 4096)
    assert plan("--update_freq 4 --batch_size 128", 8).global_batch == 4096


def test_a_global_batch_that_does_not_divide_names_the_nearest():
    with pytest.raises(UserError) as caught:
        plan("--global_batch 1000 --batch_size 128", 3)
    assert "768" in str(caught.value) and "1152" in str(caught.value)
    with pytest.raises(UserError) as caught:
        plan("--global_batch 1200 --batch_size 128", 3)
    assert "--batch_size 100" in str(caught.value)
    assert plan("--global_batch 1200 --batch_size 100", 3).update_freq == 4


def test_the_checkpoints_global_batch_wins():
    result = plan("--batch_size 128 --update_freq 1", 2, checkpoint_batch=4096)
    assert result.update_freq == 16 and "kept" in result.notices[0]
    with pytest.raises(UserError, match="512 differs from the checkpoint's 4096"):
        plan("--batch_size 128 --global_batch 512", 2, checkpoint_batch=4096)
    with pytest.raises(UserError) as caught:
        plan("--batch_size 128", 3, checkpoint_batch=512)
    assert "1, 2, 4" in str(caught.value)


@pytest.mark.parametrize("argv, lr", [("", 4e-3), ("--lr_scale linear", 5e-4), ("--lr_scale sqrt", 4e-3 * 8 ** -0.5)])
def test_learning_rate_for_another_global_batch(argv, lr):
    result = plan(f"--model hornet_tiny_7x7 --batch_size 64 {argv}", 8)
    assert result.lr == pytest.approx(lr)
    told = " ".join(result.notices)
    assert told == "" if argv else all(word in told for word in ("512", "4096", "0.0005", "--update_freq 8 "))


def test_no_word_about_the_batch_when_it_is_the_recipes():
    assert plan("--model hornet_tiny_7x7 --batch_size 128 --update_freq 4", 8).notices == ()
    assert plan("--model hornet_nano_7x7", 1).notices == ()


def test_a_flag_replaces_the_recipes_global_batch():
    resolved = parse(["--config", str(ROOT / "recipes/hornet_tiny_7x7.yaml"), "--update_freq", "1", *DATA], MODELS)
    assert len(resolved.notices) == 1 and "replaces" in resolved.notices[0]
    result = plan_batch(resolved, 8)
    assert result.global_batch == 1024 and "0.001 instead of 0.004" in result.notices[0]
    assert "--update_freq 4 " in result.notices[0]


def test_after_the_index_zero_updates_are_refused_with_a_fix():
    options = parse(["--batch_size", "64", "--update_freq", "4", *DATA]).options
    batch = plan("--batch_size 64 --update_freq 4", 2)
    assert validate_after_index(options, batch, 1000, 10) == 1
    with pytest.raises(UserError, match="500 training pictures.*--update_freq to 3"):
        validate_after_index(options, batch, 500, 10)
    with pytest.raises(UserError, match="--batch_size to 50 or less"):
        validate_after_index(options, batch, 101, 10)
    with pytest.raises(UserError, match="fewer than 2 processes"):
        validate_after_index(options, batch, 1, 10)


def test_after_the_index_classes_and_warmup_steps():
    options = parse(["--nb_classes", "10", "--warmup_steps", "301", *DATA]).options
    batch = plan("", 1)
    with pytest.raises(UserError, match="--nb_classes 10 is below the 12 classes"):
        validate_after_index(options, batch, 100, 12)
    with pytest.raises(UserError, match="--warmup_steps 301 .* 300 updates"):
        validate_after_index(options, batch, 100, 10)


flag = st.sampled_from([f"--{f.name}" for f in fields(Options) if f.name != "config"] + ["--config", "--local-rank"])
word = st.one_of(st.text(max_size=12),
                 st.sampled_from(["true", "none", "0", "-1", "1e-3", "nan", "a.pth", " ", "\\", "=", ""]),
                 st.floats().map(str), st.integers().map(str))
token = st.one_of(flag, word, st.builds("{}={}".format, flag, word), st.builds("{}{}".format, word, flag))


@settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(token, max_size=8))
@example(["--lr", "\ud800"])
def test_no_command_line_makes_a_traceback(argv):
    try:
        resolved = parse(argv, MODELS)
        plan_batch(resolved, 3)
    except UserError as error:
        assert str(error).strip()
    except SystemExit as ended:
        assert ended.code == 0 and any(part.startswith(("-h", "--help")) for part in argv)


yaml_text = st.one_of(
    st.text(max_size=80), st.binary(max_size=80),
    st.lists(st.builds("{}: {}".format, st.sampled_from([f.name for f in fields(Options)]), word), max_size=5)
    .map("\n".join))


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=yaml_text)
@example(text="a: &a [*a]")
@example(text="lr: &a [*a]")
@example(text="!!timestamp 2001-99-99: 1")
def test_no_recipe_makes_a_traceback(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    try:
        resolved = parse(["--config", str(path)], MODELS)
        assert parse(["--config", str(path)], MODELS).to_dict() == resolved.to_dict()
    except UserError as error:
        assert str(error).strip()
