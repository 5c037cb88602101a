"""What every refusal has to be: one sentence with a code that names the value, the flag or the path."""
from contextlib import contextmanager

import pytest

from common.errors import UserError


@contextmanager
def refused(code: str, *named: str):
    """The block raises UserError with `code`, and its sentence has each of `named` in it."""
    with pytest.raises(UserError) as error:
        yield
    assert error.value.code == code, (error.value.code, str(error.value))
    assert all(str(word) in str(error.value) for word in named), str(error.value)
