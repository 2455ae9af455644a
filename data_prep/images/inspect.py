"""Show what prepared images are: counts by class, what was refused, and whether all is intact."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from data_prep.arrow import check_shards
from data_prep.images.shards import ImagesManifest, read_images_manifest


def inspect_images(folder: Path) -> None:
    """Print all about the shards in `folder`.

    :raises DataError: there are no shards, or one is not what the manifest says.
    """
    data = read_images_manifest(folder)
    check_shards(folder, data.shards)
    console = Console()
    shape = f"{data.stored_size} × {data.stored_size} × {data.channels}"
    console.print(Text(f"{folder}: {len(data.classes):,} classes, {shape}", style="bold"))
    console.print(_classes(data))
    console.print(_sets(data))
    repeats = data.repeats
    megabytes = sum((folder / shard.name).stat().st_size for shard in data.shards) / 1e6
    for line in (
        f"mean {_channels(data.mean)}, std {_channels(data.std)} of the training images",
        f"repeats: {repeats.train:,} training images equal an earlier one, {repeats.valid:,} a "
        f"validation image, {repeats.test:,} a test image; {repeats.dropped:,} of these were "
        "dropped",
        f"checksums: all {len(data.shards):,} shards ({megabytes:,.1f} MB) are as the manifest "
        "says",
    ):
        console.print(Text(line))


def _classes(data: ImagesManifest) -> Table:
    table = Table(title="Images")
    table.add_column("class")
    for split in data.totals:
        table.add_column(split, justify="right")
    for label, name in enumerate(data.classes):
        table.add_row(Text(name), *(f"{total.classes[label]:,}" for total in data.totals.values()))
    table.add_section()
    table.add_row("all", *(f"{total.images:,}" for total in data.totals.values()))
    return table


def _sets(data: ImagesManifest) -> Table:
    table = Table(title="Sets")
    for name in ("set", "split", "read", "kept", "refused", "converted"):
        table.add_column(name, justify="right" if name in ("read", "kept") else "left")
    for each in data.sets:
        table.add_row(
            Text(each.name),
            each.split,
            f"{each.read:,}",
            f"{each.kept:,}",
            *(
                ", ".join(f"{count:,} {what}" for what, count in counts.items()) or "nothing"
                for counts in (each.refused, each.converted)
            ),
        )
    return table


def _channels(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.4f}" for value in values)
