"""The table of methods: what each is called, its settings and their defaults.

A method's arithmetic is in a file of its own, which is imported when the
method is used: what is here imports neither JAX nor arrays, so that flags,
configs and --help need not wait for them.
"""

from dataclasses import KW_ONLY, dataclass, replace

from vera_jax.adapters.method import QUERY_VALUE, Method, NoSettings, setting
from vera_jax.adapters.rate_rule import lora_distance, vera_distance

ALL = r".*"  # the pattern of every leaf
# The init of projections that no seed gives: A and B lie in the adapter's file.
STORED = "stored"
STRUCTURED = "structured"  # a pair that is never stored: `structured.py`
INITIALISERS = (
  *("kaiming_uniform", "kaiming_normal", "uniform", "orthogonal"),
  *("rademacher", "sparse_third", "sparse_root", "ones"),
  *(STRUCTURED, "peft"),
)
# The feed-forward's output layer, as each family of encoders names it.
OUTPUT_LAYERS = r"layer(_\d+)?/output/dense|lin2|mlp/Wo"


@dataclass(frozen=True)
class PairSettings:
  """What a method with VeRA's d, b, A and B has, and all that PVeRA has."""

  rank: int = setting(256, "r; may exceed the layers' widths", least=1)
  _: KW_ONLY
  d_init: float = setting(
    0.1, "the value that every entry of d starts from; b starts at 0"
  )
  init: str = setting(
    "kaiming_uniform", "how A and B are drawn", choices=(*INITIALISERS, STORED)
  )
  projection_seed: int = setting(0, "the seed of A and B", least=0)


@dataclass(frozen=True)
class VeraSettings(PairSettings):
  _: KW_ONLY
  train: str = setting(
    "both",
    "the trained vectors (Table 6); where b isn't, it counts as 1 and d starts"
    " at 0; where d isn't, it stays at d_init",
    choices=("both", "d", "b"),
  )
  sharing: str = setting(
    "shared",
    "one pair A, B for all layers, or one per layer (Table 7)",
    choices=("shared", "unique"),
  )
  conv: str = setting(
    "whole",
    "how a convolution's kernel is adapted: with r + out numbers, or with"
    " taps * r + out",
    choices=("whole", "taps"),
  )
  pair: str = setting(
    "", "with init=stored, the folder of an adapter whose A and B are taken"
  )


@dataclass(frozen=True)
class TiedLoraSettings:
  rank: int = setting(16, "r; may exceed the layers' widths", least=1)
  _: KW_ONLY
  d_init: float = setting(
    0.1, "the value that every entry of d starts from; b starts at 0"
  )


@dataclass(frozen=True)
class LoraSettings:
  rank: int = setting(8, "r", least=1)
  _: KW_ONLY
  alpha: float = setting(8.0, "the delta's scale, over what scaling says")
  scaling: str = setting(
    "rank",
    "alpha over the rank, or over its root, as rsLoRA has it",
    choices=("rank", "root"),
  )


@dataclass(frozen=True)
class SeededLoraSettings(LoraSettings):
  projection_seed: int = setting(0, "the seed of A", least=0)


@dataclass(frozen=True)
class Ia3Settings:
  _: KW_ONLY
  feedforward: tuple[str, ...] = setting(
    (),
    "patterns of those targets whose inputs are scaled; of all others the"
    " outputs are",
  )


@dataclass(frozen=True)
class RandloraSettings:
  rank: int = setting(
    32,
    "r; a lower one means more matrices and more trained numbers",
    least=1,
  )
  _: KW_ONLY
  alpha: float = setting(
    640.0, "over the rank, the delta's scale; 20 times the rank in PEFT"
  )
  init: str = setting(
    "uniform",
    "how A and the B_j are drawn; peft draws PEFT's own",
    choices=("uniform", "peft", STORED),
  )
  projection_seed: int = setting(0, "the seed of A and the B_j", least=0)


@dataclass(frozen=True)
class UniloraSettings:
  rank: int = setting(4, "r, of the A and B that are made", least=1)
  _: KW_ONLY
  size: int = setting(
    4096,
    "theta's length, all that is trained; PEFT's default, 256, is too short for"
    " most uses",
    least=1,
  )
  theta_init: float = setting(
    0.02, "theta starts uniform in [-theta_init, theta_init)"
  )
  projection_seed: int = setting(
    42, "the seed that the indices come from", least=0
  )


@dataclass(frozen=True)
class LoraXsSettings:
  rank: int = setting(
    16, "r, at most the layer's smaller width, which it else is", least=1
  )
  _: KW_ONLY
  alpha: float = setting(
    16.0, "over the rank, the delta's scale; the authors' code has 16"
  )
  init_std: float = setting(
    0.0, "R's deviation at the start, 1e-5 in the paper", least=0
  )


@dataclass(frozen=True)
class Biases:
  _: KW_ONLY
  biases: str = setting(
    ALL,
    "a pattern of the layers whose biases are trained, LayerNorms' among them:"
    " query|value for these two alone, as the paper also tries",
  )


vera = Method(
  "vera",
  "vera:make_vera",
  VeraSettings,
  config=dict(targets=QUERY_VALUE, lr=None, head_lr=None),
  # where b is trained alone, d stays at d_init, a constant of the program
  starts=lambda s: (
    ("init", "pair", "projection_seed")
    if s.train == "b"
    else ("d_init", "init", "pair", "projection_seed")
  ),
  per_run=lambda s: ("d_init",) if s.train == "both" else (),
  distance=vera_distance,
  title="VeRA",
  weights="W0 + diag(b) B diag(d) A",
  trained="r + o",
  paper="2310.11454",
)
lora = Method(
  "lora",
  "lora:make_lora",
  LoraSettings,
  config=dict(targets=QUERY_VALUE, lr=4e-4, head_lr=4e-4),
  distance=lora_distance,
  title="LoRA",
  weights="W0 + (alpha / r) B A",
  trained="r (i + o)",
  paper="2106.09685",
)
ia3 = Method(
  "ia3",
  "ia3:make_ia3",
  Ia3Settings,
  config=dict(
    targets=("key", "value", OUTPUT_LAYERS),
    feedforward=(OUTPUT_LAYERS,),
    lr=1e-2,
    head_lr=4e-3,
  ),
  title="IA3",
  weights="diag(l) W0, or W0 diag(l)",
  trained="o, or i",
  paper="2205.05638",
)
dora = replace(
  lora,
  name="dora",
  make="magnitude:make_dora",
  distance=None,  # the rule knows nothing of magnitudes
  title="DoRA",
  weights="m W / ‖W‖ of LoRA's W",
  trained="r (i + o) + o",
  paper="2402.09353",
)
dvora = replace(
  vera,
  name="dvora",
  make="magnitude:make_dvora",
  distance=None,
  title="DVoRA",
  weights="m W / ‖W‖ of VeRA's W",
  trained="r + 2 o",
  paper="2402.09353",
)
pvera = Method(
  "pvera",
  "pvera:make_pvera",
  PairSettings,
  config=dict(targets=QUERY_VALUE, lr=1e-2, head_lr=4e-3),
  starts=lambda s: ("d_init", "init", "projection_seed"),
  per_run=lambda s: ("d_init",),
  title="PVeRA",
  weights="VeRA's; B's inputs drawn in training",
  trained="2 r + o",
  paper="2512.07703",
)
onelora = Method(
  "onelora",
  "vera:make_onelora",
  NoSettings,
  config=dict(targets=QUERY_VALUE, lr=4e-4, head_lr=4e-3),
  title="1LoRA",
  weights="W0 + b 1ᵀ",
  trained="o",
  paper="2503.08333",
)
lora_fa = Method(
  "lora_fa",
  "lora:make_lora_fa",
  SeededLoraSettings,
  config=dict(targets=QUERY_VALUE, lr=4e-3, head_lr=4e-3),
  starts=lambda s: ("projection_seed",),
  title="LoRA-FA",
  weights="LoRA's, A random",
  trained="r o",
  paper="2308.03303",
)
randlora = Method(
  "randlora",
  "randlora:make_randlora",
  RandloraSettings,
  config=dict(targets=QUERY_VALUE, lr=1e-3, head_lr=4e-3),
  starts=lambda s: ("init", "projection_seed"),
  title="RandLoRA",
  weights="W0 + (alpha / r) Σⱼ Bⱼ diag(λⱼ) A diag(γⱼ), n = ⌈min / r⌉ terms",
  trained="n (r + min)",
  paper="2502.00987",
)
unilora = Method(
  "unilora",
  "unilora:make_unilora",
  UniloraSettings,
  config=dict(targets=QUERY_VALUE, lr=4e-3, head_lr=4e-3),
  starts=lambda s: ("theta_init", "projection_seed"),
  per_run=lambda s: ("theta_init",),
  title="Uni-LoRA",
  weights="W0 + B A, all entries from one vector",
  trained="size, in all",
  paper="2506.00799",
)
lora_xs = Method(
  "lora_xs",
  "lora_xs:make_lora_xs",
  LoraXsSettings,
  config=dict(targets=QUERY_VALUE, lr=1e-3, head_lr=4e-3),
  starts=lambda s: ("init_std",),
  per_run=lambda s: ("init_std",),
  title="LoRA-XS",
  weights="W0 + (alpha / r) of W0's Uᵣ Sᵣ and Vᵣ, R between them",
  trained="r * r",
  paper="2405.17604",
)
tied_lora = Method(
  "tied_lora",
  "tied_lora:make_tied_lora",
  TiedLoraSettings,
  config=dict(targets=QUERY_VALUE, lr=1e-3, head_lr=4e-3),
  starts=lambda s: ("d_init",),
  per_run=lambda s: ("d_init",),
  title="Tied-LoRA",
  weights="VeRA's; A and B are trained as well",
  trained="r + o + r (i + o), the pair once in all",
  paper="2311.09578",
)
bitfit = Method(
  "bitfit",
  "base_leaves:make_bitfit",
  Biases,
  config=dict(lr=1e-3, head_lr=1e-3),
  title="BitFit",
  weights="W0; the base's biases are trained",
  paper="2106.10199",
)
norms = Method(
  "norms",
  "base_leaves:make_norms",
  NoSettings,
  config=dict(lr=1e-3, head_lr=1e-3),
  title="norms alone",
  weights="W0; scales and biases of what normalises are trained",
  paper="2003.00152",
)
head = Method(
  "head",
  "base_leaves:make_head",
  NoSettings,
  config=dict(head_lr=None),
  title="head alone",
  weights="W0; the head alone is trained",
  trained="0",
)
full = Method(
  "full",
  "base_leaves:make_full",
  NoSettings,
  config=dict(lr=2e-5, head_lr=2e-5),
  title="full",
  weights="all weights are trained",
)

# In the order of tables.
METHODS: dict[str, Method] = {
  method.name: method
  for method in (
    *(vera, lora, ia3, dora, dvora, pvera, onelora, lora_fa, randlora),
    *(unilora, lora_xs, tied_lora, bitfit, norms, head, full),
  )
}
