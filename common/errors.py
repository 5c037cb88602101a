"""Errors that are meant for the person at the terminal."""


class UserError(ValueError):
    """A mistake the user can mend: one sentence with the value, what is accepted, and the fix.

    `main.py` and every tool print the sentence without a traceback and end with exit code 2.
    """
