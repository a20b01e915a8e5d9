"""What a model would do on this machine, before it is fetched or loaded (docs/plan.md).

formula    seconds of a token and of a prompt
measured   the figures that the formula takes from committed tables
machine    what this machine has
planner    budgets, and what to expect of each
choice     which file of several
report     all of it, and how it is told
"""
