"""What must not fail: faults, damaged files, hours of use. Imports no tables."""
