"""The model card: `README.md` of a saved model, which is the front page of a Hub repository.

Names come from files and from strangers: what is put into the page is escaped there, and what
only this machine knows, such as a path, is left out.
"""

from __future__ import annotations

import functools
import html
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from zoo.errors import ZooError
from zoo.model import Model
from zoo.registry import find
from zoo.report.captions import CAPTIONS
from zoo.report.markdown import percent
from zoo.specs import FusionSpec
from zoo.store.answers import without_token
from zoo.store.licences import consequence, pretrained, sources, terms
from zoo.store.measured import Measured
from zoo.store.private import public

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
# What Markdown, with GitHub's additions, makes something of: links that are only typed too.
_PUNCTUATION = re.compile(r"([\\`*_{}\[\]#|!~$@]|:(?=//)|(?<=www)\.)", re.IGNORECASE)
_MANY, _SHOWN = 20, 3  # names in a list; of a longer one, those that the page has
_PLAIN = re.compile(r"[\w./@:+-]+")


def model_card(
    model: Model, described: Mapping[str, Any], measured: Measured, pictures: Sequence[str] = (),
    *, plain: bool,
) -> str:
    """What the model is, what it is worth, where it comes from and how to use it.

    described: what stands under `zoo` in config.json. pictures: the names of those beside it.
    plain: whether timm alone can load it.
    """
    made = described["made_with"]
    rows = list(measured.by_name.values())
    licence, problem = terms(made)
    text = _page().render(
        front=Markup(yaml.safe_dump(public(_front(model, described, measured, licence, plain)),
                                    sort_keys=False, allow_unicode=True).strip()),
        name=model.name, classes=model.classes, members=list(model.each_member()),
        strategy=str(model.fusion) if model.fusion else None, sources=len(made["sources"]),
        base=bool(made.get("base")), summary=_summary(model),
        trained=[_trained(each) for each in made.get("transfers") or ()],
        options={key: json.dumps(value) for key, value in
                 (model.fusion.options if model.fusion else {}).items()},
        won=(made.get("search") or {}).get("won", "fusion"),
        measured=[_row(name, told) for name, told in measured.by_name.items()],
        images=f"{rows[0]['n']:,}" if rows else "", data=rows[0]["data"] if rows else "",
        attacks={name: json.dumps(told["options"]) for name, told in
                 (rows[0]["attacks"] if rows else {}).items()},
        pictures={name: CAPTIONS[name] for name in CAPTIONS if name in pictures},
        plain=plain, links=list(described.get("links", {}).values()),
        limits=_limits(model, made, measured),
        licences=list(dict.fromkeys(pretrained([made["sources"], made.get("base")]))),
        terms=_terms(licence, problem), provenance=list(_provenance(made)),
        made=Markup(json.dumps(_few_names(public(made)), indent=2)),
        images_like=f"{model.in_chans}, {model.image_size}, {model.image_size}",
        channels=model.in_chans,
    )
    return without_token(text)


def published(card: str, repository: str, licence: str | None) -> str:
    """The card as it stands on the Hub: it says how to use the model from there.

    licence: put in place of what the card says; None leaves that alone.
    """
    for here, there in _ADDRESSES.items():
        card = card.replace(here, there.format(repository))
    if licence is None:
        return card
    match = re.match(r"---\r?\n(.*?)\n---", card, re.DOTALL)
    front = (yaml.safe_load(match[1]) if match else None) or {}
    told = yaml.safe_dump({**front, "license": licence}, sort_keys=False,
                          allow_unicode=True).strip()
    return f"---\n{told}\n---" + (card[match.end():] if match else f"\n\n{card}")


# What the page says of a folder, and what it becomes.
_ADDRESSES = {
    '"path/to/this/folder")  # or "hf-hub:org/name"': '"hf-hub:{}")',
    '"local-dir:path/to/this/folder"': '"hf-hub:{}"',
    '"path/to/this/folder")': '"{}")',
}


@functools.cache
def _page() -> Any:
    environment = Environment(
        loader=PackageLoader("zoo.store", "."), undefined=StrictUndefined, autoescape=True,
        finalize=_escaped, keep_trailing_newline=True)
    environment.filters["code"] = _code
    return environment.get_template("card.md.jinja")


def _escaped(value: Any) -> Markup:
    """As text that Markdown, HTML and a table's cell leave as it is."""
    if isinstance(value, Markup):
        return value
    return Markup(html.escape(_PUNCTUATION.sub(r"\\\1", _line(value)), quote=False))


def _code(value: Any) -> Markup:
    """A name as people write one on a page; as plain text where it is an odd one."""
    text = _line(value)
    return Markup(f"`{text}`") if _PLAIN.fullmatch(text) else _escaped(text)


def _few_names(told: Any) -> Any:
    """The same with what follows the first names of a long list counted: there may be thousands of
    classes, of each source."""
    if isinstance(told, Mapping):
        return {key: _few_names(each) for key, each in told.items()}
    if not isinstance(told, list):
        return told
    if len(told) > _MANY and all(isinstance(each, str) for each in told):
        return [*told[:_SHOWN], f"… {len(told):,} in all: config.json has them"]
    return [_few_names(each) for each in told]


def _line(value: Any) -> str:
    text = without_token(str(public(value)))  # before a backslash stands inside a token
    return " ".join("".join(each if each.isprintable() else " " for each in text).split())


def _front(
    model: Model, described: Mapping[str, Any], measured: Measured, licence: str | None,
    plain: bool
) -> dict[str, Any]:
    """What the Hub reads of the card."""
    from huggingface_hub import ModelCardData

    sets = {each["data"] for each in measured.by_name.values()}
    known: dict[str, Any] = {}
    repositories = {source["repository"] for source in
                    [*_leaves(described["made_with"]), *described.get("links", {}).values()]
                    if _REPOSITORY.fullmatch(str(source.get("repository")))}
    if repositories:
        known["base_model"] = sorted(repositories)
        known["base_model_relation"] = "merge" if model.fusion else "finetune"
    if measured.own is not None:
        own = measured.by_name[measured.own]
        known["datasets"] = [each.removeprefix("hfds:") for each in sets
                             if each.startswith("hfds:")] or None
        known["metrics"] = ["accuracy"]
        known["model_name"] = _line(model.name)
        known["eval_results"] = _results(own)
    card: Any = ModelCardData(
        library_name="timm" if plain else "fusion-zoo", pipeline_tag="image-classification",
        tags=["image-classification", *(["merge"] if model.fusion else []), "fusion-zoo"],
        license=licence, **known)
    return dict(card.to_dict())


def _results(own: Mapping[str, Any]) -> list[Any]:
    from huggingface_hub import EvalResult

    where: dict[str, Any] = {
        "task_type": "image-classification",
        "dataset_name": own["data"] or "own test images",
        "dataset_type": own["data"].removeprefix("hfds:") or "imagefolder",
        "dataset_args": {"images": own["n"]},
    }
    found = [EvalResult(**where, metric_type="accuracy", metric_name="accuracy",
                        metric_value=own["accuracy"]),
             EvalResult(**where, metric_type="ece", metric_name="expected calibration error",
                        metric_value=own["ece"])]
    found += [EvalResult(**where, metric_type="accuracy", metric_value=told["accuracy"],
                         metric_name=f"accuracy under {_line(name)}",
                         metric_args=dict(told["options"]))
              for name, told in own["attacks"].items()]
    return found


def _row(name: str, told: Mapping[str, Any]) -> list[str]:
    low, high = told["interval"]
    attacked = [percent(each["accuracy"]) for each in told["attacks"].values()]
    return [name, percent(told["accuracy"]), f"{percent(low)} – {percent(high)}",
            f"{told['nll']:.4f}", f"{told['ece']:.4f}", *attacked,
            *([percent(told["robust"])] if len(attacked) > 1 else []), f"{told['parameters']:,}"]


def _summary(model: Model) -> str:
    """What the strategy does, where it is installed."""
    try:
        spec = find(str(model.fusion), FusionSpec) if model.fusion else None
    except ZooError:  # fused weights load without what fused them
        return ""
    return " ".join(filter(None, (spec.summary, spec.paper and f"({spec.paper})"))) if spec else ""


def _trained(told: Mapping[str, Any]) -> dict[str, Any]:
    """A training after the fusion, or of a network by itself."""
    return {"method": told.get("method"), "images": told.get("images"),
            "teachers": [each.get("name") for each in told.get("teachers") or ()]}


def _limits(model: Model, made: Mapping[str, Any], measured: Measured) -> Iterator[str]:
    yield (f"It answers one of its {len(model.classes):,} classes whatever the image shows; what "
           "else there is it does not know.")
    yield (f"It looks at {model.image_size} × {model.image_size} pixels: a larger image is made "
           "smaller, and details go.")
    if next(pretrained([made["sources"], made.get("base")]), None):
        yield "What its pretrained weights have learnt, with their biases, is in it."
    if measured.own is None:
        yield "Nothing was measured when it was saved: measure it on images of your own first."
        return
    own = measured.by_name[measured.own]
    yield (f"The figures hold for images like the {own['n']:,} that it was measured on, and for no "
           "others.")
    recalls = {name: each["recall"] for name, each in own["per_class"].items()
               if each["recall"] is not None}
    worst = min(recalls, key=lambda name: recalls[name], default=None)
    if worst is not None and recalls[worst] < 1:
        yield f"Of its classes it finds {worst} least often: {percent(recalls[worst])} of them."
    if not own["attacks"]:
        yield "How it stands attacks was not measured."


def _terms(licence: str | None, problem: str) -> str:
    if problem:
        return (f"No licence follows from these: {problem}. Whoever publishes it chooses one and "
                "answers for it; it stands at the top of this page.")
    if licence is None:
        return "No pretrained weights with a licence of others are in it."
    return f"The strictest of them holds for this model: {licence}. {consequence(licence)}"


def _provenance(made: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    seen = set()
    for source in _leaves(made):
        row = {
            "name": source.get("name", "–"),
            "place": source.get("repository") or source.get("url") or source.get("package")
            or "made here",
            "revision": source.get("revision") or source.get("version") or "–",
            "sha256": source.get("sha256") or source.get("state_sha256") or "–",
        }
        told = {key: str(value) for key, value in row.items()}
        if tuple(told.values()) not in seen:
            seen.add(tuple(told.values()))
            yield told
    for file, sha256 in made.get("sha256", {}).items():
        yield {"name": file, "place": "this model", "revision": "–", "sha256": str(sha256)}


def _leaves(made: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The sources that were not fused themselves."""
    return (source for source, fused in sources(made) if not fused)
