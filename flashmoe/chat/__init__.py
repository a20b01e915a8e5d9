"""A conversation in the terminal with a model that a child process serves."""
