"""Datapoints: one small file a machine in results/datapoints/, as schema.json has it.

files    where they lie and what they are called
machine  what a machine is, without anything of whose it is
measure  a whole one, in at most 15 minutes
check    which files are malformed or impossible
"""
