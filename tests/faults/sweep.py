"""A sweep of twelve runs for the fault tests: two methods, six seeds.

The rest is the quickstart's, as the tests' flags change it.
"""

from ml_collections import ConfigDict

from configs import quickstart
from configs.sweeps import cross, product, seeds, sweep


def get_config(count: str = "6") -> ConfigDict:
  methods = product({"method": ("vera", "lora")})
  runs = cross(methods, seeds(range(int(count))))
  return sweep("Faults", quickstart.get_config(), runs)
