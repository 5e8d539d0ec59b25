"""QuestLinear and PackedLinear against the float64 definition, and inside all that torch wraps around a layer."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from conftest import SavedTensors, steady_normal
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from quest import PackedLinear, Quantizer, QuestLinear, convert, frozen_weights, reference
from quest.models.llama import SiluMul

IN, OUT = 96, 40
SPARSE = "int4-hadamard-4:8-trust"

# (activation, weight, family of the training product)
PAIRS = [
    ("int4", "int4", "int4"),
    ("int1", "int1", "planes"),
    ("int2", "int2", "planes"),
    ("int8", "int8", "int8"),
    ("int8", "int4", "int4"),
    ("int4", "int8", "int8"),
    ("fp4", "fp4", "int4"),
    ("ternary", "ternary", "int4"),
    ("int_zero4", "int3", "int4"),
    ("int4-none-clip", "int2-none-ste", "int4"),
    ("int4", SPARSE, "sparse"),
    (SPARSE, SPARSE, "dequantized"),
    ("gauss4", "gauss4", "dequantized"),
    ("int4", "int4-none-trust", "dequantized"),
    ("int4-none-trust", "int4", "dequantized"),
    ("none", "int4", "dequantized"),
    ("none", "int1", "dequantized"),
    ("none", "gauss3", "dequantized"),
    ("none", SPARSE, "dequantized"),
    ("int4", "none", "dequantized"),
    ("int4-none-trust", "none", "dequantized"),
]


def parse(text: str) -> Quantizer | None:
    return None if text == "none" else Quantizer.parse(text)


def steady(rows: int, q: Quantizer | None) -> Tensor:
    return torch.randn(rows, IN) if q is None else steady_normal(rows, IN, quantizer=q)


def layer_and_input(a: str, w: str, device: torch.device | str = "cpu") -> tuple[QuestLinear, Tensor, Tensor]:
    """A layer, x [3, 5, IN] that requires a gradient, and a gradient of its output."""
    layer = QuestLinear(IN, OUT, weight_quantizer=w, activation_quantizer=a, device=device)
    with torch.no_grad():
        layer.weight.copy_(steady(OUT, parse(w)))
    x = steady(15, parse(a)).reshape(3, 5, IN).to(device).requires_grad_()
    return layer, x, torch.randn(3, 5, OUT, device=device)


def assert_close(got: Tensor, expected: Tensor, eps: float = 2.0**-23) -> None:
    """Of sums of some hundred products: 16 roundings of the largest result."""
    assert (got.double().cpu() - expected.cpu()).abs().max() <= 16 * eps * expected.abs().max()


@pytest.mark.parametrize(("a", "w", "family"), PAIRS)
def test_forward_and_gradients(a: str, w: str, family: str, device: torch.device) -> None:
    layer, x, g = layer_and_input(a, w, device)
    assert layer.plan.family == family
    y = layer(x)
    y.backward(g)
    exact = [t.detach().double().cpu().requires_grad_() for t in (x, layer.weight, layer.bias)]
    expected = reference.linear(*exact, parse(a), parse(w))
    expected.backward(g.double().cpu())
    assert_close(y, expected)
    for leaf, reference_leaf in zip((x, layer.weight, layer.bias), exact, strict=True):
        assert leaf.grad is not None
        assert reference_leaf.grad is not None
        assert_close(leaf.grad, reference_leaf.grad)


@pytest.mark.parametrize(("a", "w", "family"), [pair for pair in PAIRS if pair[1] != "none"])
def test_packed_gives_the_same(a: str, w: str, family: str, device: torch.device) -> None:
    layer, x, _ = layer_and_input(a, w, device)
    packed = PackedLinear.from_linear(layer)
    with torch.no_grad():
        y, expected = packed(x), layer(x)
        if family == "dequantized":
            assert_close(y, expected)
        else:
            assert torch.equal(y, expected)
        assert_close(packed(x[0, 0]), y[0, 0].double())


@pytest.mark.parametrize(
    ("a", "w"), [("int4", "int4"), ("int1", "int1"), ("int8", "int8"), ("int4", SPARSE), ("none", "int4")]
)
def test_packed_in_a_cuda_graph(a: str, w: str, device: torch.device) -> None:
    if device.type == "cpu":
        pytest.skip("CUDA graphs need a GPU")
    layer, x, _ = layer_and_input(a, w, device)
    packed, x = PackedLinear.from_linear(layer), x.detach()
    other = torch.randn_like(x)
    expected = packed(other)  # also the first call, which may load kernels and set them up: no work for a capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = packed(x)
    x.copy_(other)
    graph.replay()
    assert torch.equal(y, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("a", "w"), [("int4", "int4"), ("none", "int4"), ("int4", "none"), ("gauss4", "gauss4")])
def test_half_precision_parameters(a: str, w: str, dtype: torch.dtype, device: torch.device) -> None:
    layer, x, g = layer_and_input(a, w, device)
    layer.to(dtype)
    x = x.detach().to(dtype).requires_grad_()
    y = layer(x)
    y.backward(g.to(dtype))
    exact = QuestLinear(IN, OUT, weight_quantizer=w, activation_quantizer=a, device=device)
    exact.load_state_dict({name: value.float() for name, value in layer.state_dict().items()})
    x32 = x.detach().float().requires_grad_()
    y32 = exact(x32)
    y32.backward(g.to(dtype).float())
    eps = torch.finfo(dtype).eps
    for got, expected in ((y, y32), (x.grad, x32.grad), (layer.weight.grad, exact.weight.grad)):
        assert got is not None
        assert expected is not None
        assert got.dtype == dtype
        assert_close(got, expected.double(), eps / 2)


def test_backward_keeps_codes_scales_and_mask_bits(device: torch.device) -> None:
    layer, x, _ = layer_and_input("int4", "int4", device)
    saved = SavedTensors()
    with saved:
        layer(x)
    assert not [t for t in saved.tensors if t.is_floating_point() and t.dim() > 1]
    kept = sum(t.numel() * t.element_size() for t in saved.tensors)
    real = 4 * (x.numel() + layer.weight.numel())
    assert kept <= real / 2  # at these small sizes padding to 16 bytes counts


def test_nothing_is_changed_in_place(device: torch.device) -> None:
    layer, x, g = layer_and_input("int4", "int4", device)
    before = [t.detach().clone() for t in (x, layer.weight, layer.bias, g)]
    versions = [t._version for t in (x, layer.weight, layer.bias, g)]
    layer(x).backward(g)
    for tensor, same, version in zip((x, layer.weight, layer.bias, g), before, versions, strict=True):
        assert torch.equal(tensor, same)
        assert tensor._version == version


def test_gradients_add_up_over_forward_passes(device: torch.device) -> None:
    layer, x, g = layer_and_input("int4", "int4", device)
    layer(x).backward(g)
    once = layer.weight.grad.clone()
    (layer(x) + layer(x)).backward(g)
    torch.testing.assert_close(layer.weight.grad, 3 * once)


def test_only_the_wanted_gradients(device: torch.device) -> None:
    layer, x, g = layer_and_input("int4", "int4", device)
    expected = torch.autograd.grad(layer(x), [x, layer.weight], g)
    layer.weight.requires_grad_(False)
    layer.bias.requires_grad_(False)
    assert torch.equal(torch.autograd.grad(layer(x), x, g)[0], expected[0])
    layer.weight.requires_grad_()
    y = layer(x.detach())
    assert torch.equal(torch.autograd.grad(y, layer.weight, g)[0], expected[1])
    with torch.no_grad():
        assert not layer(x).requires_grad


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize(("a", "w"), [("int4", "int4"), ("none", "int1"), ("int4", SPARSE)])
def test_compile_without_a_break(a: str, w: str, backend: str, device: torch.device) -> None:
    layer, x, g = layer_and_input(a, w, device)
    expected = torch.autograd.grad(layer(x), [x, layer.weight, layer.bias], g)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    y = compiled(x)
    torch.testing.assert_close(y, layer(x))
    for got, same in zip(torch.autograd.grad(y, [x, layer.weight, layer.bias], g), expected, strict=True):
        torch.testing.assert_close(got, same)
    with torch.no_grad(), frozen_weights(layer):
        torch.testing.assert_close(compiled(x), y)


def test_autocast(device: torch.device) -> None:
    """Float32 master weights under bf16 autocast: y is bf16, gradients float32, codes those of the float32 numbers."""
    layer, x, g = layer_and_input("int4", "int4", device)
    with torch.autocast(device.type, torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, layer(x).bfloat16())
    packed = PackedLinear.from_linear(layer)
    with torch.autocast(device.type, torch.bfloat16), torch.no_grad():
        assert torch.equal(packed(x), y)
    expected = torch.autograd.grad(layer(x), [x, layer.weight, layer.bias], g)
    y.backward(g.bfloat16())
    for leaf, same in zip((x, layer.weight, layer.bias), expected, strict=True):
        assert leaf.grad.dtype == torch.float32
        assert_close(leaf.grad, same.double(), 2.0**-9)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool, device: torch.device) -> None:
    layer, x, g = layer_and_input("int4", "int4", device)

    def block(t: Tensor) -> Tensor:
        return F.silu(layer(t))

    expected = torch.autograd.grad(block(x), [x, layer.weight], g)
    checkpoint(block, x, use_reentrant=reentrant).backward(g)
    assert torch.equal(x.grad, expected[0])
    assert torch.equal(layer.weight.grad, expected[1])


def test_frozen_weights(device: torch.device) -> None:
    layer, x, g = layer_and_input("int4", "int4", device)
    expected = torch.autograd.grad(layer(x), [x, layer.weight], g)
    with frozen_weights(layer):
        codes = layer.frozen_codes
        assert codes is not None
        got = torch.autograd.grad(layer(x), [x, layer.weight], g)
        with frozen_weights(layer):  # within another block: the outer one counts
            layer(x)
        assert layer.frozen_codes is codes
    assert layer.frozen_codes is None
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


def test_a_weight_that_changes_while_frozen_is_an_error() -> None:
    layer = QuestLinear(IN, OUT)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)

    def step_within() -> None:
        with frozen_weights(layer):
            layer(torch.randn(2, IN)).sum().backward()
            optimizer.step()

    with pytest.raises(RuntimeError, match="a weight changed within the block; step the optimizer after it"):
        step_within()
    assert layer.frozen_codes is None


def test_state_dict_is_that_of_nn_linear() -> None:
    linear = nn.Linear(IN, OUT)
    layer = QuestLinear(IN, OUT)
    assert list(layer.state_dict()) == list(linear.state_dict())
    layer.load_state_dict(linear.state_dict())
    clone = copy.deepcopy(layer)
    x = torch.randn(2, IN)
    assert torch.equal(clone(x), layer(x))
    assert clone.weight is not layer.weight


def test_meta() -> None:
    layer = QuestLinear(IN, OUT, device="meta")
    y = layer(torch.empty(2, 3, IN, device="meta", requires_grad=True))
    assert (y.shape, y.device.type) == ((2, 3, OUT), "meta")
    y.sum().backward()
    assert layer.weight.grad.shape == (OUT, IN)
    packed = PackedLinear.from_linear(layer)
    assert packed(torch.empty(2, IN, device="meta")).shape == (2, OUT)


@pytest.mark.parametrize(
    ("a", "w"), [("int4", "int4"), ("int1", "int1"), ("int8", "int8"), ("int4", SPARSE), ("none", "gauss4")]
)
@pytest.mark.parametrize("bias", [True, False])
def test_packed_state_dict(a: str, w: str, bias: bool, device: torch.device) -> None:
    """Through a file, into an empty layer: on the device, and on meta by assignment."""
    packed = PackedLinear.from_linear(QuestLinear(IN, OUT, bias, weight_quantizer=w, activation_quantizer=a)).to(device)
    keys = ["weight_codes", "weight_scale", "weight_code_sum"] + ["weight_index"] * (w == SPARSE) + ["bias"] * bias
    assert list(packed.state_dict()) == keys
    file = io.BytesIO()
    torch.save(packed.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    x = torch.randn(3, IN, device=device)
    for where, assign in ((device, False), ("meta", True)):
        other = PackedLinear(IN, OUT, bias, weight_quantizer=w, activation_quantizer=a, device=where)
        other.load_state_dict(state, assign=assign)
        assert torch.equal(other(x), packed(x))
    assert torch.equal(copy.deepcopy(packed)(x), packed(x))


def test_packed_keeps_its_dtypes(device: torch.device) -> None:
    packed = PackedLinear.from_linear(QuestLinear(IN, OUT))
    scale = packed.weight_scale.clone()
    packed.to(device).to(torch.bfloat16)
    assert torch.equal(packed.weight_scale.cpu(), scale)
    assert packed.bias is not None
    assert packed.bias.dtype == torch.float32
    assert packed.weight_codes.device.type == device.type
    assert packed(torch.randn(2, IN, device=device, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize(("a", "w"), [("int4", "int4"), ("none", "int4"), ("gauss4", "gauss4")])
def test_export(a: str, w: str, device: torch.device) -> None:
    packed = PackedLinear.from_linear(QuestLinear(IN, OUT, weight_quantizer=w, activation_quantizer=a)).to(device)
    rows = torch.export.Dim("rows", min=2, max=512)
    program = torch.export.export(packed, (torch.randn(4, IN, device=device),), dynamic_shapes=({0: rows},))
    calls = [str(node.target) for node in program.graph.nodes if "quest" in str(node.target)]
    if w != "gauss4":
        assert calls == ["quest.linear.default"]
    x = torch.randn(7, IN, device=device)
    torch.testing.assert_close(program.module()(x), packed(x))


def test_packed_compiles_without_a_break(device: torch.device) -> None:
    packed = PackedLinear.from_linear(QuestLinear(IN, OUT)).to(device)
    x = torch.randn(3, IN, device=device)
    assert torch.equal(torch.compile(packed, fullgraph=True, backend="aot_eager")(x), packed(x))


def test_a_bad_row_reaches_its_output_and_no_gradient(device: torch.device) -> None:
    layer, x, g = layer_and_input("int4", "int4", device)
    with torch.no_grad():
        x[1, 2, 7] = torch.nan
    y = layer(x)
    assert y[1, 2].isnan().all()
    assert y.isnan().sum() == OUT
    (dx,) = torch.autograd.grad(y, x, g)
    assert not dx[1, 2].any()


def fused_layer(kind: str, a: str, w: str, device: torch.device) -> tuple[PackedLinear, nn.Sequential, Tensor]:
    """A packed layer with a prologue, the same two modules one after the other, and an input [3, 5, ...]."""
    packed = PackedLinear.from_linear(layer_and_input(a, w, device)[0])
    first: nn.Module = SiluMul() if kind == "silu_mul" else nn.RMSNorm(IN, 1e-5, device=device)
    for parameter in first.parameters():
        nn.init.normal_(parameter, 1.0, 0.25)
    separate = nn.Sequential(copy.deepcopy(first), copy.deepcopy(packed))
    packed.fuse(kind, first)  # type: ignore[arg-type]
    return packed, separate, torch.randn(3, 5, 2 * IN if kind == "silu_mul" else IN, device=device)


def assert_same_but_for_codes_at_a_boundary(got: Tensor, expected: Tensor) -> None:
    """The prologue's values may differ from torch's in the last bit, which moves a code or two in thousands: each moves
    its row of y by a step of x (a third of sigma at 4 bits, of 96 such values) times a weight."""
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
    error = (got - expected).float().norm(dim=-1) / expected.float().norm(dim=-1)
    assert error.max() <= 0.1
    assert (error <= 2**-7).float().mean() >= 0.8  # most rows have no such code: what remains is the rounding of y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("a", "w"),
    [
        *(
            ("int4", "int4"),
            ("int2", "int2"),
            ("int8", "int8"),
            ("int4", SPARSE),
            ("gauss4", "gauss4"),
            ("none", "int4"),
        ),
        ("int4-none-trust", "int4"),
    ],
)
@pytest.mark.parametrize("kind", ["rms_norm", "silu_mul"])
def test_prologue(kind: str, a: str, w: str, dtype: torch.dtype, device: torch.device) -> None:
    packed, separate, x = fused_layer(kind, a, w, device)
    packed, separate, x = packed.to(dtype), separate.to(dtype), x.to(dtype)
    assert all(parameter.dtype == dtype for parameter in packed.parameters())
    assert packed.weight_scale.dtype == torch.float32
    with torch.no_grad():
        assert_same_but_for_codes_at_a_boundary(packed(x), separate(x))
        assert_same_but_for_codes_at_a_boundary(packed(x[0, :1]), separate(x[0, :1]))
        if dtype == torch.float32:  # which autocast leaves to the norm and to silu
            with torch.autocast(device.type, torch.bfloat16):
                assert_same_but_for_codes_at_a_boundary(packed(x), separate(x))


def test_prologue_that_has_no_kernel_is_called(device: torch.device) -> None:
    """A norm of another dtype than x, without a weight, or with torch's own epsilon."""
    for norm in (nn.RMSNorm(IN, 1e-5), nn.RMSNorm(IN, 1e-5, elementwise_affine=False), nn.RMSNorm(IN)):
        packed = PackedLinear.from_linear(QuestLinear(IN, OUT)).to(device)
        x = torch.randn(3, IN, device=device, dtype=torch.bfloat16 if norm.weight is not None and norm.eps else None)
        expected = packed(norm.to(device)(x).detach())
        packed.fuse("rms_norm", norm)
        y = packed(x)
        assert not y.requires_grad
        assert torch.equal(y, expected)


def test_prologues_that_cannot_be() -> None:
    packed = PackedLinear.from_linear(QuestLinear(IN, OUT))
    with pytest.raises(ValueError, match=f"expected an nn.RMSNorm over {IN} features.*LayerNorm"):
        packed.fuse("rms_norm", nn.LayerNorm(IN))
    with pytest.raises(ValueError, match=f"expected an nn.RMSNorm over {IN} features.*RMSNorm"):
        packed.fuse("rms_norm", nn.RMSNorm(2 * IN))
    with pytest.raises(ValueError, match="kind: expected rms_norm or silu_mul, got 'gelu'"):
        packed.fuse("gelu", SiluMul())  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("kind", ["rms_norm", "silu_mul"])
def test_prologue_compiles_and_exports(kind: str, backend: str, device: torch.device) -> None:
    packed, _, x = fused_layer(kind, "int4", "int4", device)
    expected = packed(x)
    assert torch.equal(torch.compile(packed, fullgraph=True, backend=backend)(x), expected)
    program = torch.export.export(packed, (x,), dynamic_shapes=({0: torch.export.Dim("rows", min=2, max=512)},))
    assert [str(n.target) for n in program.graph.nodes if "quest" in str(n.target)] == ["quest.linear.default"]
    assert not [n for n in program.graph.nodes if "norm" in str(n.target) or "silu" in str(n.target)]
    for copies in (2, 6):  # up to 32 rows have packed activations, more have not
        longer = torch.cat([x] * copies)
        assert torch.equal(program.module()(longer), packed(longer))


def test_prologue_in_a_cuda_graph(device: torch.device) -> None:
    if device.type == "cpu":
        pytest.skip("CUDA graphs need a GPU")
    for kind in ("rms_norm", "silu_mul"):
        packed, _, x = fused_layer(kind, "int4", "int4", device)
        other = torch.randn_like(x)
        expected = packed(other)
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph):
            y = packed(x)
        x.copy_(other)
        graph.replay()
        assert torch.equal(y, expected)


def test_prologue_state_and_errors(device: torch.device) -> None:
    packed, _, x = fused_layer("rms_norm", "int4", "int4", device)
    assert "prologue.weight" in packed.state_dict()
    assert "(prologue): RMSNorm((96,)" in repr(packed)
    assert torch.equal(copy.deepcopy(packed)(x), packed(x))
    with pytest.raises(
        ValueError, match=r"PackedLinear.fuse: expected a layer without a prologue, got one with RMSNorm"
    ):
        packed.fuse("rms_norm", nn.RMSNorm(IN))
    gated, _, _ = fused_layer("silu_mul", "int4", "int4", device)
    with pytest.raises(ValueError, match=f"PackedLinear: input: expected a last dimension of {2 * IN} features"):
        gated(x)


def test_representations() -> None:
    layer = QuestLinear(IN, OUT, weight_quantizer="int4", activation_quantizer=None)
    assert "in_features=96, out_features=40, bias=True, weight=int4-hadamard-trust, activation=none" in repr(layer)
    assert "weight=int4-hadamard-trust, activation=none, layout=packed" in repr(PackedLinear.from_linear(layer))


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"expected a weight or an activation quantizer, got neither; use nn.Linear"):
        QuestLinear(IN, OUT, weight_quantizer=None, activation_quantizer="none")
    with pytest.raises(ValueError, match=r"in_features: expected a multiple of 8 for int4-hadamard-4:8-trust, got 90"):
        QuestLinear(90, OUT, weight_quantizer=SPARSE)
    with pytest.raises(ValueError, match="weight_quantizer: expected a quantizer, got none"):
        PackedLinear(IN, OUT, weight_quantizer="none", activation_quantizer="int4")
    with pytest.raises(ValueError, match="there is no weight to pack"):
        PackedLinear.from_linear(QuestLinear(IN, OUT, weight_quantizer=None))
    with pytest.raises(ValueError, match=r"expected x of dtype .* got Double"):
        QuestLinear(IN, OUT)(torch.randn(2, IN, dtype=torch.float64))


def test_packed_layers_refuse_a_backward_pass(device: str) -> None:
    """Beside a residual connection a missing gradient would not be noticed."""
    layer = convert(QuestLinear(IN, IN, device=device))
    x = torch.randn(4, IN, device=device, requires_grad=True)
    y = x + layer(x)
    with pytest.raises(RuntimeError, match="PackedLinear: expected no backward pass"):
        y.sum().backward()


@pytest.mark.parametrize("pack", [False, True])
def test_inputs_of_another_width_are_refused(device: str, pack: bool) -> None:
    layer: torch.nn.Module = QuestLinear(IN, IN, device=device)
    if pack:
        layer = convert(layer)
    with pytest.raises(ValueError, match=f"expected a last dimension of {IN} features, got shape"):
        layer(torch.zeros(IN, IN // 2, device=device))
