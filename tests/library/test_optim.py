"""The optimizer is torch.optim.SGD on the same network, and safe where others touch the weights."""

import copy
import functools
import gc
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from checking import DTYPES, INTERPRETED, of_the_cpu
from torch import nn
from torch.utils.checkpoint import checkpoint

from bit_kernels import GroupNorm, StdConv2d, norm_relu_conv, reference
from bit_kernels.optim import SGD


@pytest.fixture(autouse=True)
def one_thread():
    """The networks are so small that waking a second thread would take most of the time."""
    torch.set_num_threads(1)


# Triton's interpreter truncates where bfloat16 must be rounded, and takes its time.
rounds_bfloat16 = pytest.mark.skipif(torch.bfloat16 not in DTYPES, reason="it would be truncated")
UPDATES = 8 if INTERPRETED else 100


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(
        StdConv2d(3, 8, 3, padding=1, bias=False),
        GroupNorm(4, 8, activation="relu"),
        StdConv2d(8, 6, (3, 1), bias=True),
        nn.Flatten(),
        nn.Linear(6 * 4 * 6, 5),
    ).to(dtype)


def batches(count, dtype=torch.float32, size=4):
    random = torch.Generator().manual_seed(1)
    for _ in range(count):
        images = torch.randn(size, 3, 6, 6, generator=random, dtype=torch.float64).to(dtype)
        yield images, torch.randint(5, (size,), generator=random)


def loss_of(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def train(model, optimizer, steps, accumulate=1, clip=None):
    """`steps` updates; returns the norms that `clip(max_norm)` gave."""
    norms = []
    data = batches(steps * accumulate, next(model.parameters()).dtype)
    for _ in range(steps):
        optimizer.zero_grad()
        for _ in range(accumulate):
            loss_of(model, next(data)).backward()
        if clip is not None:
            norms.append(clip(0.7))
        optimizer.step()
    return norms


def assert_same_weights(first, second, **tolerance):
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def keeps(model):
    return [conv._kept is not None for conv in model if isinstance(conv, StdConv2d)]


OPTIONS = [
    dict(weight_decay=1e-2),
    dict(momentum=0.9, dampening=0.2, weight_decay=1e-2),
    dict(momentum=0.9, nesterov=True, weight_decay=1e-2),
    dict(momentum=0.9, maximize=True),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_trajectory_is_torchs(options):
    """UPDATES with a schedule, decay, accumulation and clipping: equal in float64, and in
    float32 as close to it as torch's own."""
    ends = {}
    for name, kind, dtype in [
        ("truth", torch.optim.SGD, torch.float64),
        ("ours", SGD, torch.float64),
        ("torch float32", torch.optim.SGD, torch.float32),
        ("ours float32", SGD, torch.float32),
    ]:
        model = network(dtype)
        if options.get("nesterov"):
            model.to(memory_format=torch.channels_last)
        more = dict(model=model, decay="all") if kind is SGD else {}
        optimizer = kind(model.parameters(), lr=0.05, **options, **more)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, UPDATES)
        data, norm = batches(2 * UPDATES, dtype), 0
        for _ in range(UPDATES):
            optimizer.zero_grad()
            for _ in range(2):
                loss_of(model, next(data)).backward()
            if kind is SGD:
                norm += optimizer.clip_grad_norm_(1.0)
            else:
                norm += nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        ends[name] = torch.cat(
            [*(p.detach().double().flatten() for p in model.parameters()), norm[None]]
        )
    error = {name: (end - ends["truth"]).abs().max() for name, end in ends.items()}
    assert error["ours"] < 1e-10
    assert error["ours float32"] <= 2 * error["torch float32"] + 1e-5


@rounds_bfloat16
def test_bfloat16_autocast_trains_on_kept_bfloat16_weights():
    losses = {}
    for dtype in (None, torch.bfloat16):
        model = network()
        optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9, model=model, dtype=dtype)
        batch = next(batches(1))
        for _ in range(20):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(model, batch)
            loss.backward()
            assert model[0].weight.grad.dtype == torch.float32
            optimizer.step()
        losses[dtype] = loss.item()
        assert model[0]._kept.standardized.dtype == dtype or dtype is None
    # The rounding of the same float32 weights to bfloat16, at another place.
    assert losses[None] == losses[torch.bfloat16] < 0.5


def test_gradient_is_that_of_the_standardized_weight_on_every_path():
    model, batch = network(), next(batches(1))
    plain = copy.deepcopy(model)
    optimizer = SGD(model.parameters(), model=model)
    with torch.no_grad():
        hats = [reference.standardize_weight(plain[i].weight) for i in (0, 2)]
    hats = [hat.requires_grad_() for hat in hats]
    x = F.relu(F.group_norm(F.conv2d(batch[0], hats[0], None, padding=1), 4))
    x = plain[4](F.conv2d(x, hats[1], plain[2].bias).flatten(1))
    expected = torch.autograd.grad(F.cross_entropy(x, batch[1]), hats)

    class Checkpointed(nn.Module):
        def forward(self, x):
            return checkpoint(model, x, use_reentrant=False)

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for path in (model, compiled, Checkpointed()):
        optimizer.zero_grad()
        loss_of(path, batch).backward()
        for conv, right in zip((model[0], model[2]), expected, strict=True):
            torch.testing.assert_close(conv.weight.grad, right, rtol=1e-4, atol=1e-6)


def test_compiled_network_trains_alike_and_follows_a_release():
    eager, model = network(), network()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, model=model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    train(eager, other := SGD(eager.parameters(), lr=0.1, momentum=0.9), 3)
    train(compiled, optimizer, 3)
    optimizer.release()
    train(eager, other, 2)
    train(compiled, optimizer, 2)
    assert_same_weights(eager, model, rtol=1e-4, atol=1e-5)


class Unit(nn.Module):
    """A residual unit of two convolutions, their norms fused into them or modules of their own."""

    def __init__(self, fused=True):
        super().__init__()
        self.fused = fused
        self.norm1, self.norm2 = (GroupNorm(4, 8, activation="relu") for _ in range(2))
        self.conv1, self.proj = (StdConv2d(8, 8, n, padding=n // 2, bias=False) for n in (3, 1))
        self.conv2 = StdConv2d(8, 8, 3, padding=1)

    def forward(self, x):
        if not self.fused:
            activated = self.norm1(x)
            y, shortcut = self.conv1(activated), self.proj(activated)
            return self.conv2(self.norm2(y)) + shortcut
        y, shortcut = norm_relu_conv(x, self.norm1, self.conv1, self.proj)
        return norm_relu_conv(y, self.norm2, self.conv2, residual=shortcut)[0]


@pytest.mark.parametrize(
    "path",
    ["eager", "modules", "checkpoint", "compile", pytest.param("autocast", marks=rounds_bfloat16)],
)
def test_fused_units_train_alike(path):
    """What fuses convolutions takes kept weights, too, and hands on their gradients as they are."""
    ends = {}
    for dtype in (torch.float64, torch.float32):
        for kind in (torch.optim.SGD, SGD):
            torch.manual_seed(0)
            model = nn.Sequential(
                StdConv2d(3, 8, 3), Unit(path != "modules"), nn.Flatten(), nn.Linear(128, 5)
            )
            model.to(dtype)
            narrow = torch.bfloat16 if path == "autocast" and dtype == torch.float32 else None
            ours = dict(model=model, decay="all", dtype=narrow) if kind is SGD else {}
            optimizer = kind(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-3, **ours)
            forward = model
            if path == "compile":
                forward = torch.compile(model, fullgraph=True, backend="aot_eager")
            elif path == "checkpoint":
                forward = functools.partial(checkpoint, model, use_reentrant=False)
            with torch.autocast("cpu", torch.bfloat16, enabled=path == "autocast"):
                for batch in batches(6, dtype):
                    optimizer.zero_grad()
                    loss_of(forward, batch).backward()
                    optimizer.step()
            end = torch.cat([p.detach().double().flatten() for p in model.parameters()])
            ends[kind, dtype] = end
    for dtype, bound in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        assert (ends[SGD, dtype] - ends[torch.optim.SGD, dtype]).abs().max() < bound


def test_no_standardization_in_the_forward(monkeypatch):
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1, model=model)
    train(model, optimizer, 1)
    monkeypatch.setattr("bit_kernels.functional.standardize_weight", None)
    train(model, optimizer, 2)
    with torch.inference_mode():
        model(next(batches(1))[0])


CHANGES = {
    "copy_": lambda m: m.load_state_dict({k: v * 0.5 + 0.1 for k, v in m.state_dict().items()}),
    "data": lambda m: [p.data.mul_(-3) for p in m.parameters()],
    "assigned data": lambda m: [setattr(p, "data", p.data * 2) for p in m.parameters()],
    "layout": lambda m: m.to(memory_format=torch.channels_last),
    "double and back": lambda m: [p.data.add_(0.3) for p in m.double().float().parameters()],
}


# What shows by a look at the memory alone, be it that a later tensor lies where the first one did.
SAMPLED = ("data", "double and back")


@pytest.mark.parametrize(
    "change", [pytest.param(c, marks=of_the_cpu) if c in SAMPLED else c for c in CHANGES]
)
def test_changed_weights_are_noticed(change):
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, model=model)
    train(model, optimizer, 2)
    CHANGES[change](model)
    x = next(batches(1))[0]
    with torch.inference_mode():  # must not spoil what training goes on with
        assert torch.equal(model(x), copy.deepcopy(model)(x))
    for conv in (model[0], model[2]):
        assert conv._kept.standardized.stride() == conv.weight.stride()
    plain = copy.deepcopy(model)
    theirs = SGD(plain.parameters(), lr=0.1, momentum=0.9)
    theirs.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # else both share momenta
    train(model, optimizer, 2)
    train(plain, theirs, 2)
    assert_same_weights(model, plain, rtol=1e-5, atol=1e-6)


def test_restandardize_is_what_a_forward_does_by_itself(monkeypatch):
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1, model=model)
    train(model, optimizer, 1)
    with torch.no_grad():
        model[0].weight.add_(torch.randn_like(model[0].weight))
    place = model[0]._kept.standardized
    optimizer.restandardize()
    assert model[0]._kept.standardized is place  # where a captured graph reads it
    expected = copy.deepcopy(model)(x := next(batches(1))[0])
    monkeypatch.setattr("bit_kernels.functional.standardize_weight", None)  # nothing is left to do
    assert torch.equal(model(x), expected)
    optimizer.restandardize()


def test_double_network():
    """A network cast after the optimizer was made goes on in the new dtype."""
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1, model=model)
    train(model, optimizer, 1)
    model.double()
    train(model, optimizer, 1)
    assert model[0]._kept.standardized.dtype == torch.float64


@pytest.mark.parametrize("to_torch", [True, False])
def test_state_dict_is_torchs(to_torch):
    """A run that is handed over in the middle ends where it would have."""
    options = dict(lr=0.05, momentum=0.9, weight_decay=1e-2)
    whole, model = network(torch.float64), network(torch.float64)
    train(whole, torch.optim.SGD(whole.parameters(), **options), 3)
    first = SGD(model.parameters(), decay="all", model=model, **options)
    second = torch.optim.SGD(model.parameters(), lr=1.0)
    if not to_torch:
        first, second = torch.optim.SGD(model.parameters(), **options), first
    data = iter(list(batches(3, torch.float64)))
    for optimizer in (first, second):
        if optimizer is second:
            second.load_state_dict(first.state_dict())
            if to_torch:
                first.release()
        for _ in range(2 if optimizer is first else 1):
            optimizer.zero_grad()
            if not to_torch and optimizer is first:
                second.release()  # torch's optimizer needs the raw gradients
            loss_of(model, next(data)).backward()
            optimizer.step()
    assert_same_weights(model, whole, rtol=0, atol=1e-12)
    assert second.param_groups[0]["lr"] == 0.05


def test_decay_stays_what_it_was_under_a_state_dict_of_torchs():
    model = network()
    ours = SGD(
        [{"params": model[0].parameters()}, {"params": model[4].parameters(), "decay": "all"}]
    )
    theirs = torch.optim.SGD([{"params": model[0].parameters()}, {"params": model[4].parameters()}])
    ours.load_state_dict(theirs.state_dict())
    assert [group["decay"] for group in ours.param_groups] == ["kernels", "all"]
    ours.load_state_dict(copy.deepcopy(ours).state_dict())
    model[4].weight.grad = torch.ones_like(model[4].weight)
    ours.step()


def test_decay_reaches_kernels_only():
    model = network()
    before = copy.deepcopy(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    SGD(model.parameters(), lr=1.0, weight_decay=0.5, model=model).step()
    for p, old in zip(model.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(p, old * 0.5 if p.dim() > 1 else old)


@pytest.mark.parametrize("norm_type", [2.0, 1, float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("projected", [False, True])
def test_clipping_is_torchs(dtype, norm_type, projected):
    model, plain = network(dtype), network(dtype)
    optimizer = SGD(model.parameters(), lr=1.0, model=model)
    batch = next(batches(1, dtype))
    loss_of(model, batch).backward()
    loss_of(plain, batch).backward()
    if projected:
        optimizer.project_gradients()
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)
    ours = optimizer.clip_grad_norm_(0.1, norm_type)
    theirs = nn.utils.clip_grad_norm_(plain.parameters(), 0.1, norm_type)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        optimizer.clip_grad_norm_(1e9, norm_type).item(), 0.1, rtol=1e-4, atol=0
    )
    optimizer.step()
    torch.optim.SGD(plain.parameters(), lr=1.0).step()
    assert_same_weights(model, plain, rtol=1e-4, atol=1e-6)


def test_norm_that_is_not_finite():
    model = network()
    optimizer = SGD(model.parameters(), model=model)
    assert optimizer.clip_grad_norm_(1.0) == 0
    model[0].weight.grad = torch.full_like(model[0].weight, torch.inf)
    assert not optimizer.clip_grad_norm_(1.0).isfinite()
    with pytest.raises(RuntimeError, match="total norm of order 2.0 of the gradients is nan"):
        optimizer.clip_grad_norm_(1.0, error_if_nonfinite=True)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_projected_gradients_are_told_from_others(set_to_none):
    model, plain = network(), network()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, model=model)
    theirs = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    for batch in batches(4):
        optimizer.zero_grad(set_to_none)
        theirs.zero_grad()
        loss_of(model, batch).backward()
        loss_of(plain, batch).backward()
        for _ in range(2):  # the second changes nothing
            optimizer.project_gradients()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)  # torch's, which knows nothing of us
        nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
        theirs.step()
    assert_same_weights(model, plain, rtol=1e-4, atol=1e-6)


def test_backward_after_projection_is_refused():
    model, batch = network(), next(batches(1))
    optimizer = SGD(model.parameters(), lr=0.1, model=model)
    loss_of(model, batch).backward()
    optimizer.project_gradients()
    with pytest.raises(RuntimeError, match=r"call zero_grad\(\) before the backward"):
        loss_of(model, batch).backward()
    model.zero_grad()  # not the optimizer's: the gradients are others nevertheless
    loss_of(model, batch).backward()
    loss_of(model, batch).backward()
    assert optimizer._is_deferred(model[0].weight)
    optimizer.zero_grad()
    loss_of(model, batch).backward()
    optimizer.step()


def test_release():
    model, plain, batch = network(), network(), next(batches(1))
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, model=model)
    assert keeps(model) == [True, True]
    loss_of(model, batch).backward()
    optimizer.release()  # a gradient is pending
    assert keeps(model) == [False, False]
    loss_of(plain, batch).backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)
    other = torch.optim.AdamW(model.parameters())
    theirs = torch.optim.AdamW(plain.parameters())
    train(model, other, 2)
    train(plain, theirs, 2)
    assert_same_weights(model, plain, rtol=1e-3, atol=1e-4)


def test_optimizer_that_is_gone():
    model = network()
    optimizer = SGD(model.parameters(), model=model)
    train(model, optimizer, 1)
    del optimizer
    gc.collect()
    assert keeps(model) == [False, False]


def test_second_optimizer_takes_over():
    model = network()
    first = SGD(model.parameters(), model=model)
    second = SGD(model.parameters(), model=model)
    for call in (first.step, first.project_gradients, lambda: first.clip_grad_norm_(1.0)):
        with pytest.raises(RuntimeError, match="another optimizer has taken over"):
            call()
    del first
    gc.collect()
    train(model, second, 1)
    assert keeps(model) == [True, True]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_keep_nothing(copied):
    model, x = network(), next(batches(1))[0]
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, model=model)
    train(model, optimizer, 1)
    twin = copied(model)
    assert keeps(twin) == [False, False] and keeps(model) == [True, True]
    assert torch.equal(twin(x), model(x))
    assert model.state_dict().keys() == network().state_dict().keys()
    other = copied(optimizer)
    assert other.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    other.step()  # on its own copies of the weights


def test_functional_call():
    model, x = network(), next(batches(1))[0]
    optimizer = SGD(model.parameters(), model=model)
    train(model, optimizer, 1)
    others = {name: p.detach() * 2 + 0.5 for name, p in model.named_parameters()}
    plain = copy.deepcopy(model)
    plain.load_state_dict(others)
    assert torch.equal(torch.func.functional_call(model, others, (x,)), plain(x))
    per_sample = torch.func.vmap(lambda sample: model(sample[None])[0])(x)
    torch.testing.assert_close(per_sample, model(x), rtol=1e-4, atol=1e-5)


def test_create_graph():
    model, batch = network(), next(batches(1))
    optimizer = SGD(model.parameters(), model=model)
    with pytest.raises(RuntimeError, match=r"call the optimizer's release\(\) for create_graph"):
        torch.autograd.grad(loss_of(model, batch), model[0].weight, create_graph=True)
    # A penalty on the input's gradient is differentiated once with respect to the weights.
    plain = copy.deepcopy(model)
    for network_ in (model, plain):
        x = batch[0].clone().requires_grad_()
        (grad,) = torch.autograd.grad(loss_of(network_, (x, batch[1])), x, create_graph=True)
        grad.square().sum().backward()
    optimizer.project_gradients()
    torch.testing.assert_close(model[0].weight.grad, plain[0].weight.grad, rtol=1e-3, atol=1e-6)


def trained(pending):
    """Weights after a backward, `pending(model, make)`, which calls make() for an SGD, and a step."""
    model, batch = network(), next(batches(1))
    made = []

    def make(kind=SGD):
        keywords = dict(model=model, decay="all") if kind is SGD else {}
        made.append(kind(model.parameters(), lr=0.1, **keywords))
        return made[-1]

    pending(model, make, lambda: loss_of(model, batch).backward())
    made[-1].step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_gradients_from_before_the_optimizer_are_of_raw_weights():
    def plainly(model, make, backward):
        make(torch.optim.SGD)
        backward()

    def early(model, make, backward):
        backward()
        make()

    def handed_over(model, make, backward):
        optimizer = make()
        backward()
        optimizer.release()
        make()

    expected = trained(plainly)
    for way in (early, handed_over):
        torch.testing.assert_close(trained(way), expected, rtol=1e-4, atol=1e-5)

    def contested(model, make, backward):
        make()
        backward()
        with pytest.raises(ValueError, match=r"call its release\(\) or zero_grad\(\) first"):
            SGD(model.parameters(), model=model)

    torch.testing.assert_close(trained(contested), expected, rtol=1e-4, atol=1e-5)


def test_projected_gradients_may_be_replaced_and_weights_frozen():
    def plainly(model, make, backward):
        make(torch.optim.SGD)
        backward()
        for p in model.parameters():
            p.grad = p.grad * 3

    def replaced(model, make, backward):
        optimizer = make()
        backward()
        optimizer.project_gradients()
        for p in model.parameters():
            p.grad = p.grad * 3

    torch.testing.assert_close(trained(replaced), trained(plainly), rtol=1e-4, atol=1e-5)
    model, batch = network(), next(batches(1))
    optimizer = SGD(model.parameters(), model=model)
    loss_of(model, batch).backward()
    model.requires_grad_(False)
    optimizer.release()


def test_data_parallel_is_refused():
    layer = network()[0]
    optimizer = SGD(layer.parameters(), model=layer)  # noqa: F841
    replica = layer._replicate_for_data_parallel()
    replica.weight = layer.weight.clone()
    with pytest.raises(RuntimeError, match="use DistributedDataParallel"):
        replica(torch.ones(1, 3, 8, 8))


def test_backward_after_the_step_is_noticed():
    model, batch = network(), next(batches(1))
    optimizer = SGD(model.parameters(), lr=0.1, model=model)
    loss = loss_of(model, batch)
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_frozen_layers_groups_and_groups_added_later():
    model, plain = network(), network()
    ours, theirs = [], []
    for net, kind, made in ((model, SGD, ours), (plain, torch.optim.SGD, theirs)):
        net[0].requires_grad_(False)
        more = dict(model=net, decay="all") if kind is SGD else {}
        groups = [{"params": net[0].parameters()}, {"params": net[1].parameters(), "lr": 0.0}]
        made.append(kind(groups, lr=0.1, momentum=0.9, weight_decay=0.1, **more))
        train(net, made[0], 1)
        for layer in (net[2], net[4]):
            made[0].add_param_group({"params": layer.parameters(), "lr": torch.tensor(0.05)})
        train(net, made[0], 2)
        net[0].requires_grad_(True)
        train(net, made[0], 2)
    assert keeps(model) == [True, True]
    assert_same_weights(model, plain, rtol=1e-4, atol=1e-5)


def test_hooks_and_closure():
    model, told = network(), []
    optimizer = SGD(model.parameters(), lr=0.1, model=model)
    optimizer.register_step_pre_hook(lambda *_: told.append("before"))
    optimizer.register_step_post_hook(lambda *_: told.append("after"))

    def closure():
        told.append("closure")
        optimizer.zero_grad()
        loss = loss_of(model, next(batches(1)))
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0
    assert told == ["before", "closure", "after"]
    assert SGD(model.parameters()).step() is None


def test_tied_weights():
    first, second = StdConv2d(4, 4, 3, padding=1), StdConv2d(4, 4, 3, padding=1)
    second.weight = first.weight
    model, x = nn.Sequential(first, second), torch.randn(2, 4, 5, 5)
    plain = copy.deepcopy(model)
    optimizer = SGD(model.parameters(), lr=0.1, model=model)
    for net in (model, plain):
        net(x).square().mean().backward()
    optimizer.step()
    torch.optim.SGD(plain.parameters(), lr=0.1).step()
    assert_same_weights(model, plain, rtol=1e-4, atol=1e-6)
    second.eps = 1e-3
    with pytest.raises(
        ValueError, match=r"shares a weight of shape \(4, 4, 3, 3\) among StdConv2d"
    ):
        SGD(model.parameters(), model=model)
    plain = nn.Conv2d(4, 4, 3)
    plain.weight = first.weight
    with pytest.raises(ValueError, match="all may be StdConv2d of one eps"):
        SGD(first.parameters(), model=nn.Sequential(first, plain))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(lr=-1.0), "lr is -1.0; it may be 0 or more"),
        (dict(lr=torch.ones(2)), "lr is a tensor of 2 elements"),
        (dict(momentum=-0.1), "momentum is -0.1; it may be 0 or more"),
        (dict(weight_decay=float("nan")), "weight_decay is nan; it may be 0 or more"),
        (dict(nesterov=True), "nesterov is True with momentum 0.0 and dampening 0.0"),
        (dict(decay="norms"), r"decay is 'norms'; it may be one of \('kernels', 'all'\)"),
        (dict(dtype=torch.int8), "dtype is torch.int8; it may be None or a floating dtype"),
        (
            dict(params=[torch.ones(2, dtype=torch.cfloat)]),
            "params has a tensor of torch.complex64",
        ),
    ],
)
def test_refuses(options, message):
    model = network()
    with pytest.raises(ValueError, match=message):
        SGD(**dict(params=model.parameters(), model=model) | options)
    assert keeps(model) == [False, False]


def test_refuses_sparse_gradients():
    weight = nn.Parameter(torch.ones(3, 2))
    weight.grad = torch.ones(3, 2).to_sparse()
    with pytest.raises(ValueError, match="gradient of layout torch.sparse_coo; it must be dense"):
        SGD([weight]).step()


def _rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    model = network(torch.float64)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2, model=model)
    parallel = nn.parallel.DistributedDataParallel(model)
    for images, labels in batches(5, torch.float64, size=8):
        optimizer.zero_grad()
        loss_of(parallel, (images[rank::2], labels[rank::2])).backward()
        optimizer.clip_grad_norm_(0.7)
        optimizer.step()
    if rank == 0:
        torch.save(model.state_dict(), f"{folder}/weights")
    # DDP must not be the last to hold the group: it would wait for the group's threads with the GIL
    # held, and they need the GIL to free what they reduced, so that now and then both wait for ever.
    del parallel
    gc.collect()
    dist.destroy_process_group()


def test_two_ranks_train_as_one(tmp_path):
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    model = network(torch.float64)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    for batch in batches(5, torch.float64, size=8):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.clip_grad_norm_(0.7)
        optimizer.step()
    weights = torch.load(tmp_path / "weights", weights_only=True)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-12)
