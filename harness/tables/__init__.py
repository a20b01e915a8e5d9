"""Many runs or replays, compared: one file a table. Imports runs and report."""
