"""The referee: measures the drive, runs the systems, writes the tables under results/."""
