"""Timed measurements that asv and pytest-benchmark both run. One file each; no list of them.

`time_*` methods are timed, `track_*` methods return a figure (a ratio, as machines are noisy).
"""
