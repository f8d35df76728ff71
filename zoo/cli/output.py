"""What the command line prints: Rich for people, JSON for programs. Results go to stdout, what is
said beside them to stderr."""

from __future__ import annotations

import json as json_module
import re
import shlex
import shutil
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from zoo.specs import AnySpec, described

if TYPE_CHECKING:
    from zoo.assembly import Plan
    from zoo.cache.kept import KeptFile
    from zoo.discovery import Plugin
    from zoo.evaluation import Evaluation
    from zoo.hub.pushing import Pushed
    from zoo.known import KnownPlugin
    from zoo.model import Model
    from zoo.options import Option
    from zoo.pipeline import Run
    from zoo.registry import Listed
    from zoo.testing.kit import Outcome
    from zoo.training import Transferred


# Controls but tab and line feed, C1, separators and overrides of the direction, and lone halves.
_COMMANDS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
# Fields that say something of one kind of fusion only.
_ONLY_OF = {"scope": "weights", "measure": "weights", "measured_over": "weights",
            "elementwise": "weights", "can_use": "weights", "takes": "features"}


def examples(*commands: str) -> str:
    """The end of a command's help, one line each."""
    return "\n\n".join(("Examples:", *commands))


def fail(message: str) -> None:
    say(f"zoo: {message}", file=sys.stderr)


def warn(message: str) -> None:
    say(f"zoo: note: {' '.join(message.split())}", file=sys.stderr)


def shown(text: object) -> str:
    """Text as a terminal may have it. Names come from files that anybody wrote, and some characters
    are commands to a terminal, or turn the order of what is read: they become `\\x1b`."""
    return _COMMANDS.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def say(text: object, file: TextIO | None = None) -> None:
    """Print a line, or several."""
    print(shown(text), file=file)


def reference(text: str) -> str | Path:
    """A member as it is typed: an existing folder is one, without a './' before it."""
    return Path(text) if Path(text).is_dir() else text


def model(
    name: str, *, pretrained: bool, image_size: int | None, device: str, seed: int,
    data: str | None = None,
) -> Model:
    """The model that a name, folder or address means; a registered one gets the data's classes."""
    import zoo
    from zoo.names import Name, is_path, parse

    given = reference(name)
    if is_path(given) or not isinstance(parse(given), Name):
        return zoo.load(given, device=device)
    classes = zoo.load_data(data, role="train").classes if data else None
    return zoo.backbone(name, pretrained=pretrained, image_size=image_size, device=device,
                        seed=seed, classes=classes)


def without_catalogue(rows: Sequence[Listed]) -> list[Listed]:
    """The rows without the thousands of timm's, which one asks for by pattern."""
    few = [row for row in rows if not row.name.startswith("timm/")]
    if len(few) < len(rows):
        warn(f"and {len(rows) - len(few):,} of timm's: zoo ls 'timm/*'")
    return few


def listing(rows: Sequence[Listed], json: bool) -> None:
    if json:
        _json([{"name": row.name, "type": row.type, "kind": row.kind, "summary": row.summary}
               for row in rows])
        return
    if not any(row.summary for row in rows):
        say("\n".join(row.name for row in rows))
        return
    _columns(("name", "type", "kind", "what it does"),
             [(row.name, row.type, row.kind, row.summary) for row in rows])


def spec(found: AnySpec, options: Sequence[Option], json: bool) -> None:
    if json:
        _json({**described(found), "options": [
            {"name": o.name, "type": o.type, "default": o.default, "help": o.help}
            for o in options]})
        return
    say(f"{found.name} ({found.kind_name})")
    kind = getattr(found, "kind", "")
    aside = {"type", "name", *(field for field, of in _ONLY_OF.items() if of != kind)}
    for name, told in described(found).items():
        if name not in aside and told not in ("", [], None, 0):
            say(f"  {name}: {_told(name, told)}")
    if options:
        say("  options:")
    for option in options:
        default = f" = {option.default}" if option.default else " (required)"
        say(f"    {option.name}: {option.type}{default}  {option.help}")


def _told(name: str, told: object) -> str:
    if name == "members" and isinstance(told, list):
        fewest, most = told
        return f"{fewest}" if fewest == most else f"{fewest} to {most or 'any number'}"
    if isinstance(told, list):
        return ", ".join(map(str, told))
    return "yes" if told is True else str(told)


def saved(config: Mapping[str, Any], lines: Sequence[str], json: bool) -> None:
    if json:
        _json(config)
    else:
        for line in lines:  # a name with a line feed in it stays in its line
            say(line.replace("\n", "\\n"))


def checked(outcomes: Sequence[Outcome], json: bool) -> bool:
    """Print what the checks came to; whether all of them passed."""
    failed = [outcome for outcome in outcomes if outcome.state == "failed"]
    if json:
        _json([{"subject": outcome.check.subject, "check": outcome.check.name,
                "state": outcome.state, "reason": outcome.reason} for outcome in outcomes])
        return not failed
    for outcome in failed:
        say(f"{outcome.check.subject}: {outcome.check.name}: {outcome.reason}")
    say(f"{len(outcomes) - len(failed)} checks passed, {len(failed)} failed")
    return not failed


def plugins(found: Sequence[Plugin], known: Mapping[str, KnownPlugin], json: bool) -> None:
    if json:
        _json([{"namespace": p.namespace, "distribution": p.distribution, "version": p.version,
                "hooks": list(p.hooks), "error": p.error} for p in found])
        return
    _table(("namespace", "distribution", "version", "hooks", "error"),
           [(p.namespace, p.distribution, p.version, ", ".join(p.hooks), p.error or "")
            for p in found])
    installed = {plugin.namespace for plugin in found}
    for namespace, plugin in known.items():
        if namespace not in installed:
            say(f"not installed: {namespace}, {plugin.summary} ({plugin.install})")


def wrote(out: Path, made: Model) -> None:
    millions = sum(p.numel() for p in made.parameters()) / 1e6
    say(f"{out}: {made.name}, {len(made.classes)} classes, {millions:.1f} million parameters")


def plan(found: Plan, json: bool) -> None:
    if json:
        _json(found.as_dict())
    else:
        say(found)


def ranking(told: Mapping[str, Any], json: bool) -> None:
    """What `auto` tried, the best first, and why it took what it took."""
    if json:
        _json(told)
        return
    head = ["", "candidate", "accuracy", "95 % interval", "over the best single", "p", "images",
            "parameters", "seconds"]
    rows, failed = [], []
    for row in told["ranking"]:
        mark = "→" if row["chosen"] else ""
        if row["error"] is not None:
            failed.append(f"{row['name']}: {row['error']}")
            continue
        low, high = row["interval"]
        gain = [f"{100 * row['gain']:+.1f} ({100 * row['gain_interval'][0]:+.1f} to "
                f"{100 * row['gain_interval'][1]:+.1f})", f"{row['p']:.2g}"] if row["finished"] \
            else ["", ""]
        rows.append([mark, row["name"], f"{row['accuracy']:.2%}", f"{low:.1%} – {high:.1%}", *gain,
                     f"{row['images']:,}", f"{row['parameters']:,}", f"{row['seconds']:.1f}"])
    _table(head, rows)
    for line in failed:
        warn(f"failed: {line}")
    say(told["reason"])


def merged(out: Path) -> None:
    files = [out] if out.is_file() else sorted(out.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files) / 1e9
    say(f"{out}: {len(files)} {'file' if len(files) == 1 else 'files'}, {size:.2f} GB")


def pushed(done: Pushed, json: bool) -> None:
    if json:
        _json(done.as_dict())
        return
    _columns(("file", "bytes", "in the repository"),
             [(file.name, f"{file.size:,}", file.state) for file in done.files])
    if done.dry_run:
        there = f"; all of it is there: {done}" if done.url else ""
        say(f"would push {done.uploaded:,} bytes to {done.repository}@{done.revision}{there}")
    else:
        say(f"{done.uploaded:,} bytes pushed: {done}")
    if done.linked:
        say(f"not pushed: {done.left_out:,} bytes of members that stay in "
            + ", ".join(done.linked))
    for sentence in done.closed:
        warn(sentence)
    if done.pull_request:
        say(f"pull request: {done.pull_request}")


def pulled(folder: Path, origin: Mapping[str, str], json: bool) -> None:
    if json:
        _json({"folder": str(folder), **origin})
    else:
        say(f"{folder}: {origin['repository']} at commit {origin['revision']}")


def space(folder: Path, url: str | None, json: bool) -> None:
    if json:
        _json({"folder": str(folder), "url": url})
        return
    print(f"{folder}: a Space; to try it here:")
    print(f"  pip install gradio && python {shlex.quote(str(folder / 'app.py'))}")
    if url:
        print(f"pushed: {url}")


def started(folder: Path, namespace: str) -> None:
    """A new plugin, and what its author does next."""
    say("\n".join((
        f"{folder}: a plugin that works; next:", f"  cd {shlex.quote(str(folder))}",
        "  pip install -e . pytest", "  pytest", f"  zoo check {namespace}")))


def transferred(result: Transferred, out: Path, json: bool) -> None:
    if json:
        _json({"method": result.method, "history": result.history, "seconds": result.seconds,
               "notes": result.notes, "out": str(out)})
        return
    for note in result.notes:
        warn(note)
    names = [name for name in ("loss", "val_accuracy", "val_nll") if name in result.history[-1]]
    _table(("epoch", *names, "images/s"),
           [(str(row["epoch"] + 1), *(f"{row[name]:.4f}" for name in names),
             f"{row['images_per_second']:.0f}") for row in result.history])
    wrote(out, result.model)


def evaluation(measured: Evaluation, json: bool) -> None:
    if json:
        _json(measured.as_dict())
        return
    low, high = measured.interval
    rows = [("accuracy", f"{measured.accuracy:.2%}  (95 %: {low:.2%} – {high:.2%}, "
                         f"n = {measured.n:,})"),
            ("top-5", "–" if measured.top5 is None else f"{measured.top5:.2%}"),
            ("NLL", f"{measured.nll:.4f}"), ("ECE", f"{measured.ece:.4f}"),
            ("parameters", f"{measured.parameters:,}")]
    for name, attacked in measured.attacks.items():
        rows.append((f"under {name}", f"{attacked['accuracy']:.2%}  {attacked['options']}"))
        if attacked["zero_gradients"] > 0.01:
            warn(f"{name}: {attacked['zero_gradients']:.0%} of the images have no gradient; what "
                 "looks like robustness may be a masked gradient")
    _table(("measure", "value"), rows)
    wrong = Counter({name: 1 - (each["recall"] or 0) for name, each in measured.per_class.items()
                     if each["n"]})
    worst = [f"{name} {1 - share:.1%}" for name, share in wrong.most_common(5) if share > 0]
    if worst:
        say(f"least recalled classes: {', '.join(worst)}")


def report(finished: Run, json: bool) -> None:
    if json:
        _json(finished.report)
        return
    from zoo.report.markdown import stage_rows, test_rows, verdict

    _table(("", "model", "accuracy", "95 % interval", "NLL", "ECE", "parameters", "seconds"),
           stage_rows(finished.report))
    _table(("paired test", "only the first", "only the second", "p"), test_rows(finished.report))
    say(verdict(finished.report))
    say(f"report: {finished.out / 'report.md'}, {finished.out / 'report.json'}; "
          f"fused model: {finished.out / finished.report['recipe']['save']}")


def cached(files: Sequence[KeptFile], others: tuple[int, int], most: int, json: bool) -> None:
    total = sum(each.size for each in files)
    if json:
        told = ("model", "images", "data", "shape", "dtype")
        _json({"limit": most, "total": total, "other_files": others[0], "other_bytes": others[1],
               "entries": [{"file": str(each.file), "bytes": each.size, "used": each.used,
                            **{name: each.about.get(name, "") for name in told}}
                           for each in files]})
        return
    if files:
        _table(("model", "data", "gives", "size", "last used"),
               [(each.about.get("model", "?"),
                 f"{each.about.get('images', '?')} images, {each.about.get('data', '?')[:8]}",
                 each.about.get("shape", "?"), _bytes(each.size), _ago(each.used))
                for each in files])
    print(f"features: {len(files)} kept, {_bytes(total)} of {_bytes(most)}\n"
          f"other files (names, catalogues, settings): {others[0]}, {_bytes(others[1])}")


def cleared(count: int, size: int) -> None:
    print(f"deleted {count} {'file' if count == 1 else 'files'}, {_bytes(size)}")


def limited(size: int) -> None:
    print(f"at most {_bytes(size)} of features are kept")


def _bytes(size: float) -> str:
    for unit in ("B", "KB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def _ago(when: float) -> str:
    seconds = max(0.0, time.time() - when)
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit} ago"
    return "just now"


def _json(value: Any) -> None:
    print(json_module.dumps(value, indent=2))


def _columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A listing may have thousands of rows, and Rich takes 0.2 ms for each. On a terminal the last
    column is wrapped within itself."""
    rows = [[shown(cell) for cell in row] for row in rows]
    *widths, _ = (max(map(len, column)) for column in zip(head, *rows, strict=True))
    left = sum(widths) + 2 * len(widths)
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
    room = max(width - left, 20)
    lines = []
    for row in (head, *rows):
        cells = [cell.ljust(wide) for cell, wide in zip(row, widths, strict=False)]
        first, *more = textwrap.wrap(row[-1], room) if len(row[-1]) > room else [row[-1]]
        lines.append("  ".join((*cells, first)).rstrip())
        lines += [" " * left + line for line in more]
    say("\n".join(lines))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(*head, box=box.SIMPLE_HEAD)
    for row in rows:
        table.add_row(*map(shown, row))
    # Through a pipe a row stays one line, whatever its length.
    width = None if sys.stdout.isatty() else 10_000
    Console(width=width, markup=False, emoji=False, highlight=False).print(table)
