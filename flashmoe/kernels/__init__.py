"""Ways to multiply by a plain weight that are faster than torch's own, where they are.

torch_threads  where machine code runs
by_rows        a few tokens, by machine code
by_tiles       many tokens, in float32
choice         which is the fastest here
"""
