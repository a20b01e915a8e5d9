"""The one exception that users see: a sentence that says what, where and what to do."""


class FlashMoEError(Exception):
    """Anything the user can act on. The command line prints it and exits with status 1."""
