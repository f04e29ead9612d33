from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from llama_ray.model.attention.causal import causal_attention
from llama_ray.model.config import LlamaConfig
from llama_ray.model.llama import Llama
from llama_ray.model.loss import cross_entropy_sum
from llama_ray.utils.targets import IGNORE_INDEX


def tokens_for(config: LlamaConfig, batch: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, config.vocab_size, (batch, config.max_seq_len), generator=generator)


def test_logits_equal_those_of_transformers(model: Llama, peer: LlamaForCausalLM) -> None:
    tokens = tokens_for(model.config)
    with torch.no_grad():
        ours, theirs = model(tokens), peer(tokens).logits
    assert theirs.std() > 0.1  # The comparison is not one of zeros.
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_gradients_equal_those_of_transformers(model: Llama, peer: LlamaForCausalLM) -> None:
    tokens = tokens_for(model.config)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
    targets[0, :5] = IGNORE_INDEX
    count = (targets != IGNORE_INDEX).sum()
    (cross_entropy_sum(model(inputs), targets) / count).backward()
    F.cross_entropy(peer(inputs).logits.flatten(0, 1), targets.flatten()).backward()
    theirs = dict(peer.named_parameters())
    for name, parameter in model.named_parameters():
        other = theirs[name if name.startswith("lm_head") else f"model.{name}"].grad
        torch.testing.assert_close(parameter.grad, other, atol=1e-4, rtol=1e-3)


def test_logits_do_not_depend_on_later_tokens(model: Llama) -> None:
    tokens = tokens_for(model.config)
    changed = tokens.clone()
    changed[:, 40:] = (changed[:, 40:] + 1) % model.config.vocab_size
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :40], after[:, :40])
    assert not torch.allclose(before[:, 40:], after[:, 40:])


def test_each_sequence_may_have_its_own_positions() -> None:
    model = Llama(LlamaConfig.preset("llama-tiny"))
    tokens = torch.randint(0, 512, (2, 8))
    positions = torch.stack((torch.arange(8), torch.arange(100, 108)))
    with torch.no_grad():
        together = model(tokens, positions)
        alone = torch.cat([model(tokens[i : i + 1], positions[i]) for i in range(2)])
    torch.testing.assert_close(together, alone)


def test_the_given_attention_is_called_once_a_layer() -> None:
    model = Llama(LlamaConfig.preset("llama-tiny"))
    seen: list[int] = []

    def spy(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        assert q.shape == (1, 4, 5, 16)
        assert k.shape == v.shape == (1, 2, 5, 16)
        seen.append(layer)
        return causal_attention(q, k, v)

    model(torch.zeros(1, 5, dtype=torch.int64), attend=spy)
    assert seen == [0, 1]


def test_positions_beyond_max_seq_len_are_refused() -> None:
    model = Llama(LlamaConfig.preset("llama-tiny"))
    with pytest.raises(ValueError, match="position 256 is beyond this model's max_seq_len of 256"):
        model(torch.zeros(1, 257, dtype=torch.int64))
    with pytest.raises(ValueError, match="position 300 is beyond"):
        model(torch.zeros(1, 1, dtype=torch.int64), torch.tensor([300]))


@pytest.fixture(params=["context", "default"])
def on_meta_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """The meta device is the default, set in each of torch's two ways."""
    if request.param == "context":
        with torch.device("meta"):
            yield
    else:
        torch.set_default_device("meta")
        yield
        torch.set_default_device(None)


@pytest.mark.usefixtures("on_meta_device")
def test_without_a_device_the_model_is_on_the_default_device() -> None:
    model = Llama(LlamaConfig.preset("llama-65b"))  # 261 GB of fp32 weights anywhere else
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def test_a_device_that_is_given_outranks_the_default_device(on_meta_device: None) -> None:
    config = LlamaConfig.preset("llama-tiny")
    model = Llama(config, seed=3, device="cpu")
    expected = Llama(config, seed=3, device="meta")
    expected.materialize("cpu")
    expected.init_weights(3)
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert p.device.type == "cpu"
        assert torch.equal(p, q), name
    assert model.rotary.cos.device.type == "cpu"


def test_a_seed_gives_the_same_weights_in_every_version() -> None:
    model = Llama(LlamaConfig.preset("llama-tiny"), seed=3)
    for weight, expected in (
        (model.embed_tokens.weight, [0.028060628, -0.028059186, 0.016859744, -0.014610320]),
        (model.layers[1].mlp.down_proj.weight, [-0.00062391476, 0.0056550992, 0.0050285337, 0.0042481758]),
    ):
        assert weight[0, :4].tolist() == pytest.approx(expected, rel=1e-4)


def test_initial_weights_depend_on_the_seed_alone() -> None:
    config = LlamaConfig.preset("llama-tiny")
    a, b, other = Llama(config, seed=3), Llama(config, device="meta"), Llama(config, seed=4)
    b.materialize("cpu")
    b.init_weights(3)
    for (name, p), q, r in zip(a.named_parameters(), b.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name
        assert p.dim() == 1 or not torch.equal(p, r), name


def test_projections_into_the_residual_stream_start_smaller() -> None:
    model = Llama(LlamaConfig.preset("llama-tiny", num_layers=8))
    layer = model.layers[0]
    assert layer.self_attn.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert layer.mlp.down_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert layer.self_attn.o_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)


def test_the_first_loss_is_that_of_a_uniform_guess() -> None:
    config = LlamaConfig.preset("llama-tiny")
    tokens = tokens_for(config)
    with torch.no_grad():
        loss = cross_entropy_sum(Llama(config)(tokens), tokens) / tokens.numel()
    assert loss.item() == pytest.approx(torch.log(torch.tensor(512.0)).item(), abs=0.1)


def test_there_are_no_biases_and_rotary_angles_stay_exact_in_bf16() -> None:
    config = LlamaConfig.preset("llama-tiny")
    model = Llama(config).to(torch.bfloat16)
    assert not any("bias" in name for name in model.state_dict())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(model.rotary.cos, Llama(config).rotary.cos, atol=0, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_computes_where_it_is_whatever_the_defaults_are(
    on_meta_device: None, dtype: torch.dtype
) -> None:
    model = Llama(LlamaConfig.preset("llama-tiny"), device="cpu", dtype=dtype)
    tokens = torch.arange(32, device="cpu").view(2, 16)

    def loss_and_gradients() -> list[torch.Tensor]:
        model.zero_grad()
        loss = model(tokens, targets=tokens)
        loss.sum().backward()
        return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    given = loss_and_gradients()
    with torch.device("cpu"):
        expected = loss_and_gradients()
    torch.set_default_dtype(torch.float64)
    other = loss_and_gradients()
    torch.set_default_dtype(torch.float32)
    for a, b, c in zip(given, expected, other, strict=True):
        assert torch.equal(a, b)
        assert (c.dtype, torch.equal(b, c)) == (b.dtype, True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_is_that_of_the_weights_and_not_of_the_tables(dtype: torch.dtype) -> None:
    config = LlamaConfig.preset("llama-tiny")
    expected = Llama(config, dtype=torch.float32)
    torch.set_default_dtype(dtype)
    try:
        model, explicit = Llama(config), Llama(config, dtype=torch.float32)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert torch.equal(model.rotary.cos, expected.rotary.cos)
    for p, q in zip(explicit.parameters(), expected.parameters(), strict=True):
        assert torch.equal(p, q)
