"""How near our merges are to mergekit's, on the shapes of a ViT, a ResNet, a ConvNeXt and a Llama.

    python benchmarks/merge/agreement.py --mergekit path/to/its/venv/bin/python

makes a base and three models of each shape, merges them with every method that both have, in one
definition, and prints the largest difference of any entry over the largest entry of its tensor.
Random masks are drawn here and handed to both. mergekit computes in float64 where float32 leaves
its norms less than six digits. Entries off by more than 1e-6 are counted and left out, as a mask
that falls on the other side of a last digit turns them; tensors that mergekit refuses are, too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHT = [1.0, 0.5, 2.0]
SEED = 7
PRECISE = ("slerp", "nuslerp", "multislerp", "karcher", "model_stock")

# Label → our strategy and options, mergekit's method and parameters; with base=1 mergekit's first
# input is the base, and with members=2 there are two others.
METHODS: dict[str, tuple[str, dict[str, Any], str, dict[str, Any], int, int]] = {
    "linear": ("average", {}, "linear", {"weight": WEIGHT}, 0, 3),
    "slerp": ("slerp", {"t": 0.3, "convention": "mergekit"}, "slerp", {"t": 0.3}, 0, 2),
    "nuslerp": ("nuslerp", {}, "nuslerp", {"weight": WEIGHT[:2]}, 0, 2),
    "nuslerp with a base": ("nuslerp", {}, "nuslerp", {"weight": WEIGHT[:2]}, 1, 2),
    "multislerp": ("multislerp", {}, "multislerp", {"weight": WEIGHT}, 0, 3),
    "multislerp with a base": ("multislerp", {}, "multislerp", {"weight": WEIGHT}, 1, 3),
    "karcher": ("karcher", {}, "karcher", {}, 0, 3),
    "model_stock": ("model_stock", {"convention": "mergekit"}, "model_stock", {}, 1, 3),
    "task_arithmetic": ("task_arithmetic", {"scale": 0.4}, "task_arithmetic",
                        {"weight": WEIGHT, "lambda": 0.4}, 1, 3),
    "ties": ("ties", {"density": 0.3, "scale": 0.7, "convention": "mergekit"}, "ties",
             {"weight": WEIGHT, "density": 0.3, "lambda": 0.7}, 1, 3),
    "ties, summed": (
        "ties", {"density": 0.3, "normalise": False, "convention": "mergekit"}, "ties",
        {"weight": WEIGHT, "density": 0.3, "normalize": False}, 1, 3),
    "dare_linear": ("dare_linear", {"density": 0.3, "convention": "mergekit"}, "dare_linear",
                    {"weight": WEIGHT, "density": 0.3}, 1, 3),
    "dare_ties": ("dare_ties", {"density": 0.3, "convention": "mergekit"}, "dare_ties",
                  {"weight": WEIGHT, "density": 0.3}, 1, 3),
    "della": ("della", {"density": 0.4, "epsilon": 0.1, "convention": "mergekit"}, "della",
              {"weight": WEIGHT, "density": 0.4, "epsilon": 0.1}, 1, 3),
    "della_linear": (
        "della_linear", {"density": 0.4, "epsilon": 0.1, "convention": "mergekit"}, "della_linear",
        {"weight": WEIGHT, "density": 0.4, "epsilon": 0.1}, 1, 3),
    "breadcrumbs": ("breadcrumbs", {"density": 0.4, "gamma": 0.05}, "breadcrumbs",
                    {"weight": WEIGHT, "density": 0.4, "gamma": 0.05}, 1, 3),
    "breadcrumbs_ties": ("breadcrumbs_ties", {"density": 0.4, "gamma": 0.05}, "breadcrumbs_ties",
                         {"weight": WEIGHT, "density": 0.4, "gamma": 0.05}, 1, 3),
    "sce": ("sce", {"select_topk": 0.3, "convention": "mergekit"}, "sce", {"select_topk": 0.3},
            1, 3),
}


def shapes() -> dict[str, dict[str, tuple[int, ...]]]:
    """The shapes of some networks' weights; running statistics are not merged by strategies."""
    import timm

    found = {}
    for name in ("vit_tiny_patch16_224", "resnet18", "convnext_atto"):
        state = timm.create_model(name, num_classes=10).state_dict()
        found[name] = {key: tuple(tensor.shape) for key, tensor in state.items()
                       if tensor.is_floating_point() and ".running_" not in key}
    hidden, inner = 256, 704
    llama: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (8000, hidden)}
    for n in range(2):
        at = f"model.layers.{n}"
        llama |= {f"{at}.self_attn.{p}_proj.weight": (hidden, hidden) for p in "qkvo"}
        llama |= {f"{at}.mlp.up_proj.weight": (inner, hidden),
                  f"{at}.mlp.down_proj.weight": (hidden, inner),
                  f"{at}.input_layernorm.weight": (hidden,)}
    return {**found, "llama": llama}


def models(wanted: dict[str, tuple[int, ...]]) -> list[dict[str, Tensor]]:
    """A base, and three models that differ from it a little."""
    generator = torch.Generator().manual_seed(0)
    base = {key: torch.randn(shape, generator=generator) for key, shape in wanted.items()}
    # Changes as large as the weights, lest magnitudes be equal and their order chance.
    return [base, *({key: tensor + torch.randn(tensor.shape, generator=generator)
                     for key, tensor in base.items()} for _ in range(3))]


def chances(wanted: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The uniform numbers that our masks come from, by key and member."""
    from zoo.fusion.randomness import uniform16

    return {f"{key}/{member}": uniform16((SEED, key, member), 0, torch.Size(shape).numel()) + 2**-17
            for key, shape in wanted.items() for member in range(3)}


def ours(label: str, states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    from zoo.fusion.merging import merge_states
    from zoo.options import checked
    from zoo.registry import find, load
    from zoo.specs import FusionSpec

    strategy, options, _, parameters, with_base, members = METHODS[label]
    spec = find(strategy, FusionSpec)
    return merge_states(states[1:members + 1], load(spec), spec=spec, seed=SEED,
                        base=states[0] if with_base else None, options=checked(spec, options),
                        weight=parameters.get("weight"), norm_keys=())


def theirs(folder: Path) -> None:
    """Runs in mergekit's environment: merges the files of a folder tensor by tensor."""
    from mergekit.merge_methods.api import merge_tensors

    states = [load_file(folder / f"{number}.safetensors") for number in range(4)]
    uniform = load_file(folder / "uniform.safetensors")
    for number, (_, _, method, parameters, with_base, members) in enumerate(METHODS.values()):
        merged, refused = {}, {}
        for key in states[0]:
            draws = iter([uniform[f"{key}/{member}"] for member in range(3)])
            torch.bernoulli = lambda p, draws=draws: _drawn(p, next(draws))
            inputs = states[0 if with_base else 1:members + 1]
            first = 0 if with_base or method == "slerp" else None
            try:
                merged[key] = merge_tensors([state[key] for state in inputs], method,
                                            parameters=parameters, base_index=first,
                                            dtype=torch.float64 if method in PRECISE else None,
                                            out_dtype=torch.float32)
            except Exception as error:
                refused[key] = f"{type(error).__name__}: {error}"
        save_file(merged, folder / f"merged{number}.safetensors", {"refused": json.dumps(refused)})


def _drawn(probabilities: Tensor, uniform: Tensor) -> Tensor:
    if not bool(((probabilities >= 0) & (probabilities <= 1)).all()):
        raise RuntimeError("probability outside [0, 1]")  # what torch.bernoulli says of it
    return (uniform.view_as(probabilities) < probabilities).to(probabilities.dtype)


def compared(merged: dict[str, Tensor], reference: dict[str, Tensor]) -> str:
    """The worst of the entries that agree, how many do not, and how many tensors are missing."""
    off = torch.cat([((merged[key] - tensor).abs() / tensor.abs().max()).flatten()
                     for key, tensor in reference.items()])
    text = f"{off[off <= 1e-6].max().item():.1e}"
    if others := int((off > 1e-6).sum()):
        text += f", {others} of {len(off)} differ"
    if missing := len(merged) - len(reference):
        text += f", {missing} refused"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mergekit", help="the Python of an environment that has it")
    parser.add_argument("--theirs", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.theirs:
        theirs(given.theirs)
        return
    found: dict[str, list[str]] = {label: [] for label in METHODS}
    networks = shapes()
    for wanted in networks.values():
        with tempfile.TemporaryDirectory() as temporary:
            folder, states = Path(temporary), models(wanted)
            for number, state in enumerate(states):
                save_file(state, folder / f"{number}.safetensors")
            save_file(chances(wanted), folder / "uniform.safetensors")
            subprocess.run([given.mergekit, __file__, "--theirs", folder], check=True)
            for number, label in enumerate(METHODS):
                reference = load_file(folder / f"merged{number}.safetensors")
                merged = ours(label, states)
                found[label].append(compared(merged, reference))
    print("| method | " + " | ".join(networks) + " |\n| --- |" + " --- |" * 4)
    for label, cells in found.items():
        print(f"| {label} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
