"""Adapters to and from PEFT, live: the same logits on both sides."""

import jax
import numpy as np
import pytest

from benchmarks.peft_steps import compare
from vera_jax.adapters.files import load_adapter
from vera_jax.peft_io import export_adapter, import_adapter
from vera_jax.pretrained.classifier import restore_adapter

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = [
  pytest.mark.parity,
  # PEFT's own, at import and construction
  pytest.mark.filterwarnings("ignore"),
]

LABELS, RANK = 3, 8
SIZES = {
  "vocab_size": 100,
  "hidden_size": 32,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "intermediate_size": 48,
  "max_position_embeddings": 40,
  "initializer_range": 0.2,
}
KINDS = {
  "bert": (transformers.BertConfig, transformers.BertModel),
  "roberta": (transformers.RobertaConfig, transformers.RobertaModel),
}
LEAVES = ("vera_", "lora_", "magnitude_", "ia3_")  # "pvera_" has "vera_" in it
IDS = np.random.default_rng(1).integers(5, 100, (3, 9))
SHAPES = ["query", "value", "intermediate.dense"]  # two shapes of layers
VARIANTS = {
  "list": {"target_modules": SHAPES},
  "regex": {"target_modules": r".*layer\.1\..*(query|output\.dense)"},
  "some layers": {
    "target_modules": SHAPES,
    "layers_to_transform": [1],
    "layers_pattern": "layer",
  },
  "all": {"target_modules": "all-linear"},
  "feed-forward": {  # both output layers, as by PEFT's default, of one block
    "target_modules": r".*layer\.1\..*(key|value|output\.dense)",
    "feedforward_modules": r".*output\.dense",
  },
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
  """Random encoders' folders by kind, without a head."""
  folders = {}
  for kind, (config, model) in KINDS.items():
    folders[kind] = tmp_path_factory.mktemp(kind)
    torch.manual_seed(0)
    model(config(**SIZES)).save_pretrained(folders[kind])
  return folders


def torch_model(base):
  torch.manual_seed(1)  # of the new head
  return transformers.AutoModelForSequenceClassification.from_pretrained(
    base, num_labels=LABELS
  ).eval()


def trained_by_peft(base, config, folder):
  """The model of an adapter that PEFT trained for a few steps and saved."""
  model = peft.get_peft_model(torch_model(base), config)
  groups = {True: [], False: []}
  for name, value in model.named_parameters():
    if value.requires_grad:
      groups["classifier" in name].append(value)
  optimiser = torch.optim.AdamW(
    [
      {"params": groups[True], "lr": 1e-2},
      {"params": groups[False], "lr": 1e-1},
    ]
  )
  labels = torch.tensor([0, 1, 2])
  for _ in range(3):
    model(input_ids=torch.from_numpy(IDS), labels=labels).loss.backward()
    optimiser.step()
    optimiser.zero_grad()
  model.save_pretrained(folder)
  return model.eval()


def assert_same(folder, base, model):
  """Our folder's logits are those of PEFT's model, and not its base's."""
  restored = restore_adapter(load_adapter(folder), base)
  ours = jax.jit(restored.module.apply)(restored.variables, IDS)[:, 0]
  with torch.no_grad():
    theirs = model(input_ids=torch.from_numpy(IDS)).logits.numpy()
    model.base_model.disable_adapter_layers()  # the head stays
    bare = model(input_ids=torch.from_numpy(IDS)).logits.numpy()
    model.base_model.enable_adapter_layers()
  print("largest logit difference", np.abs(ours - theirs).max())
  np.testing.assert_allclose(ours, theirs, atol=1e-4)
  assert np.abs(theirs - bare).max() > 0.01


def numbers(tensors, *words):
  """How many numbers lie in the tensors whose names have one of the words."""
  chosen = [x for n, x in tensors.items() if any(word in n for word in words)]
  return sum(np.size(x) for x in chosen)


@pytest.mark.parametrize(
  "kind, variant, settings",
  [
    ("bert", "list", {"save_projection": True}),
    ("roberta", "list", {"save_projection": False}),
    ("bert", "regex", {"save_projection": False}),
    ("bert", "some layers", {"save_projection": True}),
    ("roberta", "all", {"save_projection": True}),
    ("bert", "all", {"save_projection": False}),
    ("bert", "list", {"use_rslora": True}),
    ("roberta", "some layers", {"use_rslora": False}),
    ("bert", "some layers", {"use_rslora": True, "use_dora": True}),
    ("bert", "feed-forward", {"init_ia3_weights": True}),
    ("bert", "some layers", {"pvera_dropout": 0.0, "save_projection": False}),
    ("roberta", "some layers", {"randlora_alpha": 8, "save_projection": False}),
    ("bert", "list", {"randlora_alpha": 8, "sparse": True}),
    ("bert", "list", {"theta_d_length": 70}),
    ("roberta", "all", {"theta_d_length": 70}),
  ],
)
def test_from_peft(bases, kind, variant, settings, tmp_path):
  options = settings | VARIANTS[variant] | {"task_type": "SEQ_CLS"}
  if "init_ia3_weights" in settings:
    config = peft.IA3Config(**options)
  elif "theta_d_length" in settings:
    config = peft.UniLoraConfig(r=3, proj_seed=7, **options)
  elif "randlora_alpha" in settings:
    config = peft.RandLoraConfig(r=5, projection_prng_key=7, **options)
  elif "pvera_dropout" in settings:
    config = peft.PveraConfig(r=RANK, projection_prng_key=7, **options)
  elif options.setdefault("r", RANK) and "use_rslora" in settings:
    config = peft.LoraConfig(lora_alpha=6, **options)
  else:
    config = peft.VeraConfig(projection_prng_key=2**32 + 7, **options)
  model = trained_by_peft(bases[kind], config, tmp_path / "theirs")
  ours = tmp_path / "ours"
  about = import_adapter(tmp_path / "theirs", ours, base=str(bases[kind]))
  assert_same(ours, bases[kind], model)
  if about["projection_digest"]:
    drawn = "stored" if "sparse" in settings else "peft"
    assert about["settings"].get("init", "peft") == drawn
    assert about["settings"]["projection_seed"] == 7  # torch takes 32 bits
  tensors, counts = load_adapter(ours).tensors, about["parameters"]
  assert counts["adapter"] == numbers(tensors, *LEAVES)
  assert counts["head"] == numbers(tensors, "classifier")
  if variant in ("list", "all"):  # otherwise ours has layers without effect
    theirs = {n: x.detach().numpy() for n, x in model.named_parameters()}
    assert counts["adapter"] == numbers(theirs, "vera_lambda", "lora_")


def test_an_adapter_without_a_head_takes_the_bases(bases, tmp_path):
  torch_model(bases["bert"]).save_pretrained(tmp_path / "base")
  config = peft.LoraConfig(r=4, target_modules=["query"])
  model = peft.get_peft_model(torch_model(tmp_path / "base"), config).eval()
  with torch.no_grad():
    for name, value in model.named_parameters():
      value += 0.1 * ("lora_B" in name)
  model.save_pretrained(tmp_path / "theirs")
  about = import_adapter(tmp_path / "theirs", tmp_path / "ours")
  assert about["base"] == str(tmp_path / "base")
  assert_same(tmp_path / "ours", tmp_path / "base", model)


@pytest.fixture
def ours_at_random(bases, random_adapter):
  """Makes an adapter of ours with every trained leaf random."""

  def make(kind, method="vera", **settings):
    targets = ["query", "value", "intermediate/dense"]
    settings = {"rank": RANK, "targets": targets, **settings}
    # of three labels
    return random_adapter(method, task="mnli", base=bases[kind], **settings)

  return make


def loaded_by_peft(base, folder):
  return peft.PeftModel.from_pretrained(torch_model(base), folder).eval()


@pytest.mark.parametrize(
  "kind, own, method, settings",
  [
    ("bert", "vera", "vera", {"projection_seed": 5}),
    ("roberta", "vera", "vera", {"init": "peft", "projection_seed": 5}),
    ("roberta", "vera", "vera", {"train": "b"}),
    ("bert", "lora", "lora", {"alpha": 6.5}),
    ("bert", "vera", "lora", {"init": "orthogonal"}),
    ("roberta", "vera", "lora", {"train": "d"}),
    ("bert", "vera", "lora", {"rank": 50}),  # beyond the widths
    ("roberta", "vera", "lora", {"sharing": "unique"}),
    ("bert", "dora", "lora", {"alpha": 6.5}),
    ("roberta", "dvora", "lora", {"projection_seed": 5}),
    ("bert", "lora", "lora", {"scaling": "root"}),
    ("roberta", "lora_fa", "lora", {}),
    ("bert", "onelora", "vera", {}),
    ("bert", "pvera", "pvera", {}),
    ("roberta", "pvera", "lora", {"init": "peft"}),
    ("bert", "randlora", "randlora", {}),
    ("bert", "unilora", "unilora", {}),
    ("roberta", "unilora", "lora", {}),
    (
      "roberta",
      "ia3",
      "ia3",
      {
        "targets": ["key", "value", r"layer(_\d+)?/output/dense"],
        "feedforward": [r"layer(_\d+)?/output/dense"],
      },
    ),
  ],
)
def test_to_peft(bases, ours_at_random, kind, own, method, settings, tmp_path):
  ours = ours_at_random(kind, own, **settings)
  export_adapter(ours, tmp_path / "theirs", method=method)
  theirs = loaded_by_peft(bases[kind], tmp_path / "theirs")
  config = theirs.peft_config["default"]
  assert config.peft_type.value == method.upper()
  assert getattr(config, "use_dora", False) == (own in ("dora", "dvora"))
  assert_same(ours, bases[kind], theirs)


def test_projections_that_no_key_gives_are_kept(
  bases, ours_at_random, tmp_path
):
  base, kept = bases["bert"], tmp_path / "kept"
  export_adapter(ours_at_random("bert"), tmp_path / "theirs")
  theirs = loaded_by_peft(base, tmp_path / "theirs")
  theirs.save_pretrained(tmp_path / "again")  # without our header
  about = import_adapter(tmp_path / "again", kept, base=str(base))
  assert about["settings"]["init"] == "stored"
  assert_same(kept, base, theirs)
  export_adapter(kept, tmp_path / "lora", method="lora")
  assert_same(kept, base, loaded_by_peft(base, tmp_path / "lora"))


@pytest.mark.parametrize("method", ["vera", "lora"])
def test_step_by_step_the_same(tiny_config, method):
  targets = ("query", "value", "intermediate/dense")
  config = tiny_config("rte", method=method, vera__targets=targets)
  config.lora.targets = targets
  config.vera.init = "peft"
  result = compare(config, 20)
  assert len(result["peft"]) == len(result["vera_jax"]) == 20
  assert result["peft"][-1] != result["peft"][0]
  assert result["largest_relative_loss_difference"] < 1e-3
  for leaf, apart in result["relative_distance"].items():
    assert apart < 1e-2, leaf
  assert len(result["relative_distance"]) == 2
