"""The oracles of rules that torch lacks, against their papers written out on plain numbers and against packages."""

import importlib
import inspect
from math import copysign, exp, inf, log, sqrt

import numpy as np
import pytest
import torch

import fusedopt
from fusedopt.rules import RULES
from fusedopt.verify.oracles import CONFIGURATIONS, ORACLES
from tests.tolerances import TOLERANCES

STEPS, N = 50, 5
ZEROS = [0.0] * N


def mean_of(beta, old, new):
    return [beta * a + (1 - beta) * b for a, b in zip(old, new, strict=True)]


def norm_of(x):
    return sqrt(sum(a * a for a in x))


def squares(x):
    return [a * a for a in x]


def lion(h, t, p, g, s):
    m = s.get("exp_avg", ZEROS)
    c = mean_of(h["betas"][0], m, g)
    signs = [copysign(1.0, a) if a else 0.0 for a in c]
    s["exp_avg"] = mean_of(h["betas"][1], m, g)
    return [a - h["lr"] * (sign + h["weight_decay"] * a) for a, sign in zip(p, signs, strict=True)]


def adam_moments(h, t, g, s):
    beta1, beta2 = h["betas"]
    s["exp_avg"] = mean_of(beta1, s.get("exp_avg", ZEROS), g)
    s["exp_avg_sq"] = mean_of(beta2, s.get("exp_avg_sq", ZEROS), squares(g))
    return [a / (1 - beta1**t) for a in s["exp_avg"]], [b / (1 - beta2**t) for b in s["exp_avg_sq"]]


def lamb(h, t, p, g, s):
    m, v = adam_moments(h, t, g, s)
    if not h["bias_correction"]:
        m, v = s["exp_avg"], s["exp_avg_sq"]
    u = [a / (sqrt(b) + h["eps"]) + h["weight_decay"] * x for a, b, x in zip(m, v, p, strict=True)]
    phi = min(max(norm_of(p), h["phi_range"][0]), h["phi_range"][1])
    ratio = phi / norm_of(u) if phi and norm_of(u) else 1.0
    return [x - h["lr"] * ratio * a for x, a in zip(p, u, strict=True)]


def lars(h, t, p, g, s):
    wd, mu = h["weight_decay"], h["momentum"]
    rate = h["lr"]
    if norm_of(p) and norm_of(g):
        rate *= h["trust_coefficient"] * norm_of(p) / (norm_of(g) + wd * norm_of(p) + h["eps"])
    step = [rate * (a + wd * x) for a, x in zip(g, p, strict=True)]
    if mu:
        take = 1.0 if t == 1 else 1 - h["dampening"]
        s["momentum_buffer"] = [mu * b + take * a for b, a in zip(s.get("momentum_buffer", ZEROS), step, strict=True)]
        ahead = [a + mu * b for a, b in zip(step, s["momentum_buffer"], strict=True)]
        step = ahead if h["nesterov"] else s["momentum_buffer"]
    return [x - a for x, a in zip(p, step, strict=True)]


def novograd(h, t, p, g, s):
    beta1, beta2 = h["betas"]
    v = s["exp_avg_sq"] = norm_of(g) ** 2 if t == 1 else beta2 * s["exp_avg_sq"] + (1 - beta2) * norm_of(g) ** 2
    d = [a / (sqrt(v) + h["eps"]) + h["weight_decay"] * x for a, x in zip(g, p, strict=True)]
    share = 1 - beta1 if h["grad_averaging"] else 1.0
    s["exp_avg"] = [beta1 * m + share * a for m, a in zip(s.get("exp_avg", ZEROS), d, strict=True)]
    return [x - h["lr"] * m for x, m in zip(p, s["exp_avg"], strict=True)]


def adan(h, t, p, g, s):
    lr, wd, (beta1, beta2, beta3) = h["lr"], h["weight_decay"], h["betas"]
    diff = [a - b for a, b in zip(g, s.get("last", g), strict=True)]
    s["last"], s["neg_pre_grad"] = g, [-a for a in g]
    s["exp_avg"] = mean_of(beta1, s.get("exp_avg", ZEROS), g)
    s["exp_avg_diff"] = mean_of(beta2, s.get("exp_avg_diff", ZEROS), diff)
    ahead = [(a + beta2 * d) ** 2 for a, d in zip(g, diff, strict=True)]
    s["exp_avg_sq"] = mean_of(beta3, s.get("exp_avg_sq", ZEROS), ahead)
    moved = []
    for x, m, v, n in zip(p, s["exp_avg"], s["exp_avg_diff"], s["exp_avg_sq"], strict=True):
        d = lr * (m / (1 - beta1**t) + beta2 * v / (1 - beta2**t)) / (sqrt(n / (1 - beta3**t)) + h["eps"])
        moved.append(x - lr * wd * x - d if h["no_prox"] else (x - d) / (1 + lr * wd))
    return moved


def ademamix(h, t, p, g, s):
    (beta1, beta2, beta3), alpha = h["betas"], h["alpha"]
    if h["alpha_warmup"]:
        alpha = min(t / h["alpha_warmup"] * alpha, alpha)
    if h["beta3_warmup"]:
        part, a, b = t / h["beta3_warmup"], log(beta1), log(beta3)
        beta3 = min(exp(a * b / ((1 - part) * b + part * a)), beta3)
    s["exp_avg_fast"] = mean_of(beta1, s.get("exp_avg_fast", ZEROS), g)
    s["exp_avg_slow"] = mean_of(beta3, s.get("exp_avg_slow", ZEROS), g)
    s["exp_avg_sq"] = mean_of(beta2, s.get("exp_avg_sq", ZEROS), squares(g))
    moved = []
    for x, fast, slow, v in zip(p, s["exp_avg_fast"], s["exp_avg_slow"], s["exp_avg_sq"], strict=True):
        d = (fast / (1 - beta1**t) + alpha * slow) / (sqrt(v / (1 - beta2**t)) + h["eps"])
        moved.append(x - h["lr"] * (d + h["weight_decay"] * x))
    return moved


def adopt(h, t, p, g, s):
    lr, wd = h["lr"], h["weight_decay"]
    if not h["decouple"]:
        g = [a + wd * x for a, x in zip(g, p, strict=True)]
    if t == 1:
        s["exp_avg"], s["exp_avg_sq"] = ZEROS, squares(g)
        return p
    clip = (t - 1) ** h["clip_exp"] if h["clip_exp"] else inf
    ratio = [a / max(sqrt(v), h["eps"]) for a, v in zip(g, s["exp_avg_sq"], strict=True)]
    s["exp_avg"] = mean_of(h["betas"][0], s["exp_avg"], [min(max(a, -clip), clip) for a in ratio])
    s["exp_avg_sq"] = mean_of(h["betas"][1], s["exp_avg_sq"], squares(g))
    return [x - lr * (m + wd * x * h["decouple"]) for x, m in zip(p, s["exp_avg"], strict=True)]


def stable_adamw(h, t, p, g, s):
    hat1, hat2 = (beta * (1 - beta ** (t - 1)) / (1 - beta**t) for beta in h["betas"])
    s["exp_avg"] = mean_of(hat1, s.get("exp_avg", ZEROS), g)
    s["exp_avg_sq"] = mean_of(hat2, s.get("exp_avg_sq", ZEROS), squares(g))
    ratio = [a * a / max(u, h["eps"] ** 2) for a, u in zip(g, s["exp_avg_sq"], strict=True)]
    eta = h["lr"] / max(1.0, sqrt(sum(ratio) / N))
    quotients = [v / (sqrt(u) + h["eps"]) for v, u in zip(s["exp_avg"], s["exp_avg_sq"], strict=True)]
    return [x - eta * h["weight_decay"] * x - eta * a for x, a in zip(p, quotients, strict=True)]


def average_points(h, t, p, d, s, beta):
    """Schedule-free iterates with x kept for itself."""
    lr = h["lr"] * min(1.0, t / h["warmup_steps"]) if h["warmup_steps"] else h["lr"]
    s["lr_max"] = max(s.get("lr_max", 0.0), lr)
    weight = t ** h["r"] * s["lr_max"] ** h["weight_lr_power"]
    s["weight_sum"] = s.get("weight_sum", 0.0) + weight
    c = weight / s["weight_sum"]
    s["z"] = [z - lr * a for z, a in zip(s.get("z", p), d, strict=True)]
    s["x"] = [(1 - c) * x + c * z for x, z in zip(s.get("x", p), s["z"], strict=True)]
    return [(1 - beta) * z + beta * x for x, z in zip(s["x"], s["z"], strict=True)]


def schedule_free_sgd(h, t, p, g, s):
    d = [a + h["weight_decay"] * y for a, y in zip(g, p, strict=True)]
    return average_points(h, t, p, d, s, h["momentum"])


def schedule_free_adamw(h, t, p, g, s):
    beta1, beta2 = h["betas"]
    s["exp_avg_sq"] = mean_of(beta2, s.get("exp_avg_sq", ZEROS), squares(g))
    roots = [sqrt(v / (1 - beta2**t)) + h["eps"] for v in s["exp_avg_sq"]]
    d = [a / root + h["weight_decay"] * y for a, root, y in zip(g, roots, p, strict=True)]
    return average_points(h, t, p, d, s, beta1)


WRITTEN_OUT = {
    f.__name__: f
    for f in (
        lion, lamb, lars, novograd, adan, ademamix, adopt, stable_adamw, schedule_free_sgd, schedule_free_adamw,
    )
}  # fmt: skip
CASES = [config for config in CONFIGURATIONS if config.rule in WRITTEN_OUT]


def data(shape=(N,)):
    """A start with an exact zero and the gradients of all steps, the last element's being zero for a while."""
    start, gradients = np.random.standard_normal(shape), np.random.standard_normal((STEPS, *shape))
    start.flat[0] = 0.0
    gradients.reshape(STEPS, -1)[:10, -1] = 0.0
    return start, gradients


def walk(rule, options, start, gradients):
    """The oracle over all steps: (parameter, state) after each."""
    oracle, p, state = ORACLES[rule], start.astype(np.longdouble), {}
    for t, g in enumerate(gradients, 1):
        h = {**oracle.defaults, **options}
        with np.errstate(divide="ignore", invalid="ignore"):
            new = oracle.step(h, t, p, g.astype(np.longdouble), state)
        state = {key: value.exact for key, value in new.items()}
        p = state.pop("param")
        yield p, state


def agree(got, want):
    error = np.max(np.abs(np.asarray(got) - want), initial=0.0) / max(np.max(np.abs(want), initial=0.0), 1e-300)
    return error <= TOLERANCES["oracle, plain float64"].value


@pytest.mark.parametrize("config", CASES, ids=str)
def test_oracle_is_its_paper_written_out(config):
    h = {**ORACLES[config.rule].defaults, **config.options}
    start, gradients = data()
    p, s = start.tolist(), {}
    for t, (exact, state) in enumerate(walk(config.rule, config.options, start, gradients), 1):
        p = WRITTEN_OUT[config.rule](h, t, p, gradients[t - 1].tolist(), s)
        assert agree(p, exact), (t, p, exact)
        for key, value in state.items():
            assert agree(s[key], value), (t, key)


@pytest.mark.parametrize("shape", [(), (0,), (2, 3)])
@pytest.mark.parametrize("rule", WRITTEN_OUT)
def test_nothing_divides_by_a_zero_norm(rule, shape):
    """All zero and then one gradient: finite, and a zero parameter of a layer-wise rule moves at the rate lr."""
    gradients = [np.zeros(shape), np.ones(shape), np.zeros(shape)]
    moved = [p for p, _ in walk(rule, dict(lr=0.5), np.zeros(shape), gradients)]
    assert all(np.all(np.isfinite(p)) for p in moved)
    assert not np.any(moved[0])
    assert np.all(moved[1] < 0)
    if rule == "lars":
        np.testing.assert_array_equal(moved[1], np.full(shape, -0.5))


@pytest.mark.parametrize("rule", WRITTEN_OUT)
def test_defaults_are_those_of_the_class(rule):
    parameters = inspect.signature(getattr(fusedopt, RULES[rule])).parameters
    for key, value in ORACLES[rule].defaults.items():
        assert parameters[key].default == value, key


def package(module, name, **options):
    return lambda p: getattr(importlib.import_module(module), name)([p], **options)


DECAY = dict(lr=0.01, weight_decay=0.1)
POINTS = dict(lr=0.1, weight_decay=0.01, warmup_steps=8, r=0.5, weight_lr_power=1.5)
LARS = dict(lr=1.0, nesterov=True, weight_decay=0.01, trust_coefficient=0.1)
MANY = "pytorch_optimizer"
PACKAGES = [
    ("lion", DECAY, package("lion_pytorch", "Lion", betas=(0.9, 0.99), **DECAY), "lion-pytorch>=0.2"),
    ("schedule_free_sgd", POINTS, package("schedulefree", "SGDScheduleFree", **POINTS), "schedulefree==1.4.1"),
    ("schedule_free_adamw", POINTS, package("schedulefree", "AdamWScheduleFree", **POINTS), "schedulefree==1.4.1"),
    (
        "stable_adamw", DECAY, package("optimi", "StableAdamW", eps=1e-8, foreach=False, triton=False, **DECAY),
        "torch-optimi>=0.3",
    ),
    ("adan", DECAY, package(MANY, "Adan", weight_decouple=False, **DECAY), "pytorch_optimizer>=4"),
    (
        "ademamix", dict(alpha=5.0, **DECAY), package(MANY, "AdEMAMix", weight_decouple=True, **DECAY),
        "pytorch_optimizer>=4",
    ),
    (
        "adopt", DECAY,  # there t is one larger
        package(MANY, "ADOPT", weight_decouple=False, clip_lambda=lambda step: (step - 1) ** 0.25, **DECAY),
        "pytorch_optimizer>=4",
    ),
    ("novograd", DECAY, package(MANY, "NovoGrad", weight_decouple=False, **DECAY), "pytorch_optimizer>=4"),
    ("lars", dict(momentum=0.9, eps=0.0, **LARS), package(MANY, "LARS", **LARS), "pytorch_optimizer>=4"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "options", "make"),
    [pytest.param(*case, id=f"{case[0]}, {need}", marks=pytest.mark.needs(need)) for *case, need in PACKAGES],
)
def test_oracle_agrees_with_a_package(rule, options, make):
    start, gradients = data((4, 3))  # a matrix: that LARS leaves vectors out
    p = torch.from_numpy(start.copy()).requires_grad_()
    optimizer = make(p)
    if hasattr(optimizer, "train"):
        optimizer.train()
    for g, (exact, _) in zip(gradients, walk(rule, options, start, gradients), strict=True):
        p.grad = torch.from_numpy(g.copy())
        optimizer.step()
        assert agree(p.detach().numpy(), exact)
