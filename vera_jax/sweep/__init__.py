"""Many runs in one folder: planned, divided among machines, resumed.

plan.py      which runs there are, where they stand, which train together
estimate.py  how long it takes
worker.py    the process that trains a unit
runner.py    starts the workers, one after another
table.py     what a person sees of it
"""
