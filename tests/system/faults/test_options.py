"""Mistakes on the command line and in recipes: one sentence, exit code 2."""
from run.preflight import cpus_per_process
from tests.kits.faults import Row, check, table


def recipe(text: str):
    """A recipe of the person's own at {here}/r.yaml."""
    return lambda place: (place.here / "r.yaml").write_text(text)


def untouched(place):
    """A refused command line has made no run folder."""
    assert not place.run.exists()


def recorded(place):
    """The run ended and its folder says so."""
    assert '"DONE"' in (place.run / "status.json").read_text()


@table([
    Row("unknown model", "--model hornet_tny_7x7", 2, ("did you mean hornet_tiny_7x7?",), after=untouched),
    Row("another family's model", "--model resnet50", 2, ("--model resnet50 is not known; known are hornet_tiny_7x7",)),
    Row("unknown flag", "--batchsize 8", 2, ("unknown flag --batchsize; did you mean --batch_size?",)),
    Row("abbreviated flag", "--batch 8", 2, ("flags are not abbreviated", "--batch_size?")),
    Row("flag without its value", "--lr", 2, ("--lr needs a value",)),
    Row("value without a flag", "8", 2, ("'8' belongs to no flag",)),
    Row("joined by a backslash", "--clip_grad 5--batch_size 8", 2, ("stray backslash", "--batch_size")),
    Row("misspelt recipe key", "--config {here}/r.yaml", 2, ("unknown key 'weigth_decay'; did you mean weight_decay?",),
        recipe("weigth_decay: 1\n")),
    Row("recipe key given twice", "--config {here}/r.yaml", 2,
        ("line 2: the key 'lr' is given twice",), recipe("lr: 1\nlr: 2\n")),
    Row("recipe without its folder", "--config quickstart.yaml", 2, ("did you mean recipes/quickstart.yaml?",)),
    Row("recipe that is no text", "--config {data}/train/cat/0.JPEG", 2, ("is not a text file",)),
    Row("not a number", "--lr nan", 2, ("--lr nan is out of range; it takes a number above 0",)),
    Row("warm-up longer than the run", "--warmup_epochs 3", 2, ("--warmup_epochs from 0 to 1",)),
    Row("odd batch with mixup", "--mixup 0.8 --batch_size 7", 2, ("--batch_size 7 is odd", "--mixup 0 --cutmix 0")),
    Row("batch larger than the data", "--batch_size 64", 2,
        ("more than the 16 training pictures", "lower --batch_size to 16")),
    Row("accumulation larger than the data", "--update_freq 4", 2, ("lower --update_freq to 2",)),
    Row("global batch that nothing divides", "--global_batch 12", 2,
        ("nearest: --global_batch 8 or --global_batch 16",)),
    Row("classes fewer than the folders", "--nb_classes 1", 2, ("--nb_classes 1 does not fit the 2 class folders",)),
    # Both before the pictures are indexed, which takes minutes.
    Row("unknown optimizer", "--opt adamww", 2, ("--opt adamww", "did you mean adamw"), unsaid=("train: ",)),
    Row("a start that is not there", "--finetune nothere.pth", 2, ("No checkpoint at nothere.pth",), unsaid=("train: ",)),
    Row("more loader processes than CPUs", f"--num_workers {cpus_per_process(1) + 1}", 0,
        ("of this process; more than these load nothing faster.",)),
    Row("unknown augmentation", "--aa autoaugment", 2, ("--aa autoaugment is out of range", "rand-m9-mstd0.5-inc1")),
    Row("two checkpoints to train from", "--resume a b", 2, ("--resume takes one checkpoint in training",)),
    Row("two starts", "--pretrained true --finetune x", 2, ("both name the weights to start from",)),
    Row("nothing published for the model", "--pretrained true", 2, ("There is no published file for hornet_pico_7x7",)),
    Row("nothing to evaluate", "--eval true", 2, ("nothing to evaluate: give --resume CHECKPOINT",), after=untouched),
    Row("latest of an empty folder", "--resume latest", 2, ("holds no checkpoint",)),
    Row("best without a folder", "--eval true --resume best --output_dir ''", 2, ("give --output_dir",)),
    Row("run folder that is a file", "--output_dir {data}/train/cat/0.JPEG", 2, ("--output_dir", "cannot be used")),
    Row("report folder that is a file",
        "--eval true --resume {trained}/checkpoint-0.pth --report {data}/train/cat/0.JPEG", 2,
        ("--report", "cannot be used")),
    Row("a check without a published figure", "--eval true --resume {trained}/checkpoint-0.pth --check true", 1,
        ("--check true: nothing to compare with",)),
    Row("a log folder that cannot be", "--log_dir {data}/train/cat/0.JPEG", 0, ("No TensorBoard log",), after=recorded),
])
def test_options(row, place, capfd):
    check(row, place, capfd)
