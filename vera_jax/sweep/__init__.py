"""Many runs in one folder: planned, shared out, kept, gone on with.

plan.py      which runs there are, where they stand, which train together
lock.py      one process at a time has a run
estimate.py  how long it takes
worker.py    the process that trains a unit
conduct.py   starts the workers, one after another
progress.py  how far a run has come, by its files
table.py     what a person sees of it
"""
