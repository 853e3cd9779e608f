"""Compares each kernel with float64 on the CPU, and its error with that of the plain libraries in the same type."""

from __future__ import annotations

import copy
from collections import defaultdict
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from gpu_checks.models import packed, random_rows, relative_error, with_gradient
from gpu_checks.table import Figures, Workplace

DOCUMENTS = (1, 7, 128, 129, 2000)
RESIDUAL = 10.0
"""Root mean square of a real Qwen's residual stream."""
DROPOUT = 0.25
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Errors = dict[str, tuple[float, float]]
"""Name → error of loratune, error of the plain libraries, both relative."""


def kernels(place: Workplace) -> Figures:
    """Return the largest errors of each type, and all of them by name."""
    device = torch.device("cuda" if place.is_gpu else "cpu")
    found: dict[str, Errors] = defaultdict(dict)
    wide = 3584 if place.is_gpu else 1024  # so many that the rounding of single values evens out
    for name, dtype in TYPES.items():
        if name == "float16" and not place.is_gpu:  # float16 is trained on GPUs alone
            continue
        width = 3584 if place.is_gpu else 256
        for rate in (0.0, DROPOUT):
            found[name] |= linear_errors(dense_layer(wide, dtype, device), dtype, rate)
        found[name] |= norm_and_mlp_errors(width, dtype, device)
        found[name] |= head_errors(width, dtype, device)
        found[name] |= attention_errors(place.is_gpu, dtype, device)
    found["nf4"] |= linear_errors(four_bit_layer(wide, device), torch.bfloat16, 0.0)
    return summary(found)


def summary(found: dict[str, Errors]) -> Figures:
    """Return the figures that have bounds, and every error as text."""
    figures: dict[str, Any] = {}
    own = {kind: {name: pair[0] for name, pair in errors.items()} for kind, errors in found.items()}
    figures["float32 error"] = max(own["float32"].values())
    for kind in (kind for kind in found if kind != "float32"):
        ratios = {name: pair[0] / pair[1] for name, pair in found[kind].items() if not name.endswith(("dA", "dB"))}
        worst = max(ratios, key=lambda name: ratios[name])
        figures[f"{kind} error / plain"], figures[f"{kind} worst"] = ratios[worst], worst
    of_adapter = [error for errors in own.values() for name, error in errors.items() if name.endswith(("dA", "dB"))]
    figures["error of dA and dB"] = max(of_adapter)
    told = {
        kind: {name: f"{ours:.2e}, plain {plain:.2e}" for name, (ours, plain) in of.items()}
        for kind, of in found.items()
    }
    return figures | {"errors": told}


class Net(nn.Module):
    """One linear layer, for PEFT to find by its name."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Any) -> Any:
        return self.layer(x)


class GivenMask(nn.Module):
    """In place of dropout: a mask that is known."""

    def __init__(self, mask: Any, rate: float) -> None:
        super().__init__()
        self.mask, self.rate = mask, rate

    def forward(self, x: Any) -> Any:
        return x * self.mask.to(x.dtype) / (1 - self.rate)


def dense_layer(width: int, dtype: Any, device: Any) -> Any:
    torch.manual_seed(0)
    return nn.Linear(width, width // 2).to(device, dtype)


def four_bit_layer(width: int, device: Any) -> Any:
    import bitsandbytes

    plain = dense_layer(width, torch.bfloat16, "cpu")
    layer = bitsandbytes.nn.Linear4bit(
        width, width // 2, bias=True, compute_dtype=torch.bfloat16, compress_statistics=True, quant_type="nf4"
    )
    layer.load_state_dict(plain.state_dict())
    layer.support_avx512bf16_for_cpu = False  # on a CPU it would repack the weights for inference
    return layer.to(device)


def adapted(layer: Any, rate: float, rank: int = 8) -> Any:
    """Put an adapter on a layer, whose update is a tenth of the layer's weight in norm."""
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=rate, target_modules=["layer"])
    net = Net(layer)
    net.is_loaded_in_4bit = type(layer) is not nn.Linear
    model = get_peft_model(net, config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=layer.in_features**-0.5 if "lora_A" in name else 0.01)
    return model.train()


def linear_errors(layer: Any, dtype: Any, rate: float) -> Errors:
    """Compare output and gradients of a linear layer with its branch, under loratune's dropout mask."""
    from loratune.model.kernels.lora_linear import use_fused_lora

    device = layer.weight.device
    plain = adapted(layer, rate)
    fused = copy.deepcopy(plain)
    if use_fused_lora(fused) != 1:
        raise RuntimeError("the layer has not been replaced")
    torch.manual_seed(2)
    x = torch.randn(600, layer.in_features).to(device, dtype)
    direction = torch.randn(600, layer.out_features).to(device, dtype)
    mask = drawn_mask(x, rate) if rate else torch.ones_like(x)
    if rate:
        plain.base_model.model.layer.lora_dropout["default"] = GivenMask(mask, rate)
    exact = exact_linear(fused, layer, x, direction, mask, rate)
    results = []
    for model in (fused, plain):
        torch.manual_seed(3)
        output, grad = _run(model, x, direction)
        adapter = model.base_model.model.layer
        results.append((output, grad, adapter.lora_A["default"].weight.grad, adapter.lora_B["default"].weight.grad))
    start = f"linear{', dropout' if rate else ''}"
    names = [f"{start} {part}" for part in ("y", "dx", "dA", "dB")]
    own, others = ([relative_error(got, right) for got, right in zip(one, exact, strict=True)] for one in results)
    return dict(zip(names, zip(own, others, strict=True), strict=True))


def _run(model: Any, x: Any, direction: Any) -> tuple[Any, Any]:
    rows = x.clone().requires_grad_()
    output = model(rows)
    output.backward(direction)
    return output.detach(), rows.grad


def drawn_mask(x: Any, rate: float) -> Any:
    """Return the mask that loratune draws for an input after `manual_seed(3)`.

    A layer shows it whose base is zero and whose branch passes its input on.
    """
    from loratune.model.kernels.lora_linear import use_fused_lora

    width = x.shape[1]
    layer = nn.Linear(width, width, bias=False).to(x.device, x.dtype)
    layer.weight.data.zero_()
    model = adapted(layer, rate, rank=width)
    for matrices in (model.base_model.model.layer.lora_A, model.base_model.model.layer.lora_B):
        matrices["default"].weight.data.copy_(torch.eye(width))
    if use_fused_lora(model) != 1:
        raise RuntimeError("the layer has not been replaced")
    torch.manual_seed(3)
    passed = model(torch.ones_like(x))
    share = float((passed == 0).double().mean())
    if abs(share - rate) > 0.02:
        raise RuntimeError(f"dropout of {rate:g} has dropped {share:.3f}")
    return (passed != 0).to(x.dtype)


def exact_linear(model: Any, layer: Any, x: Any, direction: Any, mask: Any, rate: float) -> tuple[Any, ...]:
    """Return y, dx, dA and dB in float64 on the CPU, written out."""
    adapter = model.base_model.model.layer
    down, up = (part["default"].weight.detach().double().cpu() for part in (adapter.lora_A, adapter.lora_B))
    weight, bias = dense_weight(layer).double().cpu(), layer.bias.detach().double().cpu()
    rows, grad = x.double().cpu(), direction.double().cpu()
    scale, kept = adapter.scaling["default"], mask.double().cpu() / (1 - rate)
    reduced = (rows * kept) @ down.T
    y = rows @ weight.T + bias + scale * reduced @ up.T
    dx = grad @ weight + scale * (grad @ up @ down) * kept
    return y, dx, scale * (grad @ up).T @ (rows * kept), scale * grad.T @ reduced


def dense_weight(layer: Any) -> Any:
    """Return a layer's weight, dequantised as bitsandbytes does it."""
    if type(layer) is nn.Linear:
        return layer.weight.detach()
    import bitsandbytes

    return bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def one_layer(width: int, dtype: Any, device: Any, **sizes: int) -> tuple[Any, Any]:
    """Return a Qwen2 of one layer and random weights in a type, and the same in float64 on the CPU."""
    torch.manual_seed(0)
    settings = {"intermediate_size": 4 * width, "vocab_size": 512, "num_attention_heads": width // 64} | sizes
    config = Qwen2Config(hidden_size=width, num_hidden_layers=1, max_position_embeddings=4096, **settings)
    model = Qwen2ForCausalLM(config).to(dtype).eval().requires_grad_(False)
    exact = copy.deepcopy(model).double()
    for module in exact.modules():
        if hasattr(module, "variance_epsilon"):  # the class computes in float32, whatever its weight is in
            module.forward = partial(exact_norm, module.weight, module.variance_epsilon)
    return model.to(device), exact


def exact_norm(weight: Any, epsilon: float, x: Any) -> Any:
    return x * (x.square().mean(-1, keepdim=True) + epsilon).rsqrt() * weight


def norm_and_mlp_errors(width: int, dtype: Any, device: Any) -> Errors:
    """Compare RMS norm and MLP, on rows as large as a residual stream, under autocast where float16 is trained so."""
    from loratune.model.kernels.norm_mlp import use_fused_elementwise

    plain, exact = one_layer(width, dtype, device, num_key_value_heads=width // 64)
    own = copy.deepcopy(plain)
    if use_fused_elementwise(own) < 2:
        raise RuntimeError("norm and MLP have not been replaced")
    torch.manual_seed(2)
    errors: Errors = {}
    for name, scale in (("input_layernorm", RESIDUAL), ("mlp", 1.0)):
        x, direction = (torch.randn(300, width).mul(size).to(device, dtype) for size in (scale, 1.0))
        right = with_gradient(exact.model.layers[0].get_submodule(name), x.double().cpu(), direction.double().cpu())
        pairs = []
        for model in (own, plain):
            with torch.autocast(device.type, torch.float16, enabled=dtype == torch.float16):
                got = with_gradient(model.model.layers[0].get_submodule(name), x, direction)
            pairs.append([relative_error(one, other) for one, other in zip(got, right, strict=True)])
        errors |= {f"{name} {part}": pair for part, pair in zip(("y", "dx"), zip(*pairs, strict=True), strict=True)}
    return errors


def head_errors(width: int, dtype: Any, device: Any) -> Errors:
    """Compare the summed loss of a head, and the gradient of its hidden states, with the full logits."""
    from loratune.model.kernels.linear_cross_entropy import summed_loss

    torch.manual_seed(0)
    vocabulary = 152_064 if device.type == "cuda" else 20_000
    head = nn.Linear(width, vocabulary, bias=False).to(device, dtype).requires_grad_(False)
    hidden = torch.randn(200, width).to(device, dtype)
    targets = torch.randint(vocabulary, (200,), device=device)

    def plain(rows: Any) -> Any:
        return nn.functional.cross_entropy(head(rows).float(), targets, reduction="sum")

    def exact(rows: Any) -> Any:
        logits = rows @ head.weight.double().cpu().T
        return nn.functional.cross_entropy(logits, targets.cpu(), reduction="sum")

    one = torch.ones(())
    right = with_gradient(exact, hidden.double().cpu(), one)
    own = with_gradient(lambda rows: summed_loss(rows, targets, head)[0], hidden, one.to(device))
    other = with_gradient(plain, hidden, one.to(device))
    pairs = [(relative_error(a, r), relative_error(b, r)) for a, b, r in zip(own, other, right, strict=True)]
    # A sum of 200 losses in float32 may be right by chance, so that a ratio of its error says nothing.
    return {"head dx": pairs[1]} if dtype != torch.float32 else dict(zip(("head loss", "head dx"), pairs, strict=True))


def attention_errors(is_gpu: bool, dtype: Any, device: Any) -> Errors:
    """Compare attention to packed documents with attention under a dense mask of the row."""
    from loratune.model.hardware import detect_hardware
    from loratune.model.kernels.attention_choice import choose_attention

    width, heads, key_heads = (3584, 28, 4) if is_gpu else (256, 4, 2)
    sizes = {"num_attention_heads": heads, "num_key_value_heads": key_heads, "intermediate_size": width}
    plain, exact = one_layer(width, dtype, device, **sizes)
    own = copy.deepcopy(plain)
    choose_attention(own, detect_hardware(), "auto", is_packed=True)
    torch.manual_seed(2)
    x = torch.randn(1, sum(DOCUMENTS), width).to(device, dtype)
    direction = torch.randn(1, sum(DOCUMENTS), width).to(device, dtype)
    batch = packed(random_rows(512, DOCUMENTS), device)
    if batch["input_ids"].shape[1] != sum(DOCUMENTS):  # a filler document extends the pass
        missing = batch["input_ids"].shape[1] - sum(DOCUMENTS)
        x, direction = (nn.functional.pad(rows, (0, 0, 0, missing)) for rows in (x, direction))
    borders = {name: value for name, value in batch.items() if name not in ("input_ids", "labels", "seq_idx")}
    right = with_gradient(attention_of(exact, masked(exact, borders)), x.double().cpu(), direction.double().cpu())
    got = with_gradient(attention_of(own, borders), x, direction)
    other = with_gradient(attention_of(plain, masked(plain, borders)), x, direction)
    names = ("documents y", "documents dx")
    return {
        name: (relative_error(a, r), relative_error(b, r))
        for name, a, b, r in zip(names, got, other, right, strict=True)
    }


def attention_of(model: Any, borders: dict[str, Any]) -> Any:
    """Return a function from embeddings to the output of the attention, without the residual stream."""
    outputs: list[Any] = []
    model.model.layers[0].self_attn.register_forward_hook(lambda _, inputs, output: outputs.append(output[0]))

    def attend(rows: Any) -> Any:
        model.model(inputs_embeds=rows, use_cache=False, **borders)
        return outputs.pop()

    return attend


def masked(model: Any, borders: dict[str, Any]) -> dict[str, Any]:
    """Return the inputs for transformers' own attention under a dense mask that keeps the documents apart."""
    model.set_attn_implementation("sdpa")
    documents = torch.repeat_interleave(borders["cu_seq_lens_q"].diff().long()).to(model.device)
    allowed = (documents[:, None] == documents[None]).tril()
    return {"attention_mask": allowed[None, None], "position_ids": borders["position_ids"].to(model.device)}
