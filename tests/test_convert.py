"""Seeding: students from teachers (bit for bit where nothing is drawn), and nano's teacher from a language model."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from distill.base import language_tensors
from distill.convert import DT_RANGE, GATE_GAIN, SplitProjection, fuse_, make_student, vkq_rows
from distill.nano import nano_config, new_teacher
from mmmamba.checkpoint import load_model, save_model
from mmmamba.config import LayerType, ModelConfig
from mmmamba.keymap import from_published
from mmmamba.mixer import Mamba2Mixer
from mmmamba.model import MMMamba
from tests.helpers import (
    FOLDERS,
    GOLDEN,
    TOLERANCE,
    assert_near,
    golden_cases,
    golden_config,
    golden_model,
    random_ids,
    random_model,
    random_tiles,
    tiny_raw,
)

MIXER_TENSORS = {"in_proj.vkq", "in_proj.gate_dt", "conv.weight", "conv.bias", "A_log", "dt_bias", "norm.weight"}


def types_of(folder: str, kind: str) -> tuple[tuple[LayerType, ...], tuple[LayerType, ...]]:
    embedding, language = ModelConfig.from_dict(golden_config(folder, kind)).stacks
    return embedding.layer_types, language.layer_types


def mixers(model: nn.Module) -> dict[str, Any]:
    """Every mixer by name; `in_proj` is split or fused, which types cannot say."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Mamba2Mixer)}


def seeded(folder: str, kind: str = "linear", seed: int = 0) -> MMMamba:
    return make_student(load_model(GOLDEN / folder / "hovle"), *types_of(folder, kind), seed=seed)


@pytest.mark.parametrize("folder", FOLDERS)
def test_seeded_mixers_equal_the_published_ones_bit_for_bit(folder: str) -> None:
    student = seeded(folder)
    stored = load_file(GOLDEN / folder / "seeded_mixer.safetensors")
    checked = set()
    for name, mixer in mixers(student).items():
        stack, _, layer = name.removesuffix(".mixer").partition(".layers.")
        prefix = (
            f"{'embedding_model.encoder' if stack == 'embedding' else 'language_model.model.layers'}.{layer}.attention."
        )
        assert isinstance(mixer.in_proj, SplitProjection)
        v, k, q = mixer.in_proj.vkq.split(mixer.conv_splits)
        ours = {
            "v_proj.weight": v,
            "k_proj.weight": k,
            "q_proj.weight": q,
            "in_proj.weight": mixer.in_proj.gate_dt[-mixer.num_heads :],
            "A_log_bias": mixer.A_log,
            "conv1d.weight": mixer.conv.weight,
            "conv1d.bias": mixer.conv.bias,
            "g_norm.weight": mixer.norm.weight,
            "o_proj.weight": mixer.out_proj.weight,
        }
        for published, tensor in ours.items():
            assert torch.equal(tensor, stored[prefix + published]), prefix + published
            checked.add(prefix + published)
    assert checked == set(stored)


def test_what_is_drawn() -> None:
    """Gate: Xavier-uniform with gain 2^-2.5. Step sizes: log-uniform in [0.001, 0.1] after the softplus."""
    teacher = random_model(tiny_raw(teacher=True), dtype=torch.float32)
    students = [make_student(teacher, ("mamba2",) * 3, ("mamba2",) * 2, seed=seed) for seed in range(60)]
    found = [mixer for student in students for mixer in mixers(student).values()]
    gates = torch.stack([m.in_proj.gate_dt[:24].detach() for m in found])
    bound = 2**-2.5 * math.sqrt(6 / 48)
    assert GATE_GAIN == 2**-2.5
    assert gates.abs().max() <= bound
    assert gates.abs().max() > 0.999 * bound
    assert abs(float(gates.mean())) < 0.01 * bound
    assert float(gates.std()) == pytest.approx(bound / math.sqrt(3), rel=0.01)
    steps = F.softplus(torch.cat([m.dt_bias.detach() for m in found]))
    assert DT_RANGE == (0.001, 0.1)
    assert float(steps.min()) == pytest.approx(0.001, rel=0.05)
    assert float(steps.max()) == pytest.approx(0.1, rel=0.05)
    logs = torch.log10(steps)
    assert logs.min() >= -3.001
    assert logs.max() <= -0.999
    assert float(logs.mean()) == pytest.approx(-2.0, abs=0.06)
    assert float(logs.std()) == pytest.approx(2 / math.sqrt(12), rel=0.05)


def test_seeds_repeat_and_differ() -> None:
    one, two, other = (dict(seeded("post", seed=seed).named_parameters()) for seed in (3, 3, 4))
    for name in one:
        assert torch.equal(one[name], two[name]), name
    drawn = {name.rpartition("mixer.")[2] for name in one if not torch.equal(one[name], other[name])}
    assert drawn == {"in_proj.gate_dt", "dt_bias"}
    layers = list(mixers(seeded("post")).values())
    assert not torch.equal(layers[0].dt_bias, layers[1].dt_bias), "two layers drew the same"
    torch.manual_seed(11)
    again = dict(seeded("post", seed=3).named_parameters())
    assert all(torch.equal(one[name], again[name]) for name in one), "the draw depends on the global generator"


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("kind", ["linear", "hybrid"])
def test_teacher_and_student_share_what_does_not_train(folder: str, kind: str) -> None:
    teacher = load_model(GOLDEN / folder / "hovle")
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    student = make_student(teacher, *types_of(folder, kind))
    assert student.config == ModelConfig.from_dict(golden_config(folder, kind))
    assert student.config.kind == kind
    assert teacher.config.kind == "teacher"
    own = dict(teacher.named_parameters())
    new = set()
    for name, parameter in student.named_parameters():
        if name in own and parameter.data_ptr() == own[name].data_ptr():
            assert parameter is own[name]
        else:
            new.add(name)
    assert new == {f"{name}.{tensor}" for name in mixers(student) for tensor in MIXER_TENSORS}
    pointers = {p.data_ptr() for p in teacher.parameters()}
    assert not pointers & {dict(student.named_parameters())[name].data_ptr() for name in new}
    # The teacher is still itself.
    assert not mixers(teacher)
    for name, parameter in teacher.named_parameters():
        assert torch.equal(parameter, before[name]), name
    tensors = golden_cases(folder)["text"]
    with torch.no_grad():
        assert torch.equal(teacher(tensors["input_ids"]), golden_model(folder, "hovle")(tensors["input_ids"]))


def test_layers_that_stay_softmax_are_the_teachers() -> None:
    teacher = load_model(GOLDEN / "post" / "hovle")
    student = make_student(teacher, *types_of("post", "hybrid"))
    stacks: list[Any] = [(student.embedding, teacher.embedding), (student.language, teacher.language)]
    for stack, own in stacks:
        for layer, original, kind in zip(stack.layers, own.layers, stack_types(stack), strict=True):
            assert (layer is original) == (kind == "mha")
            assert layer.mlp is original.mlp
            assert layer.mixer.out_proj is original.mixer.out_proj
    assert student.embedding.needs_rope
    assert not make_student(teacher, *types_of("post", "linear")).embedding.needs_rope


def stack_types(stack: Any) -> list[str]:
    return ["mamba2" if isinstance(layer.mixer, Mamba2Mixer) else "mha" for layer in stack.layers]


@pytest.mark.parametrize("heads", [(4, 1), (4, 2), (4, 4), (6, 2)])
def test_rows_of_values_keys_and_queries(heads: tuple[int, int]) -> None:
    """Named by number: row r of head h is 1000 h + r, keys +100, values +200."""
    num_heads, num_kv_heads = heads
    shape = {"num_attention_heads": num_heads, "num_key_value_heads": num_kv_heads}
    model = random_model(tiny_raw(teacher=True, embedding=shape, language=shape))
    attention: Any = model.get_submodule("language.layers.0.mixer")
    d, group = 24 // num_heads, num_heads // num_kv_heads
    numbers = []
    for kv in range(num_kv_heads):
        for head in range(kv * group, kv * group + group):
            numbers += [1000 * head + r for r in range(d)]
        numbers += [1000 * kv + 100 + r for r in range(d)]
        numbers += [1000 * kv + 200 + r for r in range(d)]
    attention.in_proj.weight = nn.Parameter(torch.tensor(numbers, dtype=torch.float64)[:, None].expand(-1, 24).clone())
    rows = vkq_rows(attention)[:, 0].tolist()
    wanted = [1000 * kv + 200 + r for kv in range(num_kv_heads) for r in range(d)]
    wanted += [1000 * kv + 100 + r for kv in range(num_kv_heads) for r in range(d)]
    wanted += [1000 * head + r for head in range(num_heads) for r in range(d)]
    assert rows == wanted


@pytest.mark.parametrize("folder", FOLDERS)
@torch.no_grad()
def test_a_fused_student_computes_the_same(folder: str, tmp_path: Any) -> None:
    student = seeded(folder, "hybrid")
    tensors = golden_cases(folder)["image"]
    split = student(tensors["input_ids"], tensors["pixel_values"])
    weights = {name: m.in_proj.weight.clone() for name, m in mixers(student).items()}
    assert fuse_(student) is student
    for name, mixer in mixers(student).items():
        assert type(mixer.in_proj) is nn.Linear
        assert torch.equal(mixer.in_proj.weight, weights[name])
    assert torch.equal(student(tensors["input_ids"], tensors["pixel_values"]), split)
    assert fuse_(student) is student  # twice is once
    save_model(student, tmp_path)
    assert torch.equal(load_model(tmp_path)(tensors["input_ids"], tensors["pixel_values"]), split)


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_published_students_load_into_ours(folder: str) -> None:
    """The fused fixtures, taken apart: what a stage would leave behind fuses to the very tensors that are published."""
    published = load_file(GOLDEN / folder / "linear" / "model.safetensors")
    ours = {from_published(name): tensor for name, tensor in published.items()}
    student = seeded(folder)
    for name, mixer in mixers(student).items():
        weight = ours[f"{name}.in_proj.weight"]
        rows = mixer.in_proj.vkq.shape[0]
        mixer.in_proj.vkq.data.copy_(weight[:rows])
        mixer.in_proj.gate_dt.data.copy_(weight[rows:])
    fuse_(student)
    for name, mixer in mixers(student).items():
        assert torch.equal(mixer.in_proj.weight, ours[f"{name}.in_proj.weight"])


# --- nano's teacher ---


@pytest.fixture(scope="module")
def llama() -> Any:
    """A language model of the base's family, small, from its own library."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
        else:
            parameter.copy_(torch.randn_like(parameter) * (0.5 if "embed" in name else parameter.shape[1] ** -0.5))
    return model


def teacher_config() -> ModelConfig:
    return ModelConfig.from_dict(tiny_raw(teacher=True, language={"tie_word_embeddings": True}))


@torch.no_grad()
def test_a_new_teacher_speaks_as_its_base(llama: Any) -> None:
    """The embedding stack begins as the identity and attention's rows land where they belong."""
    teacher = new_teacher(llama, teacher_config())
    ids = random_ids(tiny_raw(), [60]) % 40
    logits = teacher(ids)
    assert logits.shape == (1, 60, 48)
    assert_near("logits", logits[..., :40], llama(ids).logits, TOLERANCE[torch.float32])
    x = teacher.embedding(ids)
    assert torch.equal(x, teacher.embedding.text(ids))
    assert teacher.language.output.weight is teacher.embedding.text.weight


@torch.no_grad()
def test_a_new_teacher_can_learn_to_see(llama: Any) -> None:
    """Identity for text, yet nothing that could train is stuck at zero, and images already differ."""
    teacher = new_teacher(llama, teacher_config())
    zero = {name for name, p in teacher.named_parameters() if p.ndim > 1 and not p.any()}
    layers = range(3)
    assert zero == {f"embedding.layers.{i}.{part}.weight" for i in layers for part in ("mixer.out_proj", "mlp.w2")} | {
        "embedding.stem.class_embedding"
    }
    ids = random_ids(tiny_raw(), [3, -4, 5])
    one, two = (teacher(ids, random_tiles(1, seed=seed)) for seed in (0, 1))
    assert not torch.equal(one[:, 3:], two[:, 3:])
    assert torch.equal(one[:, :3], two[:, :3])
    with torch.enable_grad():
        teacher(ids, random_tiles(1)).square().sum().backward()
    flat = {name for name, p in teacher.named_parameters() if p.grad is None or not p.grad.any()}
    # Behind a projection that is zero the gradient is zero at first; everything else has one.
    assert all(".mixer.in_proj" in n or ".mlp.w" in n or "_norm" in n or "class_embedding" in n for n in flat), flat


def test_seeds_of_a_new_teacher(llama: Any) -> None:
    one, two, other = (dict(new_teacher(llama, teacher_config(), seed=s).named_parameters()) for s in (1, 1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["embedding.stem.patch_embedding.weight"], other["embedding.stem.patch_embedding.weight"])
    # New tokens begin near the mean of the old ones, each a little apart.
    table = one["embedding.text.weight"]
    assert torch.equal(table[:40], llama.model.embed_tokens.weight)
    new = table[40:] - table[:40].mean(dim=0)
    assert 0.01 < float(new.detach().std()) < 0.03
    assert len(torch.unique(table[40:], dim=0)) == 8


def test_tensors_of_the_base(llama: Any) -> None:
    tensors = language_tensors(llama, 2)
    assert len(tensors) == 2 + 7 * 2
    grouped = tensors["language.layers.1.mixer.in_proj.weight"].view(2, 4, 6, 24)
    attention = llama.model.layers[1].self_attn
    query = attention.q_proj.weight.view(4, 6, 24)
    for kv in range(2):
        assert torch.equal(grouped[kv, :2], query[2 * kv : 2 * kv + 2])
        assert torch.equal(grouped[kv, 2], attention.k_proj.weight.view(2, 6, 24)[kv])
        assert torch.equal(grouped[kv, 3], attention.v_proj.weight.view(2, 6, 24)[kv])
    assert not any(t.requires_grad for t in tensors.values())


def test_nanos_shape() -> None:
    """SmolLM2-135M's numbers; and it is what the checkpoint layout can hold."""
    config = nano_config()
    assert config.kind == "teacher"
    assert (config.image_size, config.tokens_per_tile, config.embedding.patches_per_tile) == (224, 64, 256)
    assert (config.language.num_hidden_layers, config.embedding.num_hidden_layers) == (30, 8)
    for stack in config.stacks:
        assert (stack.hidden_size, stack.num_attention_heads, stack.num_key_value_heads) == (576, 9, 3)
        assert (stack.head_dim, stack.intermediate_size, stack.rope_theta) == (64, 1536, 100_000.0)
    assert config.language.tie_word_embeddings
    assert config.template == "chatml"
    assert config.embedding.llm_vocab_size == config.language.vocab_size == 49_160
    assert config.embedding.img_context_token_id == 49_154
    assert ModelConfig.from_dict(config.to_dict()) == config


def test_other_tensor_types(llama: Any) -> None:
    """A base in bf16 gives a teacher in float32 with the same values."""
    narrow = new_teacher(copy.deepcopy(llama).to(torch.bfloat16), teacher_config())
    assert {p.dtype for p in narrow.parameters()} == {torch.float32}
    weight = narrow.get_parameter("language.layers.0.mlp.w1.weight")
    assert torch.equal(weight, llama.model.layers[0].mlp.gate_proj.weight.bfloat16().float())
