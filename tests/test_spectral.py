"""Fusions by singular vectors, against the papers' steps with a full SVD; wudi and emr."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from zoo.errors import OptionError
from zoo.fusion.merging import merge_states
from zoo.fusion.specs import SPECS
from zoo.fusion.spectra import polar, singular
from zoo.fusion.stream import Merge, run
from zoo.fusion.weights.emr import emr
from zoo.fusion.weights.iso_c import iso_c
from zoo.fusion.weights.iso_cts import iso_cts
from zoo.fusion.weights.tsv_m import tsv_m
from zoo.fusion.weights.wudi import wudi
from zoo.options import checked

SHAPES = [(8, 3, 3, 3), (6, 10), (10, 6), (7, 7)]
SPECTRAL = [tsv_m, iso_c, iso_cts, partial(wudi, steps=30, lr=1e-3)]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def merged(strategy: Callable[..., Tensor], vectors: list[Tensor], **options: Any) -> Tensor:
    """The strategy's task vector of members that differ from their base by these."""
    base = drawn(*vectors[0].shape, seed=99).double()
    keywords = {"key": "w", "weight": [1.0] * len(vectors), **options}
    return strategy([base + vector for vector in vectors], base=base, **keywords) - base


def members(shape: tuple[int, ...], count: int = 3) -> list[Tensor]:
    return [drawn(*shape, seed=seed).double() for seed in range(count)]


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.linalg.svd(matrix, full_matrices=False)


def orthogonal(matrix: Tensor) -> Tensor:
    u, _, v = svd(matrix)
    return u @ v


def reference_tsv_m(vectors: list[Tensor]) -> Tensor:
    matrices = [vector.flatten(1) for vector in vectors]
    rank = min(matrices[0].shape) // len(matrices)
    parts = [svd(matrix) for matrix in matrices]
    left = torch.cat([u[:, :rank] for u, _, _ in parts], 1)
    values = torch.cat([s[:rank] for _, s, _ in parts])
    right = torch.cat([v[:rank] for _, _, v in parts])
    return (orthogonal(left) @ torch.diag(values) @ orthogonal(right)).view_as(vectors[0])


def reference_iso_c(vectors: list[Tensor]) -> Tensor:
    u, s, v = svd(torch.stack(vectors).sum(0).flatten(1))
    return (s.mean() * u @ v).view_as(vectors[0])


def reference_iso_cts(vectors: list[Tensor], common: float = 0.8) -> Tensor:
    matrices = [vector.flatten(1) for vector in vectors]
    full, tasks = min(matrices[0].shape), len(matrices)
    shared = full - round((full - int(full * common)) / tasks) * tasks
    own = (full - shared) // tasks
    u, s, v = svd(torch.stack(matrices).sum(0))
    lefts, values, rights = [u[:, :shared]], [s[:shared]], [v[:shared]]
    for matrix in matrices:
        outside = matrix - u[:, :shared] @ u[:, :shared].T @ matrix
        left, value, right = svd(outside)
        lefts.append(left[:, :own])
        values.append(value[:own])
        rights.append(right[:own])
    mean = torch.cat(values).mean()
    return (mean * orthogonal(torch.cat(lefts, 1)) @ orthogonal(torch.cat(rights))).view_as(
        vectors[0])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("strategy", "reference"), [
    (tsv_m, reference_tsv_m), (iso_c, reference_iso_c), (iso_cts, reference_iso_cts),
    (partial(iso_cts, common=0.4), partial(reference_iso_cts, common=0.4)),
])
def test_against_the_papers_steps(
    shape: tuple[int, ...], strategy: Callable[..., Tensor], reference: Callable[..., Tensor]
) -> None:
    vectors = members(shape)
    torch.testing.assert_close(merged(strategy, vectors), reference(vectors), rtol=1e-7, atol=1e-7)
    weighed = merged(strategy, vectors, weight=[1.0, -0.5, 2.0], scale=0.3)
    torch.testing.assert_close(
        weighed, 0.3 * reference([vectors[0], -0.5 * vectors[1], 2 * vectors[2]]),
        rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("strategy", SPECTRAL)
@pytest.mark.parametrize("shape", [(5,), (), (8, 1, 3, 3), (1, 4, 6), (1, 6), (6, 1), (0, 3)])
def test_what_is_no_matrix_is_averaged(
    strategy: Callable[..., Tensor], shape: tuple[int, ...]
) -> None:
    vectors = members(shape)
    torch.testing.assert_close(merged(strategy, vectors), torch.stack(vectors).mean(0))


def test_tsv_m_of_one_member_is_the_member_and_of_copies_what_is_kept() -> None:
    vector = drawn(6, 9).double()
    torch.testing.assert_close(merged(tsv_m, [vector]), vector)
    u, s, v = svd(vector)
    torch.testing.assert_close(merged(tsv_m, [vector] * 3), u[:, :2] * s[:2] @ v[:2])
    torch.testing.assert_close(merged(tsv_m, [vector] * 2, rank=1.0), vector)


def test_a_member_that_did_not_move_is_in_nobodys_way() -> None:
    vector = drawn(6, 9).double()
    u, s, v = svd(vector)
    still = torch.zeros_like(vector)
    torch.testing.assert_close(merged(tsv_m, [vector, still]), u[:, :3] * s[:3] @ v[:3])
    torch.testing.assert_close(merged(iso_c, [vector, still]), merged(iso_c, [vector]))
    torch.testing.assert_close(merged(wudi, [vector, still]), vector)
    for strategy in SPECTRAL:
        assert not merged(strategy, [still, still]).any()


def test_tsv_m_keeps_a_vector_of_each_task_in_small_layers() -> None:
    vectors = members((2, 9), 3)
    assert torch.linalg.matrix_rank(merged(tsv_m, vectors)) == 2
    with pytest.raises(OptionError, match=r"tsv_m: rank is 0.0, expected a fraction in \(0, 1\]"):
        merged(tsv_m, vectors, rank=0.0)


def test_directions_that_only_rounding_fills_stay_empty() -> None:
    """A full SVD would make them as large as the others."""
    vector = (drawn(12, 1, seed=1) @ drawn(1, 9, seed=2)).double()
    torch.testing.assert_close(merged(iso_c, [vector, vector]), 2 * vector)
    torch.testing.assert_close(merged(iso_cts, [vector, vector]), 2 * vector)


def test_iso_c_has_one_singular_value() -> None:
    vectors = members((6, 10))
    values = torch.linalg.svdvals(merged(iso_c, vectors))
    expected = torch.linalg.svdvals(torch.stack(vectors).sum(0)).mean()
    torch.testing.assert_close(values, expected.expand(6))


@pytest.mark.parametrize("common", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(5, 9), (2, 9), (3, 3)])
def test_iso_cts_shares_out_what_there_is(shape: tuple[int, ...], common: float) -> None:
    values = torch.linalg.svdvals(merged(iso_cts, members(shape), common=common))
    torch.testing.assert_close(values, values[0].expand(len(values)))
    if common == 1:
        torch.testing.assert_close(merged(iso_cts, members(shape), common=1.0),
                                   merged(iso_c, members(shape)))
    with pytest.raises(OptionError, match=r"iso_cts: common is 1.5, expected a fraction in"):
        merged(iso_cts, members(shape), common=1.5)


@pytest.mark.parametrize("strategy", SPECTRAL)
def test_query_key_and_value_may_be_three_matrices(strategy: Callable[..., Tensor]) -> None:
    vectors = members((12, 5))
    thirds = [merged(strategy, list(parts))
              for parts in zip(*(vector.chunk(3) for vector in vectors), strict=True)]
    for key in ("blocks.0.attn.qkv.weight", "attn.in_proj_weight"):
        split = merged(strategy, vectors, key=key, split_qkv=True)
        torch.testing.assert_close(split, torch.cat(thirds))
        assert not torch.allclose(merged(strategy, vectors, key=key), split)
    other = merged(strategy, vectors, key="fc.weight", split_qkv=True)
    torch.testing.assert_close(other, merged(strategy, vectors))


@pytest.mark.parametrize("shape", [(7, 4), (4, 7)])
def test_singular_and_polar_parts(shape: tuple[int, int]) -> None:
    matrix = drawn(*shape).double()
    u, s, v = singular(matrix)
    torch.testing.assert_close(u * s @ v, matrix)
    torch.testing.assert_close(s, torch.linalg.svdvals(matrix))
    assert [part.shape for part in singular(matrix, 2)] == [(shape[0], 2), (2,), (2, shape[1])]
    torch.testing.assert_close(polar(matrix), u @ v)


def wudi_loss(vector: Tensor, vectors: list[Tensor]) -> Tensor:
    return torch.stack([((vector - own) @ own.T).square().sum() / own.square().sum()
                        for own in vectors]).sum()


@pytest.mark.parametrize("shape", [(6, 10), (3, 40)])
def test_wudi_takes_adams_steps_on_its_loss(shape: tuple[int, int]) -> None:
    vectors = members(shape)
    vector = torch.stack(vectors).sum(0).requires_grad_()
    adam = torch.optim.Adam([vector], lr=1e-2)
    for _ in range(40):
        adam.zero_grad()
        wudi_loss(vector, vectors).backward()
        adam.step()
    found = merged(wudi, vectors, lr=1e-2, steps=40)
    torch.testing.assert_close(found, vector.detach(), rtol=1e-6, atol=1e-6)
    assert wudi_loss(found, vectors) < 0.8 * wudi_loss(torch.stack(vectors).sum(0), vectors)


def test_wudi_leaves_alone_what_does_not_interfere() -> None:
    vectors = members((6, 10), 2)
    vectors[0][:, 5:] = 0
    vectors[1][:, :5] = 0  # the tasks use different inputs
    torch.testing.assert_close(merged(wudi, vectors, lr=0.1), vectors[0] + vectors[1])
    torch.testing.assert_close(merged(wudi, members((6, 10)), steps=0),
                               torch.stack(members((6, 10))).sum(0))
    with pytest.raises(OptionError, match=r"wudi: steps is -1 and lr 1e-05, expected 0 or more"):
        merged(wudi, vectors, steps=-1)


def reference_emr(vectors: list[np.ndarray], task: int | None) -> np.ndarray:
    """The paper's three steps, entry by entry of the flattened model."""
    elected = np.zeros_like(vectors[0])
    for entry in range(len(elected)):
        own = [vector[entry] for vector in vectors]
        sign = 1 if sum(own) > 0 else -1
        elected[entry] = sign * max([value * sign for value in own if value * sign > 0] or [0])
    if task is None:
        return elected
    own = vectors[task - 1]
    masked = np.where(own * elected > 0, elected, 0)
    scaled: np.ndarray = masked * np.abs(own).sum() / np.abs(masked).sum()
    return scaled


@pytest.mark.parametrize("task", [None, 1, 3])
def test_emr_against_a_plain_reference(task: int | None) -> None:
    spec = next(spec for spec in SPECS if spec.name == "emr")
    shapes = {"a": (5, 4), "b": (3,)}
    base = {key: drawn(*shape, seed=9) for key, shape in shapes.items()}
    states = [{key: base[key] + (3 if key == "b" else 1) * drawn(*shape, seed=seed)
               for key, shape in shapes.items()} for seed in range(3)]
    weight = [1.0, 0.5, -1.0]
    found = merge_states(states, emr, spec=spec, base=base, weight=weight,
                         options=checked(spec, {"task": task, "scale": 0.5}))

    def flat(state: dict[str, Tensor]) -> np.ndarray:
        return np.concatenate([state[key].double().numpy().ravel() for key in shapes])

    vectors = [share * (flat(state) - flat(base))
               for share, state in zip(weight, states, strict=True)]
    np.testing.assert_allclose(flat(found), flat(base) + 0.5 * reference_emr(vectors, task),
                               rtol=1e-5, atol=1e-6)


def test_emr_scales_over_the_model_whatever_the_cuts() -> None:
    spec = next(spec for spec in SPECS if spec.name == "emr")
    base = {"a": drawn(40, 50, seed=9)}
    states = [{"a": base["a"] + drawn(40, 50, seed=seed)} for seed in range(3)]
    merge = Merge(emr, spec, states, base, {"a": [1.0] * 3}, checked(spec, {"task": 2}))

    def result(merge: Merge) -> Tensor:
        found = torch.empty(2000)

        def write(key: str, start: int, part: Tensor) -> None:
            found[start:start + len(part)] = part

        run(merge, write)
        return found

    torch.testing.assert_close(result(replace(merge, piece=77, measured_piece=99)), result(merge))


def test_emr_names_a_member() -> None:
    with pytest.raises(OptionError, match="emr: task is 4, expected a member from 1 to 3"):
        merged(emr, members((3, 3)), task=4)
