"""The exceptions that are a sentence for the person at the terminal."""
from common.outcome import ExitCode


class UserError(ValueError):
    """What the user can fix: one sentence with the value, what is accepted and the fix.

    `code` names the kind of mistake (`unknown_flag`, `unreadable_image`) for tests and scripts; the sentence
    may change. `exit_code` is that of the program.
    """

    exit_code = ExitCode.USAGE

    def __init__(self, sentence: str, code: str = "usage"):
        super().__init__(sentence)
        self.code = code


class Failure(UserError):
    """What no change of the command line fixes and what may pass: a peer that did not arrive, a lost disk.

    A scheduler may start such a run again; another UserError would only be repeated.
    """

    exit_code = ExitCode.FAILED
