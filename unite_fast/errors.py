"""The one exception that stands for a user's mistake."""


class UserError(Exception):
    """What went wrong, where, and what to do about it; shown as one message without a traceback."""
