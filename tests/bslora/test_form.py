"""Names of layers, and the form's sums."""

import pytest
import torch

from bslora_convert.bslora.transforms import Kronecker
from bslora_convert.modules.names import kind_of, layer_of
from tests.planting import plant


@pytest.mark.parametrize(
    ("name", "layer", "kind"),
    [
        ("model.layers.3.mlp.up_proj", "model.layers.3", "mlp.up_proj"),
        ("transformer.h.11.attn.c_attn", "transformer.h.11", "attn.c_attn"),
        ("encoder.block.0.layer.1.DenseReluDense.wi", "encoder.block.0", "layer.1.DenseReluDense.wi"),
        ("decoder.block.0.layer.0.SelfAttention.q", "decoder.block.0", "layer.0.SelfAttention.q"),
        ("model.layers.2.mlp.experts.7.w1", "model.layers.2", "mlp.experts.7.w1"),
        ("lm_head", None, "lm_head"),
        ("bert.pooler.dense", None, "bert.pooler.dense"),
        ("classifier.0", None, "classifier.0"),
    ],
)
def test_layer_and_kind(name: str, layer: str | None, kind: str) -> None:
    assert layer_of(name) == layer
    assert kind_of(name) == kind


def test_delta_is_the_sum_of_its_parts() -> None:
    form = plant(Kronecker(16), layers=1)
    for name in form.modules:
        whole = form.delta(name)
        parts = form.parts(name)
        assert list(parts) == ["local", "intra", "inter"]
        assert torch.allclose(whole.b @ whole.a, sum(p.b @ p.a for p in parts.values()), atol=1e-4)


def test_half_precision_forms_are_expanded_in_float32() -> None:
    form = plant(Kronecker(16), layers=1).to(torch.bfloat16)
    name = next(iter(form.modules))
    path = form.modules[name].paths["inter"]
    pair = form.pair("inter", "all")
    exact = torch.kron(path.own["B"].float(), pair.b.float())
    assert torch.equal(form.part(name, "inter").b, exact)
