"""How much of the gap could be closed at all: a large predictor, trained offline on a model."""
