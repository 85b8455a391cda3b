import copy

import pytest
import torch
from torch import nn

from msmri.model.unet import UNet
from msmri.model.unrolled import ResNet, Unconditioned, Unrolled
from msmri.physics.operators import CoilFourier, Subsample
from msmri.physics.simulate import coil_maps
from msmri.tensors import generators, normal_like


def problem(shape=(18, 16), *, batch=1, coils=3, sets=1, share=0.4, dtype=torch.complex64, seed=0):
    rng = torch.Generator().manual_seed(seed)
    maps = [torch.cat([coil_maps(shape, coils, rng) for _ in range(sets)], 1) for _ in range(batch)]
    encoding = CoilFourier((torch.cat(maps) / sets**0.5).to(dtype))
    image = normal_like(torch.zeros(batch, sets, *shape, dtype=dtype), generators(seed, batch))
    mask = torch.rand(batch, 1, *shape, generator=rng) < share
    mask[..., shape[0] // 2 - 2 : shape[0] // 2 + 2, shape[1] // 2 - 2 : shape[1] // 2 + 2] = True
    return Subsample(mask)(encoding(image)), mask, encoding


def seeded(build, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def small(*, double=False, seed=0, network=None, **options):
    model = seeded(lambda: Unrolled(ResNet(**(network or {"channels": 6, "blocks": 2})), **options), seed)
    return model.double() if double else model


def close(a, b, tolerance):
    error = float(((a - b).norm() / b.norm()).detach())
    assert error <= tolerance, error


def dense(operator, shape):
    """The normal operator of one slice as a matrix."""
    n = shape[-3] * shape[-2] * shape[-1]
    basis = torch.eye(n, dtype=torch.complex128).reshape(n, 1, *shape[-3:])
    return torch.stack([operator.normal(each).flatten() for each in basis], 1)


class Zero(nn.Module):
    def forward(self, image):
        return torch.zeros_like(image)


class Scaled(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, image):
        return self.factor * image


# size


@pytest.mark.parametrize(("tied", "count"), [(True, 592_129), (False, 1_145_089)])
def test_published_number_of_parameters(tied, count):
    model = Unrolled(ResNet(tied=tied))
    assert (model.unrolls, model.cg_iterations) == (10, 10) and model.mu == pytest.approx(0.05)
    assert sum(p.numel() for p in model.parameters()) == count
    assert sum(v.numel() for v in model.state_dict().values()) == count  # nothing twice in the file


def test_every_parameter_gets_a_gradient_and_mu_moves():
    values, mask, encoding = problem()
    for tied in (False, True):
        model = small(unrolls=2, cg_iterations=3, network={"channels": 4, "blocks": 2, "tied": tied})
        loss = (encoding(model(values, mask, encoding)) - 2 * values).abs().square().sum()
        loss.backward()
        for name, parameter in model.named_parameters():
            assert bool(parameter.grad.isfinite().all()) and bool(parameter.grad.any()), name


# data consistency


@pytest.mark.parametrize("shape", [(8, 8), (7, 9), (10, 5)])
@pytest.mark.parametrize("sets", [1, 2])
@pytest.mark.parametrize("warm", [False, True])
def test_consistency_solves_its_normal_equations(shape, sets, warm):
    values, mask, encoding = problem(shape, sets=sets, dtype=torch.complex128)
    operator = Subsample(mask) @ encoding
    model = small(double=True, cg_iterations=60, mu=0.07, warm_start=warm)
    prior = normal_like(torch.zeros(1, sets, *shape, dtype=torch.complex128), generators(9, 1))
    matrix = dense(operator, (sets, *shape)) + 0.07 * torch.eye(sets * shape[0] * shape[1])
    right = operator.adjoint(values) + 0.07 * prior
    expected = torch.linalg.solve(matrix, right.flatten()).reshape(prior.shape)
    with torch.no_grad():
        close(model.consistency(prior, operator.adjoint(values), operator), expected, 1e-6)


def test_converges_in_single_precision_at_the_published_mu():
    values, mask, encoding = problem((24, 20))
    operator = Subsample(mask) @ encoding
    model, prior = small(cg_iterations=40), normal_like(torch.zeros(1, 1, 24, 20).to(torch.complex64), generators(1, 1))
    x = model.consistency(prior, operator.adjoint(values), operator)
    close(operator.normal(x) + model.mu * x, operator.adjoint(values) + model.mu * prior, 1e-4)


@pytest.mark.parametrize("unrolls", [1, 3])
def test_without_a_network_it_is_regularised_least_squares(unrolls):
    values, mask, encoding = problem((9, 8), dtype=torch.complex128)
    operator = Subsample(mask) @ encoding
    model = Unrolled(Zero(), unrolls=unrolls, cg_iterations=50, mu=0.2).double()
    matrix = dense(operator, (1, 9, 8)) + 0.2 * torch.eye(72)
    expected = torch.linalg.solve(matrix, operator.adjoint(values).flatten()).reshape(1, 1, 9, 8)
    close(model(values, mask, encoding).detach(), expected, 1e-6)


@pytest.mark.parametrize(("residual", "factor"), [(False, 0.6), (True, -0.4)])
def test_unrolls_repeat_network_and_consistency(residual, factor):
    values, mask, encoding = problem((9, 8), dtype=torch.complex128)
    operator = Subsample(mask) @ encoding
    model = Unrolled(Scaled(factor), unrolls=3, cg_iterations=50, mu=0.3, residual=residual).double()
    matrix = dense(operator, (1, 9, 8)) + 0.3 * torch.eye(72)
    x = first = operator.adjoint(values).flatten()
    for _ in range(3):
        x = torch.linalg.solve(matrix, first + 0.3 * 0.6 * x)
    close(model(values, mask, encoding).detach().flatten(), x, 1e-6)


def test_consistency_agrees_with_deepinv():
    deepinv = pytest.importorskip("deepinv")
    values, mask, encoding = problem((12, 10))
    operator = Subsample(mask) @ encoding
    maps, image = encoding.maps[:, 0], operator.adjoint(values)
    physics = deepinv.physics.MultiCoilMRI(mask=mask.float(), coil_maps=maps, img_size=(2, 12, 10))
    prior = normal_like(torch.zeros(1, 1, 12, 10, dtype=torch.complex64), generators(2, 1))
    two = torch.view_as_real(prior[:, 0]).movedim(-1, 1)
    data = torch.view_as_real(values).movedim(-1, 1)
    their = deepinv.optim.data_fidelity.L2().prox(two, data, physics, gamma=1 / 0.05)  # gamma f + |x - z|^2 / 2
    mine = small(cg_iterations=50).consistency(prior, image, operator).detach()
    close(torch.view_as_real(mine[:, 0]).movedim(-1, 1), their, 1e-3)


# gradients


@pytest.mark.parametrize("warm", [False, True])
def test_gradient_is_that_of_the_iterations(warm):
    values, mask, encoding = problem((6, 5), dtype=torch.complex128)
    model = small(
        double=True, unrolls=2, cg_iterations=2, warm_start=warm, network={"channels": 3, "blocks": 1, "scale": 0.5}
    )
    target = encoding(normal_like(torch.zeros(1, 1, 6, 5, dtype=torch.complex128), generators(3, 1)))

    def loss():
        return (encoding(model(values, mask, encoding)) - target).abs().square().sum()

    loss().backward()
    step = 1e-6
    for parameter in (model.log_mu, model.network.first.weight, model.network.blocks[0].second.weight):
        place = (0,) * parameter.ndim
        expected = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter[place] += sign * step
                expected.append(float(loss()))
                parameter[place] -= sign * step
        assert float(parameter.grad[place]) == pytest.approx((expected[0] - expected[1]) / (2 * step), rel=1e-4)


@pytest.mark.parametrize("options", [{}, {"bfloat16": True}, {"residual": True, "warm_start": True}])
def test_checkpoints_change_no_gradient(options):
    values, mask, encoding = problem(batch=2)
    plain = small(unrolls=3, cg_iterations=3, **options)
    sparing = small(unrolls=3, cg_iterations=3, checkpoint=True, **options)
    kept = []
    for model in (plain, sparing):
        saved = 0

        def pack(tensor):
            nonlocal saved
            saved += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(values, mask, encoding).abs().sum()
        kept.append(saved)
        loss.backward()
    assert kept[1] < kept[0] / 3
    for (name, a), b in zip(plain.named_parameters(), sparing.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6 * float(a.grad.abs().max()), msg=name)


# shapes, batches, precision


@pytest.mark.parametrize("shape", [(16, 16), (15, 20), (21, 13)])
@pytest.mark.parametrize("sets", [1, 2])
@pytest.mark.parametrize("patch", [1, 2, 3])
def test_any_size_and_batch(shape, sets, patch):
    model = small(unrolls=2, cg_iterations=3, network={"channels": 6, "blocks": 1, "patch": patch})
    values, mask, encoding = problem(shape, batch=2, sets=sets)
    with torch.no_grad():
        both = model(values, mask, encoding)
        assert both.shape == (2, sets, *shape) and both.dtype == torch.complex64
        for i in range(2):
            one = model(values[i : i + 1], mask[i : i + 1], CoilFourier(encoding.maps[i : i + 1]))
            close(both[i : i + 1], one, 1e-5)


def test_sets_are_images_of_their_own_to_the_network():
    model = small(network={"channels": 4, "blocks": 1})
    image = normal_like(torch.zeros(2, 2, 9, 8, dtype=torch.complex64), generators(0, 2))
    with torch.no_grad():
        whole = model.regularise(image)
        for s in range(2):
            close(whole[:, s : s + 1], model.regularise(image[:, s : s + 1]), 1e-6)


def test_lines_and_places_are_one_kind_of_mask():
    model = small(unrolls=2, cg_iterations=3)
    values, _, encoding = problem((12, 10))
    lines = torch.zeros(1, 1, 1, 10, dtype=torch.bool)
    lines[..., ::2] = True
    with torch.no_grad():
        close(model(values, lines, encoding), model(values, lines.expand(1, 1, 12, 10), encoding), 1e-6)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e9])
def test_reads_nothing_outside_the_mask(poison):
    model = small(unrolls=2, cg_iterations=3)
    values, mask, encoding = problem()
    poisoned = torch.where(mask, values, torch.full_like(values, poison))
    with torch.no_grad():
        assert torch.equal(model(poisoned, mask, encoding), model(values, mask, encoding))


@pytest.mark.parametrize("factor", [1e-4, 37.0, 1e4])
@pytest.mark.parametrize("options", [{}, {"residual": True, "warm_start": True}])
def test_units_do_not_matter(factor, options):
    model = small(unrolls=3, cg_iterations=3, **options)
    values, mask, encoding = problem((13, 12))
    with torch.no_grad():
        close(model(factor * values, mask, encoding) / factor, model(values, mask, encoding), 1e-5)


def test_phase_is_not_touched_by_the_operators():
    # the network is no friend of phase, consistency is: rotate data and prior, the solution rotates
    values, mask, encoding = problem()
    operator, model = Subsample(mask) @ encoding, small(cg_iterations=4)
    prior = normal_like(torch.zeros(1, 1, 18, 16, dtype=torch.complex64), generators(4, 1))
    turn = torch.polar(torch.ones(()), torch.tensor(0.8))
    plain = model.consistency(prior, operator.adjoint(values), operator)
    turned = model.consistency(turn * prior, operator.adjoint(turn * values), operator)
    close(turned.detach(), (turn * plain).detach(), 1e-5)


def test_bfloat16_is_near_single_precision_and_only_inside():
    exact = small(unrolls=3, network={"channels": 16, "blocks": 3})
    rounded = copy.deepcopy(exact)
    rounded.reduced = True
    values, mask, encoding = problem((24, 20))
    with torch.no_grad():
        a, b = exact(values, mask, encoding), rounded(values, mask, encoding)
    assert b.dtype == torch.complex64 and not torch.equal(a, b)
    close(b, a, 5e-3)
    assert all(p.dtype == torch.float32 for p in rounded.parameters())


# the network


def test_blocks_scale_and_skip():
    network = seeded(lambda: ResNet(4, 2, scale=0.3)).requires_grad_(False)
    x = torch.randn(1, 2, 7, 6, generator=torch.Generator().manual_seed(0))
    first = network.first(x)
    h = first
    for block in network.blocks:
        h = h + 0.3 * block.second(torch.relu(block.first(h)))
    torch.testing.assert_close(network(x), network.last(network.collect(h) + first))
    for layer in network.modules():
        assert not isinstance(layer, nn.Conv2d) or layer.bias is None
    weights = torch.cat([p.flatten() for p in ResNet(32, 4).parameters()])
    assert float(weights.detach().std()) == pytest.approx(0.05, rel=0.05)
    assert ResNet(4, 1).blocks[0].scale == 0.1


def test_tied_blocks_use_one_convolution_twice():
    tied = seeded(lambda: ResNet(4, 1, tied=True)).requires_grad_(False)
    untied = seeded(lambda: ResNet(4, 1)).requires_grad_(False)
    untied.load_state_dict(tied.state_dict(), strict=False)
    untied.blocks[0].second.weight.copy_(tied.blocks[0].first.weight)
    x = torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(tied(x), untied(x))


def test_zero_last_begins_as_least_squares():
    values, mask, encoding = problem()
    with torch.no_grad():
        begun = small(
            unrolls=4, cg_iterations=5, residual=True, warm_start=True,
            network={"channels": 4, "blocks": 1, "zero_last": True},
        )(values, mask, encoding)  # fmt: skip
        plain = Unrolled(Zero(), unrolls=4, cg_iterations=5, residual=True, warm_start=True)(values, mask, encoding)
    assert torch.equal(begun, plain)
    residual = [float((Subsample(mask)(encoding(x)) - values).norm()) for x in (begun, torch.zeros_like(begun))]
    assert residual[0] < 0.1 * residual[1]


def test_other_networks_fit_in():
    network = Unconditioned(UNet(in_channels=2, channels=(8, 8), blocks_per_level=1))
    values, mask, encoding = problem((17, 14))
    model = Unrolled(network, unrolls=2, cg_iterations=2, residual=True)
    assert model(values, mask, encoding).shape == (1, 1, 17, 14)


@pytest.mark.parametrize("options", [{"unrolls": 0}, {"cg_iterations": 0}, {"mu": 0.0}])
def test_refuses_sizes_without_meaning(options):
    with pytest.raises(ValueError, match="must be positive"):
        Unrolled(Zero(), **options)
