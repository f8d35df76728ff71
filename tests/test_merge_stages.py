"""Merges of merges: our own YAML with members that are merges, and files of several documents."""

from __future__ import annotations

import json
import shutil
import socket
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import zoo
from zoo.cli import main
from zoo.errors import DiskFull, FusionError, OptionError, RecipeError, ZooError
from zoo.merge_files import stages
from zoo.merge_files.configs import read_config
from zoo.merge_files.stages import merge_stages
from zoo.tensors import load_tensors

NESTED = """\
strategy: average
members:
  - a
  - strategy: ties
    members: [b, c]
    base: base
    density: 0.5
weight: [0.25, 0.75]
"""
KITS = """\
name: first
merge_method: linear
models:
  - model: a
  - model: b
---
merge_method: task_arithmetic
base_model: base
models:
  - model: second
    parameters: {weight: 0.5}
  - model: first
---
name: second
merge_method: slerp
base_model: first
models:
  - model: c
parameters: {t: 0.25}
"""


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "a", "b", "c")):
        Path(name).mkdir()
        generator = torch.Generator().manual_seed(seed)
        save_file({key: torch.randn(8, 4, generator=generator) for key in ("layers.0.w", "head.w")},
                  Path(name, "model.safetensors"))


def run(text: str, out: str = "out", *more: str) -> dict[str, Any]:
    """What the command line makes of a configuration, and nothing is left beside it."""
    Path("m.yml").write_text(text)
    with pytest.raises(SystemExit) as end:
        main(["merge", "--config", "m.yml", "-o", out, *more])
    assert end.value.code == 0
    assert {each.name for each in Path().iterdir()} == {"base", "a", "b", "c", "m.yml", out}
    return load_tensors(out)


def equal(one: dict[str, Any], other: Path) -> bool:
    return all(torch.equal(tensor, one[key]) for key, tensor in load_tensors(other).items())


@pytest.mark.parametrize("out", ["out", "out.safetensors"])
def test_a_member_may_be_a_merge(tmp_path: Path, out: str) -> None:
    merged = run(NESTED, out)
    inner = zoo.merge(["b", "c"], "ties", base="base", density=0.5, out="inner")
    assert equal(merged, zoo.merge(["a", inner], "average", weight=[0.25, 0.75], out="outer"))


def test_the_result_tells_what_its_members_were_made_of() -> None:
    run(NESTED)
    made = json.loads(Path("out/config.json").read_text())["zoo"]["made_with"]
    one, other = made["sources"]
    assert one == {"name": "a"}
    assert other["made_with"]["strategy"] == "zoo/ties"
    assert other["made_with"]["options"]["density"] == 0.5
    assert [each["name"] for each in other["made_with"]["sources"]] == ["b", "c"]
    assert other["made_with"]["base"]["name"] == "base"


def test_mergekits_documents_name_each_other_in_any_order() -> None:
    merged = run(KITS)
    zoo.merge(["a", "b"], "average", out="first")
    zoo.merge(["first", "c"], "slerp", weight=[0.75, 0.25], out="second")
    assert equal(merged, zoo.merge(["second", "first"], "task_arithmetic", base="base",
                                   weight=[0.5, 1.0], out="last"))


def test_where_all_have_names_the_result_is_what_no_other_needs() -> None:
    named = KITS.replace("---\nmerge_method", "---\nname: last\nmerge_method")
    assert equal(run(named), merge_stages(read_config("m.yml"), "again"))


def test_a_name_may_be_needed_deep_in_another_and_have_any_letters() -> None:
    run("name: my/merge\nstrategy: slerp\nmembers: [a, b]\n---\nname: end\nstrategy: average\n"
        "members: [c, {strategy: slerp, members: [my/merge, a]}]\n")


def test_our_documents_have_names_too_and_each_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def merge(inputs: Any, strategy: str, **given: Any) -> Path:
        ran.append(strategy)
        return zoo.merge(inputs, strategy, **given)

    monkeypatch.setattr(stages, "merge", merge)
    merged = run("strategy: average\nmembers: [x, a, {strategy: slerp, members: [x, b]}]\n"
                 "---\nname: x\nstrategy: karcher\nmembers: [b, c]\n")
    assert ran == ["karcher", "slerp", "average"]
    zoo.merge(["b", "c"], "karcher", out="x")
    zoo.merge(["x", "b"], "slerp", out="y")
    assert equal(merged, zoo.merge(["x", "a", "y"], "average", out="z"))


def test_paths_start_from_the_file_and_flags_fill_in(tmp_path: Path) -> None:
    Path("deep").mkdir()
    Path("deep/m.yml").write_text(NESTED.replace("- a", "- ../a").replace("[b, c]", "[../b, ../c]")
                                  .replace("base: base", "base: ../base"))
    with pytest.raises(SystemExit) as end:
        main(["merge", "--config", "deep/m.yml", "-o", "out", "--dtype", "bfloat16",
              "--weight", "[1, 0]"])
    assert end.value.code == 0
    assert torch.equal(load_tensors("out")["head.w"], load_tensors("a")["head.w"].bfloat16())


@pytest.mark.parametrize(("change", "told"), [
    (("strategy: average", "strategy: avrage"), "1: strategy: .*'avrage'.*average"),
    (("strategy: ties", "strategy: concat"), "4: members.1.strategy: zoo/concat fuses features, "),
    (("strategy: ties", "strategy: fisher"),
     "4: members.1.strategy: zoo/fisher needs the network, images"),
    (("strategy: ties", "strategi: ties"), "4: members.1.strategy: is missing"),
    (("    base: base\n", ""), "4: members.1.base: is missing: zoo/ties works on"),
    (("members: [b, c]", "members: b"), "5: members.1.members: is 'b', expected a list"),
    (("members: [b, c]", "members: [b, 3]"), "5: members.1.members.1: is 3, expected a file, "),
    (("- a\n", "- gone\n"), r"3: members.0: there is no file or folder .*gone"),
    (("  - a\n", ""), "2: members: .* takes at least 2, and 1 are given"),
    (("density: 0.5", "densty: 0.5"), "7: members.1.densty: is no field, and no option of "
                                      "zoo/ties; did you mean 'density'"),
    (("density: 0.5", "density: much"), "7: members.1.density: .*'much'"),
    (("density: 0.5", "name: x"), "7: members.1.name: is no field"),
    (("density: 0.5", "dtype: int7"), "7: members.1.dtype: .*int7"),
    (("weight:", "rounding: up\nweight:"), "8: rounding: is 'up', expected 'nearest' or"),
    (("weight:", "seed: -1\nweight:"), "8: seed: is -1, expected a whole number"),
    (("weight:", "base: base\nweight:"), "8: base: zoo/average does not use a base"),
    (("weight:", "strategy: ties\nweight:"), "8: strategy: stands here twice"),
])
def test_what_is_wrong_is_told_with_line_and_field(change: tuple[str, str], told: str) -> None:
    assert NESTED.count(change[0]) == 1
    Path("m.yml").write_text(NESTED.replace(*change))
    with pytest.raises(RecipeError, match=f"m.yml:{told}"):
        read_config("m.yml")


def test_all_problems_are_told_at_once() -> None:
    Path("m.yml").write_text(NESTED.replace("- a", "- gone").replace("density", "desnity"))
    with pytest.raises(RecipeError) as caught:
        read_config("m.yml")
    assert [problem[0] for problem in caught.value.problems] == [3, 7]


@pytest.mark.parametrize(("text", "told"), [
    ("", "m.yml: is empty"),
    ("[1]", "m.yml:1: expected a mapping"),
    ("name: [x]\nstrategy: average", "1: name: is \\['x'\\], expected text"),
    ("name: x\nmerge_method: linear\n---\nname: x\nmerge_method: linear",
     "4: name: 'x' is the name of two merges"),
    ("strategy: average\nmembers: [a, b]\n---\nstrategy: average\nmembers: [a, b]",
     "4: a second merge without 'name'"),
    ("strategy: average\nmembers: [a, b]\n---\nname: x\nstrategy: average\nmembers: [a, b]",
     "4: name: no merge needs 'x'"),
    ("name: y\nstrategy: average\nmembers: [a, b]\n---\nname: x\nstrategy: slerp\nmembers: [a, b]",
     "5: name: 'y' and 'x' are both needed by no other merge"),
    ("name: x\nstrategy: slerp\nmembers: [a, y]\n---\nname: y\nstrategy: slerp\nmembers: [b, x]",
     r"7: members.1: leads in a circle: x needs y needs x"),
    ("strategy: slerp\nmembers: [a, frist]\n---\nname: first\nstrategy: slerp\nmembers: [a, b]",
     r"2: members.1: there is no file or folder .*frist; did you mean the merge 'first'"),
    (KITS.replace("model: second", "model: secnd"), r"10: models\[0\].model: there is no folder "
     "'secnd'; did you mean the merge 'second'"),
    (KITS.replace("{t: 0.25}", "{u: 0.25}"), r"19: parameters.u: slerp has no such parameter"),
    (KITS.replace("  - model: b\n", ""), "2: merge_method: .*takes at least 2, and 1 are given"),
])
def test_names_that_lead_nowhere_are_told(text: str, told: str) -> None:
    Path("m.yml").write_text(text)
    with pytest.raises(RecipeError, match=told):
        read_config("m.yml")


def test_what_the_inputs_do_not_allow_is_found_before_the_first_merge(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "merge", lambda *_, **__: pytest.fail("it has begun"))

    def stop(text: str, kind: type[ZooError], match: str) -> None:
        Path("m.yml").write_text(text)
        with pytest.raises(kind, match=match):
            merge_stages(read_config("m.yml"), "out")

    stop(NESTED.replace("[0.25, 0.75]", "[1, 2, 3]"), OptionError, "expected a number or 2 of them")
    stop(NESTED.replace("[0.25, 0.75]", "{blocks*: 1, '*': 1}"), OptionError, "decides no tensor")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 400))
    stop(NESTED, DiskFull, "out: 512 bytes are to be written and the disk has 400")
    Path("m.yml").write_text(NESTED.replace("- a", "- strategy: swa\n    members: [gone]"))
    with pytest.raises(RecipeError, match=r"members.0.members.0: there is no file or folder"):
        read_config("m.yml")


def test_nothing_is_left_of_a_merge_that_failed_or_was_killed() -> None:
    save_file({"head.w": torch.zeros(3)}, "c/model.safetensors")
    Path("m.yml").write_text(NESTED.replace("- a", "- strategy: slerp\n    members: [a, b]"))
    dead = Path(f".out.{socket.gethostname()}.4194305.0123abcd.tmp")
    dead.mkdir()
    with pytest.raises(FusionError):
        merge_stages(read_config("m.yml"), "out")
    assert {each.name for each in Path().iterdir()} == {"base", "a", "b", "c", "m.yml"}
