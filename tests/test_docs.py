"""Every snippet and command in the documentation runs, in order, page by page."""

from __future__ import annotations

import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from PIL import Image

from zoo import discovery
from zoo.cli import main
from zoo.datasets import load_data

ROOT = Path(__file__).parents[1]
PLUGIN_PAGES = sorted(ROOT.glob("docs/plugins/*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md")),
         *PLUGIN_PAGES, *sorted(ROOT.glob("plugins/*/README.md"))]
# Run by .ci/run, not here: the demo takes minutes, and the suite cannot run itself.
ELSEWHERE = ("git clone", "make ", ".ci/run", "zoo run examples/")
# The plugin that a page works on, where another page writes it.
WRITTEN_BY = {"testing.md": "kinds.md"}
# Pages that talk to a Hub: one on loopback, with somebody logged in.
ON_THE_HUB = ("hub.md", "README.md")


def blocks(page: Path, *languages: str) -> list[tuple[str, str]]:
    found = re.findall(r"```(\w+)\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    return [(language, text) for language, text in found if language in languages]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.csv, val.csv and test.csv with real digits as PNG files."""
    folder = tmp_path_factory.mktemp("pictures")
    digits = load_data("digits", role="train").take(160)
    rows: list[str] = []
    for number in range(len(digits)):
        image, label = digits[number]
        Image.fromarray(image[0].numpy()).save(folder / f"{number}.png")
        rows.append(f"{number}.png,{label}")
    for name, part in (("train", rows[:100]), ("val", rows[100:130]), ("test", rows[130:])):
        # Every part has every class, whatever the split left in it.
        every = {row.split(",")[1]: row for row in rows}
        (folder / f"{name}.csv").write_text("\n".join(["path,label", *part, *every.values()]))
    return folder


@pytest.fixture
def workplace(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    for file in pictures.iterdir():
        (tmp_path / file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("zoo_acme"):
            del sys.modules[name]
    discovery.reset()


@pytest.mark.filterwarnings("ignore:batch norm's statistics were pooled")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_snippet_runs(
    page: Path, workplace: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if page.name in ON_THE_HUB:
        monkeypatch.setenv("HF_TOKEN", request.getfixturevalue("hub").token("me"))
    if page in PLUGIN_PAGES and page.name in WRITTEN_BY:
        for _, text in blocks(page.with_name(WRITTEN_BY[page.name]), "python"):
            _write_module(workplace, text)
    names: dict[str, object] = {}
    for language, text in blocks(page, "python", "console", "yaml"):
        if language == "yaml":
            _write_file(workplace, text)
        elif language == "console":
            for line in text.splitlines():
                _run(line.partition("  #")[0].strip())
        elif not _write_module(workplace, text) and "path/to" not in text:
            exec(compile(text, page.name, "exec"), names)


def _write_file(workplace: Path, text: str) -> None:
    """A file that the commands after it use: its first line is its name."""
    file = re.match(r"# ([\w-]+\.yml)\n", text)
    if file:
        (workplace / file[1]).write_text(text)


def _write_module(workplace: Path, text: str) -> bool:
    """Whether the snippet is a file of the plugin zoo_acme; it is installed from its own toml."""
    file = re.match(r"# (zoo_acme/\w+\.py)\n", text)
    if not file:
        return False
    (workplace / "zoo_acme").mkdir(exist_ok=True)
    (workplace / file[1]).write_text(text)
    project = tomllib.loads(blocks(ROOT / "docs/plugins/index.md", "toml")[0][1])["project"]
    info = workplace / f"fusion_zoo_acme-{project['version']}.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\n"
                                   f"Version: {project['version']}\n")
    entries = project["entry-points"]["zoo.plugins"]
    (info / "entry_points.txt").write_text("[zoo.plugins]\n" + "\n".join(
        f"{name} = {module}" for name, module in entries.items()))
    discovery.reset()
    return True


def _run(line: str) -> None:
    command = line.split(" && ")[0]
    if not command or command.startswith(ELSEWHERE):
        return
    assert command.startswith("zoo "), f"nobody runs this: {line}"
    try:
        main(shlex.split(command)[1:])
    except SystemExit as end:
        assert end.code in (0, None), f"{command} ended with {end.code}"


def test_every_yaml_recipe_in_the_guide_runs(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _, text in blocks(ROOT / "docs" / "guide.md", "yaml"):
        (workplace / "recipe.yaml").write_text(text)
        _run("zoo run recipe.yaml -o run")
        assert "The fused model" in capsys.readouterr().out


def test_examples_are_recipes() -> None:
    from zoo.pipeline.recipes import read_recipe

    for recipe in ROOT.glob("examples/*.yaml"):
        assert read_recipe(recipe).fuse.strategy
        assert yaml.safe_load(recipe.read_text())


def test_make_targets_of_the_readme_exist() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        for _, text in blocks(page, "console"):
            assert set(re.findall(r"^make (\w+)", text, re.MULTILINE)) <= targets


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text("utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"
