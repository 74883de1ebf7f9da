"""The one exception whose text is meant for the person at the keyboard."""


class UserError(ValueError):
    """Bad input, said in one sentence: what was given, what was expected, what to do.

    `main` prints the sentence without a traceback and exits with status 2.
    """
