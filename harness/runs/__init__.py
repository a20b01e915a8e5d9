"""One system, once: what it is told, its limits, its clock. Imports neither tables nor report."""
