"""Every command, and what it says when its user errs. Run in this process where that is the same,
in one of its own for exit codes, streams and what is imported."""

from __future__ import annotations

import gc
import inspect
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

import zoo
from zoo import discovery
from zoo.cli import main
from zoo.cli.app import importing_torch
from zoo.cli.main import fuse as fuse_command
from zoo.cli.main import transfer as transfer_command
from zoo.cli.values import attacks, split_options, value
from zoo.errors import OptionError
from zoo.registry import find
from zoo.specs import FusionSpec
from zoo.tensors import load_tensors

Capture = pytest.CaptureFixture[str]
Install = Callable[..., Path]


def run(*arguments: str) -> int:
    """The exit code of a command that runs in this process."""
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert isinstance(end.value.code, int)
    return end.value.code


def process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "zoo.cli", *arguments], capture_output=True,
                          text=True, env={**os.environ, **environment})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three small networks, saved as a, b and c."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("abc"):
        zoo.save(zoo.backbone("mnist_cnn", num_classes=10, seed=seed, device="cpu"), folder / name)
    return folder


@pytest.fixture
def here(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in "abc":
        (tmp_path / name).symlink_to(models / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def core_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is installed beside the core here has tests of its own."""
    monkeypatch.setenv("ZOO_PLUGINS", "")
    discovery.reset()


def merged(folder: str) -> dict[str, Any]:
    config = json.loads(Path(folder, "config.json").read_text("utf-8"))
    recipe: dict[str, Any] = config["zoo"]["model"]["fusion"]
    return recipe


def test_listing_for_people_and_for_programs(capsys: Capture) -> None:
    assert run("ls", "zoo/*") == 0
    assert "zoo/ties" in capsys.readouterr().out
    assert run("ls", "zoo/*", "--type", "fusion", "--kind", "outputs", "--json") == 0
    out = capsys.readouterr()
    rows = json.loads(out.out)
    assert [row["name"] for row in rows] == [
        "zoo/gate", "zoo/geometric", "zoo/greedy_selection", "zoo/max", "zoo/mean", "zoo/stacking",
        "zoo/vote", "zoo/weighted"]
    assert set(rows[0]) == {"name", "type", "kind", "summary"}
    assert run("ls", "zoo/*", "--kind", "distillation") == 0
    assert "self_distill" in capsys.readouterr().out
    assert run("ls", "nothing-like-it", "--json") == 0
    assert json.loads(capsys.readouterr().out) == []


def test_a_plain_listing_leaves_the_catalogue_to_a_pattern(capsys: Capture) -> None:
    assert run("ls") == 0
    out, err = capsys.readouterr()
    assert "zoo/ties" in out
    assert "timm/" not in out
    assert "of timm's: zoo ls 'timm/*'" in err
    assert run("ls", "timm/resnet18*") == 0
    assert "timm/resnet18.a1_in1k" in capsys.readouterr().out.splitlines()


def test_a_row_is_one_line_in_a_pipe(capsys: Capture) -> None:
    run("ls", "zoo/*")
    lines = capsys.readouterr().out.splitlines()
    summary = zoo.info("pgd_at").summary
    assert any("zoo/pgd_at" in line and summary in line for line in lines)


def test_showing_a_strategy(capsys: Capture) -> None:
    assert run("show", "ties") == 0
    out = capsys.readouterr().out
    assert out.startswith("zoo/ties (fusion)\n")
    assert "paper: Yadav 2023" in out
    assert "members: 1 to any number" in out
    assert "density: PerMember = 0.2  fraction of entries that the trim keeps" in out
    assert "takes" not in out
    assert run("show", "ties", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["options"][0] == {
        "name": "density", "type": "PerMember", "default": "0.2",
        "help": "fraction of entries that the trim keeps, in (0, 1]; or one per member"}
    assert run("show", "wise_ft") == 0
    assert "members: 1\n" in capsys.readouterr().out


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("spelling", ["a", "./a", "local-dir:a"])
def test_showing_a_saved_model(capsys: Capture, spelling: str) -> None:
    assert run("show", spelling) == 0
    out = capsys.readouterr().out
    assert "a: zoo/mnist_cnn\n  classes: 10 (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)" in out
    assert run("show", spelling, "--json") == 0
    assert json.loads(capsys.readouterr().out)["zoo"]["format"] == 1


@pytest.mark.usefixtures("here")
def test_showing_a_saved_model_needs_neither_torch_nor_its_plugin() -> None:
    config = json.loads(Path("a/config.json").read_text())
    config["zoo"]["requires"] = [{"namespace": "gone", "requirement": "fusion-zoo-gone>=1"}]
    Path("d").mkdir()
    Path("d/config.json").write_text(json.dumps(config))
    code = ("import sys; from zoo.cli import main\ntry: main(['show', './d'])\n"
            "except SystemExit: print([m for m in ('torch', 'timm') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ("requires: fusion-zoo-gone>=1 (namespace gone); not installed; if you trust this file: "
            "pip install 'fusion-zoo-gone>=1'\n") in done.stdout
    assert done.stdout.endswith("[]\n")


def test_looking_around_imports_neither_torch_nor_timm() -> None:
    commands = [["--help"], ["ls", "timm/resnet*"], ["show", "ties"], ["show", "timm/resnet18"],
                ["fuse", "--help"], ["show", "tise"], ["plugins"]]
    code = ("import sys; from zoo.cli import main\n"
            f"for arguments in {commands}:\n"
            "    try: main(arguments)\n"
            "    except SystemExit: pass\n"
            "    for name in ('torch', 'timm', 'huggingface_hub'):\n"
            "        assert name not in sys.modules, (arguments, name)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("here")
def test_a_strategys_options_may_stand_anywhere() -> None:
    orders = [
        "fuse a b --with ties --base c --density 0.5 -o out",
        "fuse a b --density 0.5 -o out --with ties --base c",
        "fuse --density=0.5 --with ties a b --base c -o out",
        "fuse --with ties --base c -o out a --density 0.5 b",
    ]
    for order in orders:
        assert run(*order.split()) == 0
        made = merged("out")
        assert made["strategy"] == "zoo/ties"
        assert made["options"]["density"] == 0.5
    expected = zoo.fuse([Path("a"), Path("b")], "ties", base=Path("c"), density=0.5, device="cpu")
    saved = zoo.load("./out", device="cpu").state_dict()
    for key, tensor in expected.state_dict().items():
        assert torch.equal(saved[key], tensor)


@pytest.mark.usefixtures("here")
def test_negative_numbers_flags_and_weights(capsys: Capture) -> None:
    assert run("fuse", "a", "b", "--with", "ties", "--base", "c", "--scale", "-0.3",
               "--no-normalise", "-o", "out") == 0
    assert merged("out")["options"]["scale"] == -0.3
    assert merged("out")["options"]["normalise"] is False
    assert run("fuse", "--with", "ties", "--normalise", "a", "b", "--base", "c", "-o", "out") == 0
    assert merged("out")["options"]["normalise"] is True
    assert run("fuse", "a", "b", "--with", "task_arithmetic", "--base", "c",
               "--weight", "[1,-0.5]", "--norms", "pooled", "--dtype", "bfloat16",
               "-o", "out") == 0
    assert capsys.readouterr().out.endswith("0.2 million parameters\n")
    a, b, base, out = (load_tensors(Path(name)) for name in ("a", "b", "c", "out"))
    for key, start in base.items():
        expected = start + (a[key] - start) - 0.5 * (b[key] - start)
        assert torch.allclose(out[key].float(), expected, atol=1e-2)
        assert out[key].dtype == torch.bfloat16


@pytest.mark.usefixtures("here")
def test_an_untrained_head_is_said_to_be_one(capsys: Capture) -> None:
    assert run("fuse", "a", "b", "--with", "concat", "-o", "out") == 0
    assert "zoo: note: its head is untrained; train it with: zoo transfer out" in (
        capsys.readouterr().err)


@pytest.mark.usefixtures("here")
def test_transfer_and_eval_print_only_json_on_stdout(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZOO_PROGRESS", "1")
    assert run("transfer", "--label-smoothing", "0.1", "a", "--data", "digits", "--with",
               "linear_probe", "--val", "0.5", "--epochs", "1", "--json", "-o", "out") == 0
    assert json.loads(capfd.readouterr().out)["method"] == "zoo/linear_probe"
    assert run("eval", "out", "--data", "digits", "--attack", "fgsm:eps=0.1", "--json") == 0
    measured = json.loads(capfd.readouterr().out)
    assert measured["n"] == 797
    assert measured["attacks"]["fgsm"]["options"]["eps"] == 0.1


@pytest.mark.usefixtures("here")
def test_results_for_people(capsys: Capture) -> None:
    assert run("transfer", "a", "--data", "digits", "--with", "linear_probe", "--epochs", "1",
               "-o", "out") == 0
    assert "images/s" in capsys.readouterr().out
    assert run("eval", "out", "--data", "digits") == 0
    assert "n = 797" in capsys.readouterr().out


def test_plugins_as_json(
    install: Install, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZOO_PLUGINS", "acme")
    install("acme", "raise ValueError('boom')")
    assert run("plugins", "--json") == 0
    rows = {row["namespace"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(rows["zoo"]) == {"namespace", "distribution", "version", "hooks", "error"}
    assert rows["timm"]["hooks"] == ["zoo_catalog"]
    assert rows["acme"] == {"namespace": "acme", "distribution": "fusion-zoo-acme",
                            "version": "1.0", "hooks": [], "error": "ValueError: boom"}
    assert run("plugins") == 0
    assert "boom" in capsys.readouterr().out


def test_a_broken_plugin_is_noticed_only_by_who_asks_for_it(
    install: Install, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZOO_PLUGINS", "acme")
    install("acme", "raise ValueError('boom')")
    assert run("ls", "t*", "--type", "fusion") == 0
    out, err = capsys.readouterr()
    assert "zoo/ties" in out
    assert err == ""
    assert run("ls", "acme/*") == 1
    assert capsys.readouterr().err == (
        "zoo: the plugin 'acme' (from fusion-zoo-acme 1.0) could not be loaded: ValueError: boom\n")


def test_versions_and_help(capsys: Capture) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"{zoo.__version__}\n"
    for command in ("ls", "show", "fuse", "transfer", "eval", "run", "plugins", "check",
                    "new-plugin"):
        assert run(command, "--help") == 0
        assert f"\n zoo {command}" in capsys.readouterr().out.partition("Examples:")[2]


@pytest.mark.parametrize(("command", "code", "message"), [
    ("ls nothing-like-it", 1, "zoo: nothing matches 'nothing-like-it'; see `zoo ls '*'`"),
    ("ls --type fusoin", 2, "'fusoin' is none; did you mean 'fusion'?"),
    ("ls --kind xyz", 2, "'xyz' is none; there are weights, features, outputs"),
    ("show tise", 1, "dataset is called 'tise'; did you mean 'ties'"),
    ("show ./nowhere", 1, "zoo: nowhere: there is no such folder"),
    ("show .", 1, "zoo: .: is no saved model: it has no config.json"),
    ("show local-dir:", 1, "nothing follows the colon"),
    ("show hf-hub:org/name", 1, "a path or an address is no registered name"),
    ("show org/name", 1, "for a Hub repository write 'hf-hub:org/name'"),
    ("fuse a b -o out", 2, "Missing option '--with'"),
    ("fuse a b --with average", 2, "Missing option '--out'"),
    ("fuse --with average -o out", 2, "Missing argument"),
    ("fuse a b --with tise -o out", 1, "no fusion is called 'tise'; did you mean 'ties'"),
    ("fuse a b --with finetune -o out", 1, "zoo/finetune is a transfer"),
    ("fuse a nowhere --with average -o out", 1, "no backbone is called 'nowhere'"),
    ("fuse a ./nowhere --with average -o out", 1, "nowhere: there is no such folder"),
    ("fuse a b --with ties -o out", 1, "Pass base="),
    ("fuse a b --with ties --base c --densty 1 -o out", 1, "did you mean 'density'?"),
    ("fuse a b --with ties --base c --density high -o out", 1, "should be a valid number"),
    ("fuse a b --with ties --base c --density 2 -o out", 1, "expected a fraction in (0, 1]"),
    ("fuse a b --with ties --base c --density nan -o out", 1, "expected a JSON value"),
    ("fuse a b --with ties --density -o out", 2, "--density needs a value"),
    ("fuse a b --with ties --density 1 --density 1 -o out", 2, "--density is given twice"),
    ("fuse a b --with average -x 3 -o out", 2, "there is no option -x"),
    ("fuse a b --with average --strategy ties -o out", 2, "there is no option --strategy"),
    ("fuse a b --with average --weight [1] -o out", 1, "expected a number or 2 of them"),
    ("fuse a b --with average --norms best -o out", 1, "norms is 'best', expected auto"),
    ("fuse a b --with average --dtype float17 -o out", 1, "float17"),
    ("fuse a b --with average --device quantum -o out", 1, "quantum"),
    ("fuse a b --with average -o c/model.safetensors", 1, "zoo: "),
    ("transfer a b --data digits -o out", 2, "one model is trained, and 2 are given: a, b"),
    ("transfer a --data nowhere.csv -o out", 1, "nowhere.csv: there is no such file or folder"),
    ("transfer a --data digits --epochs three -o out", 2, "--epochs"),
    ("transfer --dropout=0.1 a --data digits --with finetune -o out", 1,
     "zoo/finetune: no option is called 'dropout'"),
    ("transfer a --data digits --with finetun -o out", 1, "did you mean 'finetune'?"),
    ("transfer a --data digits --teachers b -o out", 2, "there is no option --teachers"),
    ("transfer a --data digits --loss xyz --epochs 1 -o out", 1, "xyz"),
    ("transfer a --data digits --optimizer xyz --epochs 1 -o out", 1, "xyz"),
    ("eval a", 2, "Missing option '--data'"),
    ("eval nowhere --data digits", 1, "no backbone is called 'nowhere'"),
    ("eval a --data digits --attack pdg", 1, "did you mean 'pgd'?"),
    ("eval a --data digits --attack pgd:eps", 1, "write pgd:eps=0.1,steps=40"),
    ("eval a --data digits --attack pgd --attack pgd", 1, "pgd: the attack is given twice"),
    ("run nowhere.yaml", 1, "nowhere.yaml: cannot be read: No such file or directory"),
    ("run bad.yaml", 1, "bad.yaml:1: sorce: is no field here; did you mean 'source'?"),
    ("run list.yaml", 1, "is no recipe"),
    ("frobnicate", 2, "No such command 'frobnicate'"),
])
@pytest.mark.usefixtures("here")
def test_a_users_mistake_is_one_message(
    command: str, code: int, message: str, capsys: Capture
) -> None:
    Path("bad.yaml").write_text("sorce: {backbone: mnist_cnn}\n")
    Path("list.yaml").write_text("- 1\n")
    assert run(*command.split()) == code
    out, err = capsys.readouterr()
    plain = " ".join(err.replace("│", " ").split())
    assert message in plain
    assert "Traceback" not in err
    assert out == ""
    assert not Path("out").exists()


@pytest.mark.parametrize("config", ["{", "[]", '{"zoo": 3}', '{"zoo": {"model": {"fusion": {}, '
                                    '"members": [{}]}}}', '{"zoo": {"requires": [{}]}}'])
def test_showing_a_damaged_model(tmp_path: Path, capsys: Capture, config: str) -> None:
    (tmp_path / "config.json").write_text(config)
    assert run("show", str(tmp_path)) == 1
    assert f"zoo: {tmp_path / 'config.json'}: is damaged: " in capsys.readouterr().err


def test_a_mistake_has_its_exit_code_and_nothing_on_stdout_in_a_real_process() -> None:
    done = process("show", "tise")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("zoo: no backbone, fusion, transfer or dataset is called 'tise'")
    done = process("ls", "--frobnicate")
    assert (done.returncode, done.stdout) == (2, "")
    assert process().returncode == 2


@pytest.mark.parametrize(("error", "code", "message"), [
    (KeyboardInterrupt(), 130, ""),
    (PermissionError(13, "Permission denied", "out"), 1, "PermissionError: [Errno 13] Permission"),
    (MemoryError("no room"), 1, "zoo: MemoryError: no room"),
    (torch.OutOfMemoryError("CUDA out of memory."), 1, "Try a smaller --batch-size or --image-"),
])
@pytest.mark.usefixtures("here")
def test_failures_and_interruptions(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture, error: BaseException, code: int, message: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(zoo, "evaluate", fail)
    assert run("eval", "a", "--data", "digits") == code
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err


@pytest.mark.usefixtures("here")
def test_a_defect_of_ours_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(zoo, "evaluate", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        main(["eval", "a", "--data", "digits"])


@pytest.mark.filterwarnings("default")
@pytest.mark.usefixtures("here")
def test_a_warning_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def warn(*_: object, **__: object) -> None:
        warnings.warn("first line\nsecond line", stacklevel=1)
        raise zoo.ZooError("done")

    monkeypatch.setattr(zoo, "evaluate", warn)
    before = warnings.showwarning
    assert run("eval", "a", "--data", "digits") == 1
    assert capsys.readouterr().err == "zoo: note: first line second line\nzoo: done\n"
    assert warnings.showwarning is before


def test_an_older_name_is_said_to_be_one(tmp_path: Path) -> None:
    done = process("show", "timm/tv_resnet50")
    assert done.returncode == 0
    assert done.stderr == "zoo: note: timm/tv_resnet50 is now called timm/resnet50.tv_in1k\n"


def test_a_closed_pipe_is_no_traceback() -> None:
    done = subprocess.run(
        ["/bin/sh", "-c", f"{sys.executable} -m zoo.cli ls 'timm/*' | head -n 1"],
        capture_output=True, text=True)
    assert done.stdout.startswith("timm/")
    assert done.stderr == ""


@pytest.mark.parametrize(("command", "function"), [
    (fuse_command, "fuse"), (transfer_command, "transfer")])
def test_defaults_are_those_of_the_function(command: Callable[..., Any], function: str) -> None:
    spoken = inspect.signature(command).parameters
    called = inspect.signature(getattr(zoo, function)).parameters
    elsewhere = {"device", "teachers", "classes", "members", "strategy", "model", "data", "method",
                 "options"}
    for name, parameter in called.items():
        if name not in elsewhere:
            assert spoken[name].default == parameter.default, name


@pytest.mark.parametrize(("text", "expected"), [
    ("3", 3), ("-3", -3), ("0.2", 0.2), ("1e-3", 1e-3), ("-.5", -0.5), ("true", True),
    ("null", None), ("relu", "relu"), ("[0.3, -0.7]", [0.3, -0.7]), ('{"*": 1}', {"*": 1}),
    ("{layer4.*: 0.5}", {"layer4.*": 0.5}), ("a: b: c", "a: b: c"), ("²", "²"), ("", None),
])
def test_values_are_read_as_in_a_recipe(text: str, expected: object) -> None:
    assert value(text) == expected
    assert type(value(text)) is type(expected)


@pytest.mark.parametrize("text", ["{layer4.*: 0.5, *: 1}", "[1, 2}]"])
def test_a_list_or_mapping_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match=r"is no list or mapping in YAML; a pattern that "
                                                 r"begins with '\*' needs quotes"):
        value(text)


def test_words_are_told_from_options() -> None:
    spec = find("ties", FusionSpec)
    assert split_options(
        ["a", "--density", "0.2", "b", "--normalise", "c", "--no-normalise-all", "x"], spec,
        zoo.fuse) == (["a", "b", "c"],
                      {"density": 0.2, "normalise": True, "no_normalise_all": "x"})
    assert split_options(["--normalise", "false", "a"], spec, zoo.fuse) == (
        ["a"], {"normalise": False})
    assert split_options(["--convention", "-1"], spec, zoo.fuse)[1] == {"convention": -1}


def test_attacks_as_they_are_typed() -> None:
    assert attacks(["pgd:eps=0.1,steps=40", "fgsm"]) == {
        "pgd": {"eps": 0.1, "steps": 40}, "fgsm": {}}
    with pytest.raises(OptionError, match="the attack is given twice"):
        attacks(["pgd", "pgd"])


def test_what_torch_leaves_behind_is_no_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    before = gc.get_freeze_count()
    with importing_torch():  # it is there
        assert gc.isenabled()
    assert gc.get_freeze_count() == before
    monkeypatch.delitem(sys.modules, "torch")
    with importing_torch():
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() > before
    gc.unfreeze()
