"""What every refusal has to be: one sentence with a code that names the value, the flag or the path."""
import os
from contextlib import contextmanager

import pytest

from common.errors import UserError


@contextmanager
def refused(code: str, *named: object):
    """The block raises UserError with `code` (or one of several), its one sentence has each of `named` in it."""
    with pytest.raises(UserError) as error:
        yield error
    sentence = str(error.value)
    assert error.value.code in code.split(), (error.value.code, sentence)
    assert all(str(word) in sentence for word in named), sentence
    assert "\n" not in sentence and sentence[-1] in ".?" and len(sentence) < 600, sentence


class Hostile:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)
