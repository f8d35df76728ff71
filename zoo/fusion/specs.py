"""The core's own fusion strategies, described without importing torch."""

from __future__ import annotations

from zoo.specs import FusionSpec

_LICENSE = "Apache-2.0"

SPECS: tuple[FusionSpec, ...] = (
    FusionSpec(
        name="average",
        build="zoo.fusion.weights.average:average",
        summary="Mean of the members' weights, plain or weighted (uniform soup)",
        paper="Wortsman 2022, arXiv:2203.05482",
        license=_LICENSE,
        kind="weights",
        symmetric=True,
        idempotent=True,
    ),
    FusionSpec(
        name="wise_ft",
        build="zoo.fusion.weights.wise_ft:wise_ft",
        summary="A point on the line from the base to its fine-tuned model",
        paper="Wortsman 2021, arXiv:2109.01903",
        license=_LICENSE,
        kind="weights",
        members=(1, 1),
        uses=frozenset({"base"}),
        symmetric=True,
    ),
    FusionSpec(
        name="task_arithmetic",
        build="zoo.fusion.weights.task_arithmetic:task_arithmetic",
        summary="The base plus the scaled sum of what each member changed in it",
        paper="Ilharco 2023, arXiv:2212.04089",
        license=_LICENSE,
        kind="weights",
        members=(1, None),
        uses=frozenset({"base"}),
        symmetric=True,
    ),
    FusionSpec(
        name="ties",
        build="zoo.fusion.weights.ties:ties",
        measure="zoo.fusion.weights.ties:measure",
        summary="Trim what each member changed, elect signs, average those that agree",
        paper="Yadav 2023, arXiv:2306.01708",
        license=_LICENSE,
        kind="weights",
        members=(1, None),
        uses=frozenset({"base"}),
        symmetric=True,
    ),
    FusionSpec(
        name="concat",
        build="zoo.fusion.features.concat:Concat",
        summary="Layer-normalised features side by side, for a linear classifier",
        paper="Ba 2016, arXiv:1607.06450 (layer norm)",
        license=_LICENSE,
        kind="features",
    ),
    FusionSpec(
        name="gated",
        build="zoo.fusion.features.gated:Gated",
        summary="Gated multimodal unit: gates weigh the members for each input",
        paper="Arevalo 2017, arXiv:1702.01992",
        license=_LICENSE,
        kind="features",
    ),
    FusionSpec(
        name="mean",
        build="zoo.fusion.outputs.mean:Mean",
        summary="Mean of the members' probabilities or logits (deep ensemble)",
        paper="Lakshminarayanan 2017, arXiv:1612.01474",
        license=_LICENSE,
        kind="outputs",
        symmetric=True,
        idempotent=True,
    ),
    FusionSpec(
        name="weighted",
        build="zoo.fusion.outputs.weighted:Weighted",
        summary="Weighted mean of calibrated members, fitted on held-out data",
        paper="Guo 2017, arXiv:1706.04599 (temperatures)",
        license=_LICENSE,
        kind="outputs",
        uses=frozenset({"data", "labels"}),
        symmetric=True,
    ),
)
