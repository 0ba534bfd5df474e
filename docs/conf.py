"""The site: written pages, one generated page per method, and a gallery that is executed when built."""

import inspect
import sys
from pathlib import Path

import steep
from steep.card import ROOMS, cards

project = "steep"
author = "The steep developers"
release = steep.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_gallery.gen_gallery"]
exclude_patterns = ["_build", "examples", "gallery/*.ipynb", "gallery/*.py"]
html_theme = "furo"
html_title = "steep"
html_static_path = ["_static"]
html_css_files = ["steep.css"]
autodoc_typehints = "none"
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
suppress_warnings = ["config.cache"]
sphinx_gallery_conf = {
    "examples_dirs": "examples",
    "gallery_dirs": "gallery",
    "filename_pattern": r"/plot_",
    "abort_on_example_error": True,
    "download_all_examples": False,
    "show_memory": False,
    "remove_config_comments": True,
}
nitpicky = False


def reference(card):
    """The directives that document what `make` makes, and whatever else its file names in ``__all__``."""
    module, own = sys.modules[card.make.__module__], card.make.__name__
    return "\n\n".join(
        f".. autoclass:: {module.__name__}.{name}\n   :members:"
        if isinstance(getattr(module, name), type)
        else f".. autofunction:: {module.__name__}.{name}"
        for name in dict.fromkeys((own, *getattr(module, "__all__", ())))
    )


def method_page(card):
    """A page about one method, from its card and docstrings."""
    doc = inspect.getdoc(sys.modules[card.make.__module__]) or ""
    rows = "\n".join(f"| `{name}` | `{default!r}` |" for name, default in card.hyper.items())
    needs = "\n".join(f"- {steep.needs.NEEDS[n].what}" for n in sorted(card.needs))
    usage = f"```console\n$ steep compare RECIPE --methods {card.id}\n```" if card.plug else ""
    parts = [
        f"# {card.id}",
        card.summary,
        f"*{card.paper.title}*" + (f", {card.paper.year}" if card.paper.year else "") + f". <{card.paper.link}>",
        usage,
        f"## Formula\n\n```text\n{card.formula}\n```" if card.formula else "",
        f"## In detail\n\n```text\n{doc}\n```",
        f"## Hyper-parameters\n\n| name | default |\n|---|---|\n{rows}" if rows else "",
        f"## Needs\n\n{needs}" if needs else "",
        f"## Reference\n\n```{{eval-rst}}\n{reference(card)}\n```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def write_methods(app):
    """One page per card, and an index by room. Pages of methods that are gone go too."""
    folder = Path(app.srcdir) / "methods"
    folder.mkdir(exist_ok=True)
    pages = {f"{card.id}.md": method_page(card) for card in cards().values()}
    lines = ["# Methods", "What each changes in a training step."]
    for room in ROOMS:
        own = [c for c in cards().values() if c.changes == room]
        if own:
            lines += [f"## {room}", "\n".join(f"- [{c.id}]({c.id}.md): {c.summary}" for c in own)]
    lines.append("```{toctree}\n:hidden:\n" + "\n".join(card for card in cards()) + "\n```")
    pages["index.md"] = "\n\n".join(lines) + "\n"
    for old in folder.glob("*.md"):
        if old.name not in pages:
            old.unlink()
    for name, text in pages.items():
        (folder / name).write_text(text)


def setup(app):
    app.connect("builder-inited", write_methods)
