"""The core's own fusion strategies, described without importing torch."""

from __future__ import annotations

from zoo.fusion.weights.specs import WEIGHTS
from zoo.specs import FusionSpec

_LICENSE = "Apache-2.0"

SPECS: tuple[FusionSpec, ...] = (
    *WEIGHTS,
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
    FusionSpec(
        name="attention",
        build="zoo.fusion.features.attention:Attention",
        summary="Learned queries pool the members' tokens by multihead attention",
        paper="Lee 2019, arXiv:1810.00825 (PMA)",
        license=_LICENSE,
        kind="features",
        takes="tokens",
    ),
    FusionSpec(
        name="aff",
        build="zoo.fusion.features.aff:Aff",
        summary="Attentional feature fusion: channel attention weighs the members' maps",
        paper="Dai 2021, arXiv:2009.14082",
        license=_LICENSE,
        kind="features",
        takes="maps",
    ),
)
