"""Options as the data room reads them, with small defaults for tests."""
from config.options import Options


def data_options(**changes) -> Options:
    """The published recipe at 64 pixels on the digits, without workers and without a kept index."""
    return Options(**{"data_set": "SAMPLE", "input_size": 64, "batch_size": 8, "num_workers": 0,
                      "index_cache": "/dev/null/no-cache", **changes})
