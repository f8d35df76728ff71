"""Configurations of mergekit's with gradients, filters and slices, through both tools.

    python benchmarks/merge/configurations.py --mergekit path/to/its/venv/bin/python

makes a base and three models of a Llama of four layers, reads and merges each configuration here,
has mergekit run it, and prints the largest difference of any entry over the largest entry of its
tensor. Random masks are drawn here and handed to both. Entries off by more than 1e-6 are counted
and left out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

LAYERS, HIDDEN, INNER, TOKENS = 4, 64, 96, 200
SEED = 7

# In mergekit's own format.
CONFIGURATIONS: dict[str, dict[str, Any]] = yaml.safe_load("""
ties density per model:
  {merge_method: ties, base_model: base, models: [{model: a, parameters: {
          weight: 0.5, density: 0.3}}, {model: b, parameters: {weight: 0.8,
          density: 0.7}}]}
breadcrumbs density per model:
  {merge_method: breadcrumbs, base_model: base, models: [{model: a, parameters: {
          weight: 0.5, density: 0.3, gamma: 0.02}}, {model: b, parameters: {
          weight: 0.8, density: 0.7}}]}
breadcrumbs_ties density per model:
  {merge_method: breadcrumbs_ties, base_model: base, models: [{model: a, parameters: {
          weight: 0.5, density: 0.3, gamma: 0.02}}, {model: b, parameters: {
          weight: 0.8, density: 0.7}}]}
ties gradients:
  {merge_method: ties, base_model: base, models: [{model: a, parameters: {
          weight: [0, 0.3, 0.7, 1], density: [1, 0.7, 0.1]}}, {model: b, parameters: {
          weight: 0.5, density: [{filter: mlp, value: 0.5}, {value: [0.2,
                0.9]}]}}], parameters: {lambda: [0.5, 1.0]}}
breadcrumbs gamma gradient:
  {merge_method: breadcrumbs, base_model: base, models: [{model: a, parameters: {
          weight: 0.5, density: 0.3, gamma: [0.01, 0.2]}}, {model: b, parameters: {
          weight: 0.8, density: 0.7, gamma: 0.1}}]}
dare_ties masks injected:
  {merge_method: dare_ties, base_model: base, models: [{model: a, parameters: {
          weight: 0.5, density: 0.4}}, {model: b, parameters: {weight: 0.8,
          density: [0.3, 0.6]}}], parameters: {normalize: [{filter: norm,
          value: true}, {value: false}]}}
dare_linear masks injected:
  {merge_method: dare_linear, base_model: base, models: [{model: a, parameters: {
          weight: 0.5, density: 0.4}}, {model: b, parameters: {weight: 0.8,
          density: [0.3, 0.6]}}], parameters: {normalize: [{filter: norm,
          value: true}, {value: false}]}}
della masks injected:
  {merge_method: della, base_model: base, models: [{model: a, parameters: {
          weight: 0.5, density: 0.4, epsilon: 0.1}}, {model: b, parameters: {
          weight: 0.8, density: [0.3, 0.6], epsilon: [0.05, 0.2]}}], parameters: {
      normalize: [{filter: norm, value: true}, {value: false}]}}
della_linear masks injected:
  {merge_method: della_linear, base_model: base, models: [{model: a, parameters: {
          weight: 0.5, density: 0.4, epsilon: 0.1}}, {model: b, parameters: {
          weight: 0.8, density: [0.3, 0.6], epsilon: [0.05, 0.2]}}], parameters: {
      normalize: [{filter: norm, value: true}, {value: false}]}}
task_arithmetic lambda by filter:
  {merge_method: task_arithmetic, base_model: base, models: [{model: a, parameters: {
          weight: 0.5}}, {model: b, parameters: {weight: [{filter: norm, value: [
                0, 1.0]}, {value: 0.3}]}}], parameters: {lambda: [{filter: self_attn,
          value: 0.4}, {value: 0.9}]}}
sce topk gradient:
  {merge_method: sce, base_model: base, models: [{model: a}, {model: b}, {
        model: c}], parameters: {select_topk: [0.2, 0.9]}}
slerp one slice:
  {merge_method: slerp, base_model: a, slices: [{sources: [{model: a, layer_range: [
              0, 4]}, {model: b, layer_range: [0, 4]}]}], parameters: {t: [
        {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}, {filter: mlp, value: [
            1, 0.5, 0.7, 0.3, 0]}, {value: 0.5}]}}
slerp two slices:
  {merge_method: slerp, base_model: a, slices: [{sources: [{model: a, layer_range: [
              0, 1]}, {model: b, layer_range: [0, 1]}], parameters: {t: [
            0.1, 0.9]}}, {sources: [{model: a, layer_range: [1, 4]}, {model: b,
            layer_range: [1, 4]}], parameters: {t: [{filter: mlp, value: [
                0.2, 0.3]}, {value: 0.7}]}}]}
ties two slices:
  {merge_method: ties, base_model: base, slices: [{sources: [{model: base,
            layer_range: [0, 2]}, {model: a, layer_range: [0, 2], parameters: {
              weight: 0.3, density: 0.5}}, {model: b, layer_range: [0, 2],
            parameters: {weight: [0.1, 0.9], density: [0.2, 0.4]}}]}, {sources: [
          {model: base, layer_range: [2, 4]}, {model: b, layer_range: [2,
              4], parameters: {weight: 0.6, density: 0.8}}, {model: a, layer_range: [
              2, 4], parameters: {density: 0.9}}]}], parameters: {weight: 0.7}}
linear three slices:
  {merge_method: linear, slices: [{sources: [{model: a, layer_range: [0, 1],
            parameters: {weight: [1.0, 0.2]}}, {model: b, layer_range: [0,
              1], parameters: {weight: 0.5}}]}, {sources: [{model: a, layer_range: [
              1, 3], parameters: {weight: [0.7, 0.2]}}, {model: b, layer_range: [
              1, 3], parameters: {weight: 0.5}}]}, {sources: [{model: a, layer_range: [
              3, 4], parameters: {weight: [0.10000000000000009, 0.2]}}, {
            model: b, layer_range: [3, 4], parameters: {weight: 0.5}}]}]}
slerp three slices, filters that cross:
  {merge_method: slerp, base_model: a, slices: [{sources: [{model: a, layer_range: [
              0, 2]}, {model: b, layer_range: [0, 2]}], parameters: {t: [
            {filter: mlp, value: 0.1}, {filter: proj, value: 0.4}, {value: 0.6}]}},
      {sources: [{model: a, layer_range: [2, 4]}, {model: b, layer_range: [
              2, 4]}], parameters: {t: [{filter: proj, value: 0.3}, {filter: mlp,
              value: 0.9}, {value: 0.2}]}}]}
nuslerp flatten=False row_wise=False base=None:
  {merge_method: nuslerp, models: [{model: a, parameters: {weight: [0.2, 0.9]}},
      {model: b, parameters: {weight: 0.6}}], parameters: {nuslerp_flatten: false,
      nuslerp_row_wise: false}}
nuslerp flatten=False row_wise=False base=base:
  {merge_method: nuslerp, base_model: base, models: [{model: a, parameters: {
          weight: [0.2, 0.9]}}, {model: b, parameters: {weight: 0.6}}], parameters: {
      nuslerp_flatten: false, nuslerp_row_wise: false}}
nuslerp flatten=False row_wise=True base=None:
  {merge_method: nuslerp, models: [{model: a, parameters: {weight: [0.2, 0.9]}},
      {model: b, parameters: {weight: 0.6}}], parameters: {nuslerp_flatten: false,
      nuslerp_row_wise: true}}
nuslerp flatten=False row_wise=True base=base:
  {merge_method: nuslerp, base_model: base, models: [{model: a, parameters: {
          weight: [0.2, 0.9]}}, {model: b, parameters: {weight: 0.6}}], parameters: {
      nuslerp_flatten: false, nuslerp_row_wise: true}}
nuslerp flatten=True row_wise=True base=None:
  {merge_method: nuslerp, models: [{model: a, parameters: {weight: [0.2, 0.9]}},
      {model: b, parameters: {weight: 0.6}}], parameters: {nuslerp_flatten: true,
      nuslerp_row_wise: true}}
nuslerp flatten=True row_wise=True base=base:
  {merge_method: nuslerp, base_model: base, models: [{model: a, parameters: {
          weight: [0.2, 0.9]}}, {model: b, parameters: {weight: 0.6}}], parameters: {
      nuslerp_flatten: true, nuslerp_row_wise: true}}
multislerp gradient:
  {merge_method: multislerp, models: [{model: a, parameters: {weight: [0.2,
            0.9]}}, {model: b, parameters: {weight: 0.6}}, {model: c, parameters: {
          weight: 0.4}}], parameters: {normalize_weights: true}}
linear filter lm_head:
  {merge_method: linear, models: [{model: a, parameters: {weight: [{filter: lm_head,
              value: 1.0}, {filter: nothing, value: 3}, {value: [0.2, 0.5,
                0.9]}]}}, {model: b, parameters: {weight: 0.5}}]}
""")

def models() -> dict[str, dict[str, Tensor]]:
    """A base, and three models that differ from it."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (TOKENS, HIDDEN)}
    for number in range(LAYERS):
        at = f"model.layers.{number}"
        shapes |= {f"{at}.self_attn.{part}_proj.weight": (HIDDEN, HIDDEN) for part in "qkvo"}
        shapes |= {f"{at}.mlp.{part}_proj.weight": (INNER, HIDDEN) for part in ("up", "gate")}
        shapes |= {f"{at}.mlp.down_proj.weight": (HIDDEN, INNER),
                   f"{at}.input_layernorm.weight": (HIDDEN,),
                   f"{at}.post_attention_layernorm.weight": (HIDDEN,)}
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (TOKENS, HIDDEN)}
    generator = torch.Generator().manual_seed(0)
    base = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    return {"base": base, **{
        name: {key: tensor + torch.randn(tensor.shape, generator=generator)
               for key, tensor in base.items()} for name in "abc"}}


def written() -> None:
    """The models and the random numbers of our masks, into the current folder."""
    from zoo.fusion.randomness import uniform16

    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
              "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
              "num_key_value_heads": 4, "vocab_size": TOKENS, "tie_word_embeddings": False}
    made = models()
    for name, state in made.items():
        Path(name).mkdir()
        save_file(state, f"{name}/model.safetensors", {"format": "pt"})
        Path(name, "config.json").write_text(json.dumps(config))
    save_file({f"{key}/{member}": uniform16((SEED, key, member), 0, tensor.numel()) + 2**-17
               for key, tensor in made["base"].items() for member in (0, 1)},
              "uniform.safetensors")
    for number, configuration in enumerate(CONFIGURATIONS.values()):
        Path(f"{number}.yml").write_text(yaml.safe_dump({**configuration, "dtype": "float32"}))


def ours() -> None:
    import zoo
    from zoo.merge_files.mergekit import read_mergekit

    for number in range(len(CONFIGURATIONS)):
        found = read_mergekit(f"{number}.yml")
        zoo.merge(found.pop("inputs"), found.pop("strategy"), out=f"ours{number}", seed=SEED,
                  **found)


def theirs() -> None:
    """Runs in mergekit's environment, in the folder of the models."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.merge_methods.generalized_task_arithmetic import GeneralizedTaskArithmeticMerge
    from mergekit.options import MergeOptions

    uniform = load_file("uniform.safetensors")
    merge_group: Callable[..., Tensor] = GeneralizedTaskArithmeticMerge.merge_group

    def with_our_masks(self: Any, group: Any, /, **parameters: Any) -> Tensor:
        draws = iter([uniform[f"{group.metadata.name}/{member}"] for member in (0, 1)])
        torch.bernoulli = lambda p: (next(draws).view_as(p) < p).to(p.dtype)
        return merge_group(self, group, **parameters)

    GeneralizedTaskArithmeticMerge.merge_group = with_our_masks
    options = MergeOptions(copy_tokenizer=False, quiet=True, write_model_card=False)
    for number in range(len(CONFIGURATIONS)):
        told = yaml.safe_load(Path(f"{number}.yml").read_text())
        run_merge(MergeConfiguration.model_validate(told), f"theirs{number}", options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mergekit", help="the Python of an environment that has it")
    parser.add_argument("--theirs", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.theirs:
        theirs()
        return
    script = Path(__file__).absolute()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        written()
        ours()
        subprocess.run([given.mergekit, script, "--theirs"], check=True, env={
            name: value for name, value in os.environ.items() if name != "PYTHONPATH"})
        print("| configuration | difference |\n| --- | --- |")
        for number, label in enumerate(CONFIGURATIONS):
            found = load_file(f"ours{number}/model.safetensors")
            reference = load_file(f"theirs{number}/model.safetensors")
            off = torch.cat([((found[key] - tensor).abs() / tensor.abs().max()).flatten()
                             for key, tensor in reference.items()])
            others = int((off > 1e-6).sum())
            text = f", {others} of {len(off)} differ" if others else ""
            print(f"| {label} | {off[off <= 1e-6].max().item():.1e}{text} |")


if __name__ == "__main__":
    main()
