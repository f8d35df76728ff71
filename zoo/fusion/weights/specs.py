"""The core's own fusions of weights, described without importing torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from zoo.specs import FusionSpec

_BY_CONVENTION = {"convention": {"paper": "model", "mergekit": "tensor"}}
_BY_ROWS = {"over": {"tensor": "slice", "rows": "rows"}}


def _spec(
    name: str, summary: str, paper: str, *, measure: str = "", uses: Iterable[str] = (),
    can_use: Iterable[str] = (), **fields: Any,
) -> FusionSpec:
    """The strategy in the file of its name. measure: the file with its `measure`."""
    file = name.replace("++", "_plus_plus")
    return FusionSpec(
        name=name, kind="weights", build=f"zoo.fusion.weights.{file}:{file}", summary=summary,
        paper=paper, license="Apache-2.0", uses=frozenset(uses), can_use=frozenset(can_use),
        measure=f"zoo.fusion.weights.{measure}:measure" if measure else "", **fields)


WEIGHTS: tuple[FusionSpec, ...] = (
    _spec("average", "Mean of the members' weights, plain or weighted (uniform soup)",
          "Wortsman 2022, arXiv:2203.05482", scope="slice", symmetric=True, idempotent=True),
    _spec("wise_ft", "A point on the line from the base to its fine-tuned model",
          "Wortsman 2021, arXiv:2109.01903", scope="slice", members=(1, 1), uses={"base"},
          symmetric=True),
    _spec("task_arithmetic", "The base plus the scaled sum of what each member changed in it",
          "Ilharco 2023, arXiv:2212.04089", scope="slice", members=(1, None), uses={"base"},
          symmetric=True),
    _spec("ties", "Trim what each member changed, elect signs, average those that agree",
          "Yadav 2023, arXiv:2306.01708", scope="slice", members=(1, None), uses={"base"},
          measure="ties", measured_over=_BY_CONVENTION, symmetric=True),
    _spec("slerp", "A point on the arc between two members",
          "Shoemake 1985 (quaternions)", scope="slice", members=(2, 2), measure="gram",
          measured_over="tensor", idempotent=True),
    _spec("nuslerp", "A point on the arc between two members or their changes in a base",
          "Goddard 2024, arXiv:2403.13257 (mergekit)", scope=_BY_ROWS, members=(2, 2),
          can_use={"base"}, measure="gram", measured_over="tensor", symmetric=True,
          idempotent=True),
    _spec("multislerp", "The members' mean direction, at their mean length",
          "Goddard 2025, goddard.blog (mergekit)", scope="slice", members=(1, None),
          can_use={"base"}, measure="gram", measured_over="tensor", symmetric=True,
          idempotent=True),
    _spec("karcher", "The mean of the members on the sphere, at their mean length",
          "Wang 2026, arXiv:2603.04972", scope="slice", members=(1, None), measure="gram",
          measured_over="tensor", symmetric=True, idempotent=True),
    _spec("model_stock", "Between the mean and the base, as far as the members' angles tell",
          "Jang 2024, arXiv:2403.19522", scope=_BY_ROWS, uses={"base"}, measure="gram",
          measured_over="tensor", symmetric=True, idempotent=True),
    _spec("dare_linear", "Drop changes at random, rescale the rest, add",
          "Yu 2024, arXiv:2311.03099", scope="slice", members=(1, None), uses={"base"},
          measure="dare_linear", measured_over=_BY_CONVENTION),
    _spec("dare_ties", "Drop changes at random, rescale the rest, elect signs",
          "Yu 2024, arXiv:2311.03099", scope="slice", members=(1, None), uses={"base"},
          measure="dare_linear", measured_over=_BY_CONVENTION),
    _spec("della_linear", "Drop changes at random, small ones more often, rescale, add",
          "Deep 2024, arXiv:2406.11617", scope="rows", members=(1, None), uses={"base"},
          measure="della_linear", measured_over=_BY_CONVENTION),
    _spec("della", "Drop changes at random, small ones more often, rescale, elect signs",
          "Deep 2024, arXiv:2406.11617", scope="rows", members=(1, None), uses={"base"},
          measure="della_linear", measured_over=_BY_CONVENTION),
    _spec("breadcrumbs", "Drop the largest and the smallest changes, add the rest",
          "Davari 2023, arXiv:2312.06795", scope="slice", members=(1, None), uses={"base"},
          measure="breadcrumbs", measured_over="tensor", symmetric=True),
    _spec("breadcrumbs_ties", "Drop the largest and the smallest changes, elect signs",
          "Davari 2023, arXiv:2312.06795", scope="slice", members=(1, None), uses={"base"},
          measure="breadcrumbs", measured_over="tensor", symmetric=True),
    _spec("sce", "Select where members differ, weigh them by their changes, erase minorities",
          "Wan 2024, arXiv:2408.07990", scope="slice", members=(1, None), uses={"base"},
          measure="sce", measured_over="tensor", symmetric=True),
    _spec("pcb", "Balance parameters within and between members (PCB-Merging)",
          "Du 2024, arXiv:2410.02396", scope="slice", members=(1, None), uses={"base"},
          measure="pcb", symmetric=True),
    _spec("consensus", "Keep the sum of changes where several members want it (TALL masks)",
          "Wang 2024, arXiv:2405.07813", scope="slice", uses={"base"}, symmetric=True),
    _spec("magmax", "The change of the largest magnitude wins",
          "Marczak 2024, arXiv:2407.06322", scope="slice", members=(1, None), uses={"base"},
          symmetric=True, idempotent=True),
    _spec("lines", "The sum of changes, scaled up from the first layer to the last (LiNeS)",
          "Wang 2024, arXiv:2410.17146", scope="slice", members=(1, None), uses={"base"},
          symmetric=True),
    _spec("swa", "Mean of the checkpoints of one run (stochastic weight averaging)",
          "Izmailov 2018, arXiv:1803.05407", scope="slice", members=(1, None), idempotent=True),
    _spec("ema", "Exponential moving average of the checkpoints of one run",
          "Tarvainen 2017, arXiv:1703.01780", scope="slice", members=(1, None), idempotent=True),
    _spec("tsv_m", "Largest singular vectors of each task, made orthogonal across tasks",
          "Gargiulo 2025, arXiv:2412.00081", members=(1, None), uses={"base"}, symmetric=True),
    _spec("iso_c", "Sum of what each member changed, with all singular values made equal",
          "Marczak 2025, arXiv:2502.04959", members=(1, None), uses={"base"}, symmetric=True),
    _spec("iso_cts", "iso_c, with each task's own directions beside the common ones",
          "Marczak 2025, arXiv:2502.04959", members=(1, None), uses={"base"}, symmetric=True),
    _spec("wudi", "The change that interferes least with each member's, by Adam",
          "Cheng 2025, arXiv:2503.08099", members=(1, None), uses={"base"}, symmetric=True),
    _spec("emr", "One elected change of the base, or one member's mask and scale of it",
          "Huang 2024, arXiv:2405.17461", scope="slice", uses={"base"}, measure="emr",
          symmetric=True, idempotent=True),
    _spec("fisher", "Mean weighted by how much each member's answers depend on a weight",
          "Matena 2022, arXiv:2111.09832", scope="model", uses={"module", "data"},
          can_use={"labels"}, symmetric=True, idempotent=True),
    _spec("regmean", "Each linear layer regressed onto the members' answers to their inputs",
          "Jin 2023, arXiv:2212.09849", scope="model", uses={"module", "data"}, symmetric=True,
          idempotent=True),
    _spec("regmean++", "regmean block by block, on inputs from the blocks merged before",
          "Nguyen 2025, arXiv:2508.03121", scope="model", uses={"module", "data"}, symmetric=True,
          idempotent=True),
    _spec("greedy_soup", "Mean of those members that make it no worse on validation data",
          "Wortsman 2022, arXiv:2203.05482", scope="model", uses={"score"}, idempotent=True),
    _spec("learned_soup", "Mean with the shares of least cross-entropy on validation data",
          "Wortsman 2022, arXiv:2203.05482", scope="model",
          uses={"module", "data", "labels", "score"}, idempotent=True),
    _spec("adamerging", "Task arithmetic with coefficients of least entropy on unlabelled images",
          "Yang 2024, arXiv:2310.02575", scope="model", members=(1, None),
          uses={"base", "module", "data"}, symmetric=True),
)
