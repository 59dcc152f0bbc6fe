"""Who starts the workers of a sweep's units.

launcher.py  what the sweep asks of each, and the choice by name
process.py   a unit's worker as a child process, wherever it is started
local.py     on this machine, one unit after another
slurm.py     as jobs of a SLURM cluster, by submitit
ray.py       as tasks of a Ray cluster
"""

NAMES = ("local", "slurm", "ray")
