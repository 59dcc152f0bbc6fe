import json
import numpy as np, pytest
from vera_jax.train.loop import train_and_evaluate
from vera_jax.models.classifier import restore_adapter
from vera_jax.models.export_hf import *
from vera_jax.serve.predictor import Predictor
from vera_jax.errors import UserError
@pytest.mark.parametrize("scan",[True,False])
def test_x(tiny_config,tmp_path,scan):
  config=tiny_config(vera__init="structured",model__scan=scan, optim__epochs=2)
  r=train_and_evaluate(config,tmp_path/"w")
  print(r["best"], r["parameters"])
  c=restore_adapter(tmp_path/"w/adapter")
  print(Predictor(c).logits(["word1 word2"],["word3"]))
  f=tmp_path/"w/adapter/adapter.json"; a=json.loads(f.read_text()); print(a["settings"], a["projection_digest"])
  a["settings"]["projection_seed"]+=1; f.write_text(json.dumps(a))
  with pytest.raises(UserError, match="come out different"): restore_adapter(tmp_path/"w/adapter")
