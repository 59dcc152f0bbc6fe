"""Many runs in one folder: planned, divided among machines, resumed.

plan.py      which runs there are, where they stand, which train together
estimate.py  how long it takes
worker.py    the process that trains a unit
launchers/   starts the workers: on this machine, by SLURM, by Ray
runner.py    gives them the units until all is done
table.py     what a person sees of it
"""
