"""Options as the data rooms read them, with small defaults for tests."""
from types import SimpleNamespace


def data_options(**changes) -> SimpleNamespace:
    """Defaults of the published recipe at 32 or 64 pixels, without workers."""
    values = dict(
        data_set="SAMPLE", data_path="", eval_data_path=None, nb_classes=None, input_size=64, crop_pct=None,
        imagenet_default_mean_and_std=True, color_jitter=0.4, aa="rand-m9-mstd0.5-inc1", train_interpolation="bicubic",
        reprob=0.25, remode="pixel", recount=1, hflip=0.5, scale=(0.08, 1.0), batch_size=8, num_workers=0, pin_mem=True,
        seed=0, allow_bad_images=False, allow_class_mismatch=False, val_labels=None, reindex=False, index_cache="/dev/null/no-cache",
        mixup=0.8, cutmix=1.0, cutmix_minmax=None, mixup_prob=1.0, mixup_switch_prob=0.5, mixup_mode="batch",
        smoothing=0.1)
    values.update(changes)
    return SimpleNamespace(**values)
