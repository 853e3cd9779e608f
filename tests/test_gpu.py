"""What GPUs need, held on a CPU: cards and drivers are simulated where torch asks for them."""

from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rounding import assert_same_but_rounding
from safetensors.torch import load_file
from torch.nn import functional
from typer.testing import Result

from loratune.engine import engine
from loratune.engine.sampling import Sampling
from loratune.engine.types import GenerationRequest
from loratune.errors import Exit, LoratuneError
from loratune.model import hardware, nvidia
from loratune.model.hardware import Hardware, detect_hardware, resolve_attention
from loratune.model.kernels.linear_cross_entropy import summed_loss
from loratune.model.kernels.lora_linear import _Call, _FusedLinear
from loratune.model.kernels.norm_mlp import _GatedSiLU, _norm_by_torch, _RMSNorm
from loratune.model.kernels.packed_attention import _attend_by_products, _attend_by_sdpa
from loratune.model.kernels.rounded_weights import RoundedWeight
from loratune.model.memory import is_out_of_memory
from loratune.model.weights import reference
from loratune.recipe.loading import load_recipe
from loratune.recipe.sections import ModelSettings
from loratune.training.arguments import training_arguments
from loratune.training.callbacks import MOST_SKIPPED, DivergenceGuard

Cli = Callable[..., Result]
WHEEL = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120a"]
T4, V100, RTX_4090, H100 = (7, 5), (7, 0), (8, 9), (9, 0)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Be a machine with GPUs, as torch's questions show it."""

    def simulate(count: int = 1, capability: tuple[int, int] = H100, archs: list[str] = WHEEL) -> None:
        for name in ("WORLD_SIZE", "LOCAL_RANK", "CUDA_VISIBLE_DEVICES"):
            monkeypatch.delenv(name, raising=False)
        answers = {
            "is_available": True, "device_count": count, "get_device_capability": capability, "set_device": None,
            "get_device_name": "a card", "get_arch_list": archs, "is_bf16_supported": capability >= (8, 0),
        }  # fmt: skip
        for name, answer in answers.items():
            monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
        monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda is_on: switched.append(is_on))

    switched: list[bool] = []
    simulate.switched = switched  # type: ignore[attr-defined]
    return simulate


def test_documents_of_ever_new_lengths_are_not_given_to_cudnn(machine: Any) -> None:
    machine()
    assert detect_hardware().is_gpu
    assert machine.switched == [False]


@pytest.mark.parametrize(
    ("capability", "archs", "is_served"),
    [
        (V100, WHEEL, False),
        (T4, WHEEL, True),
        (RTX_4090, WHEEL, True),  # by the code for 8.6
        (H100, WHEEL, True),
        ((12, 0), WHEEL, True),
        ((12, 1), WHEEL, True),
        ((11, 0), WHEEL, False),
        ((11, 0), [*WHEEL, "compute_100"], True),  # PTX is compiled for later cards
        (V100, ["sm_75", "compute_120"], False),
        (H100, [], True),  # a build that says nothing
        (H100, ["gfx90a", "gfx1100"], True),  # ROCm
    ],
)
def test_a_card_that_torch_has_no_kernels_for_is_refused(
    machine: Any, capability: tuple[int, int], archs: list[str], is_served: bool
) -> None:
    machine(capability=capability, archs=archs)
    if is_served:
        assert detect_hardware().capability == capability
        return
    with pytest.raises(LoratuneError, match=f"capability {capability[0]}.{capability[1]}.*Install a build") as refused:
        detect_hardware()
    assert refused.value.exit_code == Exit.IO


def test_each_process_may_see_a_gpu_of_its_own(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(count=1)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert detect_hardware().device == torch.device("cuda", 0)
    machine(count=4)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    found = detect_hardware()
    assert (found.device, found.others) == (torch.device("cuda", 3), 0)


@pytest.mark.parametrize(
    ("visible", "has_device"), [(None, True), ("", True), ("-1", True), ("0", True), (None, False)]
)
def test_a_gpu_that_torch_cannot_use_is_not_passed_over_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, has_device: bool
) -> None:
    driver = tmp_path / "version"
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19\nGCC version: gcc 12\n")
    monkeypatch.setattr(nvidia, "DRIVER", driver)
    monkeypatch.setattr(nvidia, "DEVICE", tmp_path / "nvidiactl")
    if has_device:
        (tmp_path / "nvidiactl").touch()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")

    def init() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12020).")

    monkeypatch.setattr(torch.cuda, "init", init)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if visible in ("", "-1") or not has_device:  # as in a container without the GPU of its machine
        assert not detect_hardware().is_gpu
        return
    with pytest.raises(LoratuneError, match="too old") as refused:
        detect_hardware()
    for word in ("535.104.05", "made for CUDA 13.0", "CUDA_VISIBLE_DEVICES=-1"):
        assert word in refused.value.message
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(LoratuneError, match="has no CUDA"):
        detect_hardware()


def card(capability: tuple[int, int], others: int = 0) -> Hardware:
    return Hardware(torch.device("cuda", 0), capability >= (8, 0), "a card", 1, capability, others)


@pytest.mark.parametrize(
    ("capability", "dtype", "is_installed", "lacking"),
    [
        (RTX_4090, torch.bfloat16, True, None),
        (RTX_4090, torch.float16, True, None),
        (RTX_4090, torch.float32, True, "model.dtype"),
        (T4, torch.float16, True, "compute capability 8.0"),
        (RTX_4090, torch.bfloat16, False, "flash-attn 2"),
    ],
)
def test_flash_attention_is_taken_only_where_it_runs(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    dtype: torch.dtype,
    is_installed: bool,
    lacking: str | None,
) -> None:
    monkeypatch.setattr(hardware, "is_flash_attn_2_available", lambda: is_installed)
    chosen = resolve_attention("auto", card(capability), dtype)
    assert chosen == ("sdpa" if lacking else "flash_attention_2")
    if lacking:
        with pytest.raises(LoratuneError, match=lacking):
            resolve_attention("flash_attention_2", card(capability), dtype)


def test_the_reference_of_a_proof_never_computes_with_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """It casts to the config's type, so that the comparison would not be one in float32."""
    asked: list[ModelSettings] = []

    def stop(settings: ModelSettings, *_: Any) -> None:
        asked.append(settings)
        raise InterruptedError

    monkeypatch.setattr(reference, "load_base", stop)
    settings = ModelSettings(base="x", quantization="nf4", attn_implementation="flash_attention_2")
    with pytest.raises(InterruptedError):
        reference.load_reference(settings, Path("base"), Path("adapter"), card(H100))
    assert [(one.attn_implementation, one.compute_dtype) for one in asked] == [("sdpa", "float32")]


@pytest.mark.parametrize("is_gpu", [True, False])
def test_a_conversation_that_a_gpu_has_no_room_for_is_refused(monkeypatch: pytest.MonkeyPatch, is_gpu: bool) -> None:
    place = card(H100) if is_gpu else detect_hardware()
    monkeypatch.setattr(engine, "detect_hardware", lambda: place)
    monkeypatch.setattr(engine, "free_memory_bytes", lambda _: 40_000)
    loaded = engine.load_engine([], "tiny-qwen")
    question = GenerationRequest("word " * 300, Sampling(max_new_tokens=2))
    try:
        assert any("room for the keys and values" in warning for warning in loaded.warnings) is is_gpu
        if is_gpu:
            with pytest.raises(LoratuneError, match="shorten it"):
                next(loaded.stream(question))
        else:  # whose memory is taken only as it is written
            assert list(loaded.stream(question))
    finally:
        loaded.close()


def recipe_of(tmp_path: Path, **values: Any) -> Any:
    return load_recipe(None, {"model.base": "x", "data.train": ["y"], "output": str(tmp_path / "out")} | values)


def test_one_process_trains_on_one_of_several_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.training_args.TrainingArguments.n_gpu", property(lambda self: self._n_gpu))
    monkeypatch.setattr(
        "transformers.training_args.TrainingArguments._setup_devices",
        property(lambda self: setattr(self, "_n_gpu", 2) or torch.device("cpu")),
    )
    arguments, warnings = training_arguments(recipe_of(tmp_path), card(H100, others=1), False)
    assert arguments.n_gpu == 1
    assert any("one of 2 GPUs" in warning and "--gpus auto" in warning for warning in warnings)


def test_bfloat16_on_a_card_that_emulates_it_is_warned_of(tmp_path: Path) -> None:
    asked = recipe_of(tmp_path, **{"model.dtype": "bfloat16"})
    slow = recipe_of(tmp_path, **{"model.quantization": "nf4", "model.compute_dtype": "bfloat16"})
    assert any("set model.dtype to auto" in told for told in training_arguments(asked, card(T4), False)[1])
    assert any("set model.compute_dtype to auto" in told for told in training_arguments(slow, card(T4), False)[1])
    for recipe, where in ((asked, card(H100)), (recipe_of(tmp_path), card(T4))):
        assert not any("emulates" in told for told in training_arguments(recipe, where, False)[1])


WIDTH = 3584


def silu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(x)


def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight[0]


def attended(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """One head of as many tokens as rows."""
    scores = (query @ key.t()) / WIDTH + torch.full((len(query), len(query)), -torch.inf).triu(1)
    return scores.softmax(-1) @ value


def attended_by(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda *rows: function(*(one[None, None] for one in rows))[0, :, 0]


def fused_linear(x: torch.Tensor, weight: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> Any:
    """A layer of 3584 to 3 features with an adapter of rank 3."""
    layer = torch.nn.Linear(WIDTH, 3, bias=False).requires_grad_(False)
    layer.weight.data = weight / WIDTH
    a, b = RoundedWeight(down.float() / WIDTH), RoundedWeight(up[:, :3].float())
    branch: Any = types.SimpleNamespace(base=layer, a=a, b=b)
    return _FusedLinear.apply(x, None, a.weight, b.weight, _Call(branch, 0.5, 0.0))


def loss_of(hidden: torch.Tensor, weight: torch.Tensor) -> Any:
    head = torch.nn.Linear(WIDTH, 3, bias=False).requires_grad_(False)
    head.weight.data = weight / WIDTH
    return summed_loss(hidden, torch.tensor([0, 1, 2]), head)[0]


# Function → plain formula, and the number of inputs of 3 rows.
OWN_FUNCTIONS: dict[str, tuple[Callable[..., Any], Callable[..., torch.Tensor], int]] = {
    "norm": (lambda x, weight: _RMSNorm.apply(x, weight[0], 1e-6), normed, 2),
    "torch's norm": (lambda x, weight: _norm_by_torch(x, weight[0], 1e-6), normed, 2),
    "gate": (_GatedSiLU.apply, lambda gate, up: silu(gate) * up, 2),
    "adapted layer": (
        fused_linear,
        lambda x, weight, down, up: x @ weight.t() / WIDTH + 0.5 * x @ down.t() @ up[:, :3].t() / WIDTH,
        4,
    ),
    "loss": (
        loss_of,
        lambda x, weight: functional.cross_entropy(x @ weight.t() / WIDTH, torch.arange(3), reduction="sum"),
        2,
    ),
    "document by sdpa": (
        attended_by(lambda *rows: _attend_by_sdpa(*rows, None, {"scaling": 1 / WIDTH})), attended, 3
    ),
    "document by products": (attended_by(lambda *rows: _attend_by_products(*rows, 1 / WIDTH)), attended, 3),
}  # fmt: skip


@pytest.mark.parametrize("name", OWN_FUNCTIONS)
def test_float16_s_autocast_does_no_harm(name: str) -> None:
    """A sum of 3584 squares of 10 is beyond float16's range; real residual streams are that large."""
    function, formula, count = OWN_FUNCTIONS[name]
    generator = torch.Generator().manual_seed(0)
    given = [(10 * torch.randn(3, WIDTH, generator=generator)).half() for _ in range(count)]
    x, exact = given[0].clone().requires_grad_(), given[0].double().requires_grad_()
    with torch.autocast("cpu", dtype=torch.float16):
        output = function(x, *given[1:])
    expected = formula(exact, *(one.double() for one in given[1:]))
    direction = torch.randn(output.shape, generator=generator).to(output.dtype)
    (grad,) = torch.autograd.grad(output, x, direction)
    (expected_grad,) = torch.autograd.grad(expected, exact, direction.double())
    assert output.dtype == (torch.float32 if name == "loss" else torch.float16)
    assert_same_but_rounding(output, expected, terms=4, dtype=torch.float16)
    assert_same_but_rounding(grad, expected_grad, terms=8, dtype=torch.float16)


def test_torch_s_norm_keeps_the_dtype_where_autocast_makes_it_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU; a CPU's autocast leaves it alone."""
    plain = functional.rms_norm
    monkeypatch.setattr(functional, "rms_norm", lambda x, *rest: plain(x.float(), *rest))
    assert _norm_by_torch(torch.ones(2, 5).half(), torch.ones(5), 1e-6).dtype == torch.float16


class Accelerator:
    """As accelerate's, as far as the guard looks at it."""

    def __init__(self, has_scaler: bool) -> None:
        self.scaler = object() if has_scaler else None
        self.optimizer_step_was_skipped = has_scaler


@pytest.mark.parametrize("has_scaler", [True, False])
def test_float16_may_search_its_scale(has_scaler: bool) -> None:
    trainer: Any = types.SimpleNamespace(accelerator=Accelerator(has_scaler), newest_rows=[], forget_rows=lambda: None)
    guard = DivergenceGuard(trainer, str, print)
    state = types.SimpleNamespace(global_step=1)

    def log(norm: float) -> None:
        guard.on_log(None, state, None, {"loss": 1.0, "grad_norm": norm, "learning_rate": 1e-4})

    if not has_scaler:
        with pytest.raises(LoratuneError, match="diverged"):
            log(float("inf"))
        return
    for _ in range(MOST_SKIPPED):
        log(float("inf"))
    with pytest.raises(LoratuneError, match="diverged"):
        log(float("inf"))
    trainer.accelerator.optimizer_step_was_skipped = False
    log(0.5)
    trainer.accelerator.optimizer_step_was_skipped = True
    log(float("inf"))  # counted anew
    with pytest.raises(LoratuneError, match="diverged"):
        guard.on_log(None, state, None, {"loss": float("nan"), "grad_norm": float("inf"), "learning_rate": 1e-4})


def test_the_adapter_of_a_quantised_base_trains_in_float32(
    cli: Cli, random_qwen: Path, rows_file: Path, tmp_path: Path
) -> None:
    flags = ["--model.quantization", "nf4", "--training.max_steps", "2", "--evaluation.questions_share", "0"]
    done = cli("sft", "--model.base", random_qwen, "--data.train", rows_file, "--output", tmp_path / "run", *flags)
    assert done.exit_code == 0, done.stderr
    dtypes = {tensor.dtype for tensor in load_file(tmp_path / "run/adapter/adapter_model.safetensors").values()}
    assert dtypes == {torch.float32}


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        torch.AcceleratorError("CUDA error: out of memory"),
    ],
)
def test_a_gpu_without_memory_is_no_bug(
    cli: Cli, short_run: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    assert is_out_of_memory(error)

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", fail)
    done = cli("infer", "--adapter", short_run, "--prompt", "Who are you?")
    assert done.exit_code == Exit.IO, done.stderr
    told = " ".join(done.stderr.split())
    assert "out of memory" in told
    assert "cannot be loaded" not in told
