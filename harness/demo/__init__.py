"""How the shipped demo model was made: corpus -> train -> describe. Not needed to use it."""
