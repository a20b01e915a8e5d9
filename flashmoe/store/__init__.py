"""The expert store: a directory with every expert of a model as one aligned extent."""
