"""AdamW of other packages as perf/ builds it: the real ones where they are, stand-ins for those built from source."""

import dataclasses
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("perf", reason="perf/ is part of the checkout only")

from perf import check, results, run
from perf.contenders import CONTENDERS, Contender, Setup, packages
from perf.contenders.packages import FLASH, PACKAGES
from perf.work import ADAMW, FORMATS, WORKS

REQUIRES = {
    "amp_C": "apex",
    "transformer_engine": "transformer_engine>=2.14",
    "deepspeed": "deepspeed>=0.16",
    "flashoptim": "flashoptim>=0.1.3",
    "bitsandbytes": "bitsandbytes>=0.45",
    "torchao": "torchao>=0.12",
    "optimi": "torch-optimi>=0.3.3",
    "heavyball": "heavyball>=3",
    "pytorch_optimizer": "pytorch_optimizer>=4.1",
}
"""What must be importable → what is installed for it."""


def of(package: str) -> list[Contender]:
    return [c for c in PACKAGES if c.package == package]


def runs_on_cpu(package: str) -> bool:
    return all("cpu" in c.devices for c in of(package))


def needs(package: str) -> Any:
    marks = [pytest.mark.needs(REQUIRES[package])]
    return pytest.param(package, marks=marks if runs_on_cpu(package) else [*marks, pytest.mark.gpu])


# The real ones -----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # what others warn of is theirs
@pytest.mark.parametrize("package", [needs(name) for name in REQUIRES])
def test_packages_compute_adamw(package: str, device: str) -> None:
    with torch.compiler.set_stance("force_eager"):  # compiling takes minutes; a measurement checks that too
        for contender in of(package):
            for form in FORMATS.values():
                for work in (w for w in WORKS.values() if contender.takes(form, w, device)):
                    if (package, form.name, device) == ("optimi", "half", "cpu"):  # its eager step rounds p·(1 − lr·λ)
                        with pytest.raises(ArithmeticError, match="weight decay is"):
                            check.error(contender, form, work, device)
                        continue
                    error = check.error(contender, form, work, device)
                    assert error <= contender.tolerance(form), f"{contender.name}, {form.name}, {work.name}"


@pytest.mark.needs(REQUIRES["flashoptim"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="what it says without a GPU")
@pytest.mark.parametrize("form", [FORMATS[name] for name in FLASH], ids=lambda form: form.name)
def test_flashoptim_knows_the_arguments(form: Any) -> None:
    (contender,) = of("flashoptim")
    setup = Setup([torch.nn.Parameter(torch.zeros(2, dtype=form.dtype))], form, WORKS["step"])
    with pytest.raises(NotImplementedError, match="requires a CUDA device"):
        contender.make(setup)


def test_every_package_is_named() -> None:
    assert {c.package for c in PACKAGES} == set(REQUIRES)
    assert [CONTENDERS[c.name] for c in PACKAGES] == list(PACKAGES)


# Those that are not here -------------------------------------------------------------------------------------------


def test_missing_packages_are_listed_with_how_to_install_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tops = {*REQUIRES, "apex"}
    for name in [*tops, *(name for name in sys.modules if name.partition(".")[0] in tops)]:
        monkeypatch.setitem(sys.modules, name, None)
    again = runpy.run_path(packages.__file__)["PACKAGES"]  # imports none of them
    assert [c.name for c in again] == [c.name for c in PACKAGES]
    rows = {row["contender"]: row["install"] for row in run.missing(results.Writer(tmp_path / "rows.jsonl"))}
    assert set(rows) == {c.name for c in PACKAGES}
    for contender in PACKAGES:
        assert "pip install" in rows[contender.name]
        assert REQUIRES[contender.package].partition(">")[0] in rows[contender.name]
        with pytest.raises(ImportError):
            contender.make(Setup([], FORMATS[next(iter(contender.formats))], WORKS["step"]))


# Stand-ins with the arguments of the real ones ---------------------------------------------------------------------

DEEPSPEED = {"lr", "bias_correction", "betas", "eps", "adam_w_mode", "weight_decay", "amsgrad", "set_grad_none"}
APEX = DEEPSPEED | {"capturable", "master_weights"}
ENGINE = APEX | {
    "use_decoupled_grad",
    "store_param_remainders",
    "master_weight_dtype",
    "exp_avg_dtype",
    "exp_avg_sq_dtype",
}
"""As of summer 2026: apex 6424da3, Transformer Engine d0067d0, DeepSpeed edaa722."""


class Adam(torch.optim.AdamW):
    """What they have in common. Options of theirs are in `own`; bf16 weights without masters are refused."""

    takes = DEEPSPEED

    def __init__(self, params: Any, **options: Any) -> None:
        assert options.keys() <= self.takes and options.pop("adam_w_mode")
        self.own = {name: options.pop(name) for name in self.takes - DEEPSPEED if name in options}
        super().__init__(params, **options)
        assert self.own.get("master_weights", False) == (self.param_groups[0]["params"][0].dtype == torch.bfloat16)
        if self.own.get("capturable"):
            self._step_supports_amp_scaling = True

    def step(self, closure: Any = None, grad_scaler: Any = None) -> None:
        """grad_scaler: given by torch's GradScaler to those that unscale by themselves."""
        if grad_scaler is None or unscaled_in_step(self, grad_scaler):
            self.adam()

    def adam(self) -> None:
        super().step()


class ApexAdam(Adam):
    takes = APEX


class EngineAdam(Adam):
    """Masters are in an optimizer of their own."""

    takes = ENGINE

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        assert not (self.own["capturable"] and self.own["store_param_remainders"])
        self.pairs = [(p, p.detach().float()) for p in self.param_groups[0]["params"]]
        self.masters = torch.optim.AdamW([q for _, q in self.pairs], **{k: self.defaults[k] for k in ADAMW})

    @torch.no_grad()
    def adam(self) -> None:
        for p, master in self.pairs:
            assert p.grad is not None
            master.grad = p.grad.float()
        self.masters.step()
        for p, master in self.pairs:
            p.copy_(master)


def unscaled_in_step(optimizer: Any, scaler: Any) -> bool:
    """What both capturable steps do with a scaler; False where nothing must change."""
    (found,) = scaler._check_inf_per_device(optimizer).values()
    for p in optimizer.param_groups[0]["params"]:
        p.grad.div_(scaler._get_scale_async())
    return not found


def l2norm(chunk: int, flag: torch.Tensor, lists: list[list[torch.Tensor]], per_tensor: bool) -> Any:
    assert flag.dtype == torch.int and not per_tensor
    return torch.nn.utils.get_total_norm(lists[0]).float().reshape(1), torch.empty(0)


def scale_tensor(chunk: int, flag: torch.Tensor, lists: list[list[torch.Tensor]], scale: torch.Tensor) -> None:
    assert scale.shape == (1,) and scale.dtype == torch.float32
    for source, target in zip(*lists, strict=True):
        target.copy_(source * scale[0])


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand-ins are what is imported; the names of their clipping functions are noted as they are called."""
    names: list[str] = []

    def noted(name: str, function: Any) -> Any:
        return lambda *arguments: (names.append(name), function(*arguments))[1]

    def applier(op: Any, flag: torch.Tensor, lists: list[Any], *arguments: Any) -> Any:
        return op(65536, flag, lists, *arguments)

    modules: dict[str, dict[str, Any]] = {
        "apex.optimizers": {"FusedAdam": ApexAdam},
        "apex.contrib.clip_grad": {"clip_grad_norm_": noted("apex", torch.nn.utils.clip_grad_norm_)},
        "transformer_engine.pytorch.optimizers": {
            "FusedAdam": EngineAdam,
            "multi_tensor_applier": applier,
            "multi_tensor_l2norm": noted("l2norm", l2norm),
            "multi_tensor_scale_tensor": noted("scale_tensor", scale_tensor),
        },
        "deepspeed.ops.adam": {"FusedAdam": Adam},
    }
    for name, members in modules.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    return names


STANDING_IN = [c for c in PACKAGES if c.package in ("amp_C", "transformer_engine", "deepspeed")]
STEPS = [
    pytest.param(contender, form, graph, id=f"{contender.name}, {form}{', captured' * graph}")
    for contender in STANDING_IN
    for form in contender.formats
    for graph in (False, True)[: 1 + contender.graph]
]


@pytest.mark.parametrize("contender, form, graph", STEPS)
def test_stand_ins_compute_adamw(contender: Contender, form: str, graph: bool, called: list[str]) -> None:
    """Unscaled once, clipped by the norm of unscaled gradients, whichever way a step is built."""
    changed = dataclasses.replace(contender, make=lambda s: contender.make(dataclasses.replace(s, graph=graph)))
    for work in WORKS.values():
        called.clear()
        assert check.error(changed, FORMATS[form], work, "cpu") <= changed.tolerance(FORMATS[form])
        own = {"amp_C": [] if graph else ["apex"], "deepspeed": []}.get(contender.package, ["l2norm", "scale_tensor"])
        in_step = graph and work.scaled  # clipping by the scaled norm is torch's
        assert called == (own * (check.STEPS + work.scaled) if work.clip and not in_step else [])


@pytest.mark.parametrize("contender, form, graph", STEPS)
def test_a_step_with_what_is_not_finite_is_skipped(
    contender: Contender, form: str, graph: bool, called: list[str]
) -> None:
    params = [torch.nn.Parameter(torch.ones(3, dtype=FORMATS[form].dtype)) for _ in range(2)]
    for p, value in zip(params, (1.0, torch.inf), strict=True):
        p.grad = torch.full_like(p, value)
    step = contender.make(Setup(params, FORMATS[form], WORKS["amp"], 8.0, graph))
    step()
    assert all(torch.equal(p, torch.ones_like(p)) for p in params)
    for p in params:
        p.grad = torch.ones_like(p)
    step()
    assert all((p < 1).all() for p in params)


def test_small_gradients_are_not_clipped(called: list[str]) -> None:
    for contender in STANDING_IN:
        form = next(iter(contender.formats))
        p = torch.nn.Parameter(torch.ones(4, dtype=FORMATS[form].dtype))
        p.grad = torch.full_like(p, 0.25)
        contender.make(Setup([p], FORMATS[form], WORKS["clip"]))()
        assert torch.equal(p.grad, torch.full_like(p, 0.25))


@pytest.mark.parametrize("contender, form, graph", STEPS)
def test_options_follow_the_format_and_the_capture(
    contender: Contender, form: str, graph: bool, called: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    plain = Adam.__init__

    def init(self: Any, params: Any, **options: Any) -> None:
        plain(self, params, **options)
        made.append(self.own)

    monkeypatch.setattr(Adam, "__init__", init)
    params = [torch.nn.Parameter(torch.ones(3, dtype=FORMATS[form].dtype))]
    contender.make(Setup(params, FORMATS[form], WORKS["step"], graph=graph))
    masters = form == "bf16"
    remainders = {"master_weights": masters, "store_param_remainders": masters and "remainders" in contender.name}
    capturable = {"capturable": graph}
    wanted = {"amp_C": capturable, "transformer_engine": capturable | remainders, "deepspeed": {}}
    assert made == [wanted[contender.package]]


# Bytes -------------------------------------------------------------------------------------------------------------


def bytes_of(name: str, form: str) -> list[float | None]:
    found = [CONTENDERS[name].traffic(form, work) for work in WORKS]
    assert all(pair is None or pair[1] == "derived" for pair in found)
    return [pair and pair[0] for pair in found]


def test_bytes_are_those_of_the_passes() -> None:
    """Step, clip + step, unscale + clip + step, as counted for each package from its kernels."""
    assert bytes_of("apex FusedAdam", "fp32") == [28, 40, 48]
    assert bytes_of("apex FusedAdam", "bf16") == [40, 52, 60]
    assert bytes_of("Transformer Engine FusedAdam", "bf16") == [28, 34, 38]
    assert bytes_of("Transformer Engine FusedAdam, remainders", "bf16") == [26, 32, 36]
    assert bytes_of("FlashOptim FlashAdamW", "int8") == pytest.approx([12.25, 18.25, 22.25])
    assert bytes_of("bitsandbytes AdamW8bit", "int8") == pytest.approx([10.06, 16.06, 20.06])
    assert bytes_of("pytorch_optimizer FlashAdamW", "int8") == [None] * 3
