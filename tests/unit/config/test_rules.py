"""Contradictions, the batch plan, and what small data need said."""
import pytest

from config.parse import RECIPES, parse
from config.rules import plan_batch
from plan import plan_run
from tests.kits.errors import refused
from tests.kits.toy import Alone


def options(argv):
    return parse(["--model", "hornet_nano_7x7", *argv.split(), "--data_path", "/data"])


def plan(argv, world_size, images=1_281_167, **kwargs):
    resolved = options(argv)
    return plan_batch(resolved.options, world_size, images, lr_batch=resolved.lr_batch, **kwargs)


@pytest.mark.parametrize("argv, named", [
    ("--epochs 5", ["--epochs 5", "--warmup_epochs 20"]), ("--min_lr 1", ["--min_lr 1", "--lr 0.004"]),
    ("--batch_size 7", ["--batch_size 7", "--mixup 0"]), ("--start_epoch 300", ["--epochs 300", "--start_epoch 300"]),
    ("--global_batch 256 --update_freq 2", ["--global_batch 256", "--update_freq 2"]),
    ("--pretrained --finetune x.pth", ["--pretrained", "--finetune x.pth"]),
    ("--resume a b", ["--eval true"]), ("--weights both", ["--eval true"]), ("--suite v2", ["--eval true"])])
def test_contradictions_are_refused(argv, named):
    with refused("contradiction", *named):
        options(argv)


def test_data_path_is_asked_for_and_evaluation_is_not_held_to_training_rules():
    with refused("missing_data", "--data_path"):
        parse([])
    assert parse(["--print_config", "true"]).options.data_path == ""
    assert parse(["--data_set", "SAMPLE"]).options.data_path == "data/digits"
    assert parse(["--eval", "--eval_data_path", "/val"]).options.eval
    options("--eval true --batch_size 7 --epochs 1 --weights both --resume a b")
    options("--batch_size 7 --mixup 0 --cutmix 0")


def test_the_accumulation_follows_from_the_global_batch_and_the_checkpoints_wins():
    result = plan("--global_batch 4096 --batch_size 128", 8)
    assert (result.update_freq, result.global_batch, result.lr, result.notices) == (4, 4096, 4e-3, ())
    assert result.equation == "4096 images per update = 128 per forward pass x 4 forward passes x 8 processes"
    assert plan("--update_freq 4 --batch_size 128", 8).global_batch == 4096
    assert plan(f"--config {RECIPES / 'hornet_tiny_7x7.yaml'} --update_freq 1", 8).global_batch == 1024
    with refused("batch", "--global_batch 1000", "--global_batch 768 --batch_size 128"):
        plan("--global_batch 1000 --batch_size 128", 3)
    with refused("batch", "--global_batch 32 ", "--global_batch 32 --batch_size 32"):
        plan_run(options("--global_batch 32 --batch_size 64"), Alone(), None)  # before a folder is looked for
    assert plan("--global_batch 768 --batch_size 128", 3).update_freq == 2
    result = plan("--batch_size 128 --update_freq 1", 2, checkpoint_batch=4096)
    assert result.update_freq == 16 and "4096" in result.notices[0]
    assert plan("--batch_size 128", 3, checkpoint_batch=300).batch_size == 100
    assert plan("--batch_size 8", 2, checkpoint_batch=20).batch_size == 2  # 5 would leave one unmixed
    with refused("batch", "--global_batch 512", "4096"):
        plan("--batch_size 128 --global_batch 512", 2, checkpoint_batch=4096)
    with refused("batch", "512", "3 processes"):
        plan("--batch_size 128", 3, checkpoint_batch=512)


@pytest.mark.parametrize("argv, world_size, lr", [
    ("", 8, 4e-3), ("--lr_scale linear", 8, 5e-4), ("--lr_scale sqrt", 8, 4e-3 * 8 ** -0.5),
    (f"--config {RECIPES / 'finetune.yaml'} --lr_scale linear", 4, 2.5e-4 * 256 / 128)])
def test_learning_rate_for_another_global_batch(argv, world_size, lr):
    assert plan(f"{argv} --batch_size 64 --update_freq 1", world_size).lr == pytest.approx(lr)
    with refused("contradiction", "--lr_scale linear", "0.0005", "--min_lr 0.001"):
        plan("--lr_scale linear --min_lr 1e-3", 8)


def test_an_epoch_without_an_update_and_too_long_a_warm_up_are_refused_with_a_fix():
    assert plan("--batch_size 64 --update_freq 4", 2, 1000).updates_per_epoch == 1
    for images, fix in ((500, "--global_batch 384 --batch_size 64"), (103, "--global_batch 100 --batch_size 50"),
                        (1, "fewer processes")):
        with refused("batch", str(images), fix):
            plan("--batch_size 64 --update_freq 4", 2, images)
    with refused("contradiction", "--warmup_steps 301", "300 updates"):
        plan("--warmup_steps 301", 1, 100)


@pytest.mark.parametrize("argv, world_size, images, expected", [
    # 96 of 224 images unused in every epoch and 30 updates in all
    ("--epochs 30 --batch_size 128", 1, 224, ["128 of the 224", "30 updates", "--global_batch 22 --batch_size 22"]),
    ("--epochs 30 --batch_size 128", 2, 448, ["256 of the 448", "--global_batch 44 --batch_size 22"]),
    ("--epochs 300 --batch_size 128", 1, 1_281_167, None), ("--epochs 30 --batch_size 64", 1, 1437, None),
    ("--epochs 300 --batch_size 600", 1, 1000, ["600 of the 1000", "300 updates"]),
    ("--epochs 1 --batch_size 2 --warmup_epochs 0", 1, 2, ["1 update;"])])
def test_small_data_is_named_with_a_batch_that_fits(argv, world_size, images, expected):
    sentence = " ".join(plan(argv, world_size, images).notices)
    assert bool(sentence) == bool(expected) and all(words in sentence for words in expected or ()), sentence
    if images > 100 and sentence:
        fitting = sentence[sentence.index("--global_batch"):].split(" without")[0]
        better = plan(f"--epochs 30 {fitting}", world_size, images)
        assert better.updates_per_epoch >= 10 and better.notices == ()
