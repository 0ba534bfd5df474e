"""The pictures that a study's models drew, as data URIs."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from steep.evidence.report import rows
from steep.evidence.study import ArmResult, RunRecord, Study

LARGEST_PNG = 32 * 1024  # bytes; larger pictures are embedded as WebP of at most PIXELS a side
PIXELS = 384


def pictures(study: Study, store: Path) -> Iterator[tuple[ArmResult, RunRecord, str | None]]:
    """For every arm that draws: the run with the median test score, and its picture."""
    for arm in rows.ranked(study):
        drawn = [run for run in arm.runs if run.picture and study.primary in run.test]
        if drawn:
            run = sorted(drawn, key=lambda run: run.test[study.primary])[(len(drawn) - 1) // 2]
            yield arm, run, picture(store, run.picture)


def picture(store: Path, name: str | None) -> str | None:
    """A picture of the store as a data URI, reduced if it is large; `None` if it is missing or no picture."""
    path = store / name if name else None
    # the name may come from another machine's database: never read outside the store
    if path is None or not path.resolve().is_relative_to(store.resolve()):
        return None
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            kind = image.format or ""
            if kind != "PNG" or len(data) > LARGEST_PNG:
                kind, data = "WEBP", _reduced(image)
    except (OSError, UnidentifiedImageError):
        return None
    return f"data:image/{kind.lower()};base64,{base64.b64encode(data).decode()}"


def _reduced(image: Image.Image) -> bytes:
    small, buffer = image.convert("RGB"), io.BytesIO()
    small.thumbnail((PIXELS, PIXELS))
    small.save(buffer, "WEBP", quality=90)
    return buffer.getvalue()
