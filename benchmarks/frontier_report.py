"""Tables and a picture of what `benchmarks/frontier.py` has on record."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

from matplotlib.figure import Figure

from benchmarks.record import Export, GivenUp, Record, Training
from benchmarks.rounds import print_table, ratios, three_digits
from benchmarks.runs import mean_and_deviation, p_over_seeds


class Claim(NamedTuple):
    """A system, and what it is compared with."""

    ours: str
    theirs: str


def report(record: Record, systems: Iterable[str], reference: str) -> None:
    """Print what each system on record is worth and what it costs."""
    rows, costs = [], []
    for system in systems:
        trainings = record.trainings(system)
        if not trainings:
            continue
        first = trainings[0]
        # The fastest: others may have shared the machine with something else.
        minutes, memory = min((each.minutes, each.memory_gib) for each in trainings)
        columns = [[getattr(t, key) for t in trainings] for key in ("valid_loss", "bleu", "chrf")]
        rows.append(
            [
                system,
                f"{first.core_parameters:,}",
                f"{first.parameters:,}",
                first.learning_rate,
                *map(mean_and_deviation, columns),
                ", ".join(f"{each.bleu:.2f}" for each in trainings),
                f"{minutes:.0f}",
                f"{memory:.2f}",
            ]
        )
        for export in record.exports(system):
            costs.append(
                [
                    system,
                    export.format,
                    f"{export.megabytes:.2f}",
                    f"{first.bleu:.2f}",
                    f"{export.bleu:.2f}",
                    three_digits(median(export.milliseconds)),
                    ratios(export.milliseconds, export.reference_milliseconds),
                ]
            )
    header = [
        "system", "core parameters", "parameters", "learning rate", "validation loss", "BLEU",
        "chrF2", "BLEU by seed", "training, min", "memory, GiB",
    ]  # fmt: skip
    print_table("Mean ± standard deviation over seeds, beam 4", header, rows)
    header = ["system", "format", "files, MB", "BLEU", "in int8", "a sentence, ms"]
    over = f"over {reference} in CTranslate2"
    caption = "The first seed's exports in int8, one thread, a sentence at a time"
    print_table(caption, [*header, over], costs)


def report_rates(record: Record, systems: Iterable[str]) -> None:
    """Print the validation losses by learning rate that rates were chosen by."""
    trials: dict[str, dict[str, str]] = {}
    for line in record.lines:
        if isinstance(line, Training):
            said = f"{line.valid_loss:.3f}"
            trials.setdefault(line.system, {}).setdefault(line.learning_rate, said)
        elif isinstance(line, GivenUp):
            said = f"{line.valid_loss:.2f} at step {line.step:,}, given up"
            trials.setdefault(line.system, {})[line.learning_rate] = said
    rates = sorted({rate for tried in trials.values() for rate in tried}, key=float)
    rows = [
        [system, *(trials[system].get(rate, "") for rate in rates)]
        for system in systems
        if len(trials.get(system, {})) > 1
    ]
    if rows:
        print_table("Validation loss by learning rate, first seed", ["system", *rates], rows)


def report_claims(record: Record, claims: Sequence[Claim]) -> None:
    """Print the differences that claims are made of, and whether they are more than chance."""
    rows = []
    for claim in claims:
        ours, theirs = _of_same_seeds(*map(record.trainings, claim))
        if not ours:
            continue
        core = ours[0].core_parameters / theirs[0].core_parameters
        every = ours[0].parameters / theirs[0].parameters
        tests = record.comparisons(*claim)
        by_seed = ", ".join(f"{test.difference:+.2f}" for test in tests)
        chances = ", ".join(f"{test.p:.3f}" for test in tests)
        bleu, other = ([each.bleu for each in trainings] for trainings in (ours, theirs))
        over_seeds = p_over_seeds(bleu, other, digits=3)
        difference = f"{mean(bleu) - mean(other):+.2f}"
        sizes = f"{core:.2f}", f"{every:.2f}"
        rows.append([*claim, *sizes, difference, by_seed, chances, over_seeds])
    header = [
        "system", "against", "of its core parameters", "of all", "BLEU", "by seed",
        "p by seed (paired bootstrap)", "p over seeds (Welch)",
    ]  # fmt: skip
    print_table("Differences", header, rows)


def _of_same_seeds(
    ours: Sequence[Training], theirs: Sequence[Training]
) -> tuple[list[Training], list[Training]]:
    """Return the trainings with seeds that both systems have."""
    seeds = {each.seed for each in ours} & {each.seed for each in theirs}
    mine, others = ([each for each in some if each.seed in seeds] for some in (ours, theirs))
    return mine, others


class Point(NamedTuple):
    """A system in the picture."""

    bleu: float
    training: Training
    exports: Sequence[Export]


def draw(record: Record, families: Mapping[str, str], reference: str, path: Path) -> None:
    """Draw BLEU by parameters, by the smallest file, and by the fastest export's time.

    :param families: of the systems; those of one are joined by a line.
    """
    points = {
        system: Point(mean(each.bleu for each in found), found[0], record.exports(system))
        for system in families
        if (found := record.trainings(system))
    }
    panels: dict[str, Callable[[Point], list[float]]] = {
        "parameters with embeddings, millions": lambda p: [p.training.parameters / 1e6],
        "smallest int8 export, MB": lambda point: [each.megabytes for each in point.exports],
        f"one sentence on one thread, time over {reference}'s": lambda point: [
            median(each.milliseconds) / median(each.reference_milliseconds)
            for each in point.exports
        ],
    }
    figure = Figure(figsize=(16, 6), layout="constrained")
    all_axes = figure.subplots(1, len(panels), sharey=True)
    for axes, (label, costs) in zip(all_axes, panels.items(), strict=True):
        for number, family in enumerate(dict.fromkeys(families[system] for system in points)):
            own = [point for system, point in points.items() if families[system] == family]
            placed = sorted((min(costs(each)), each.bleu) for each in own if costs(each))
            axes.plot(
                [x for x, _ in placed],
                [y for _, y in placed],
                label=family,
                marker="os^vDPX"[number % 7],  # colours come again after ten
                linestyle="--" if "taught" in family else "-",
            )
        axes.set(xscale="log", xlabel=label)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("{x:g}")
        axes.grid(alpha=0.3, which="both")
    all_axes[0].set(ylabel="BLEU")
    all_axes[0].legend(fontsize="small", loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
