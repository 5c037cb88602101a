"""The one exception that is a sentence for the person at the terminal."""


class UserError(ValueError):
    """What the user can fix: one sentence with the value, what is accepted and the fix.

    `code` names the kind of mistake (`unknown_flag`, `unreadable_image`) for tests and scripts, because the
    sentence may change.
    """

    def __init__(self, sentence: str, code: str = "usage"):
        super().__init__(sentence)
        self.code = code
