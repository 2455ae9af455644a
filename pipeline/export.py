"""`./run.sh export`: a trained model as a folder that needs nothing else of the run."""

from __future__ import annotations

import argparse
import logging
import shutil
from pathlib import Path

from pipeline.checkpoint import average_weights, checkpoints_to_average
from pipeline.config import Recipe, run_command

log = logging.getLogger("export")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, help="folder to write; default: RUN_DIR/export")


def export(recipe: Recipe, folder: Path, format: str = "safetensors") -> None:
    """Write model.safetensors (averaged fp32 weights, tied tensors once), vocabulary, config.json.

    :raises CheckpointError: the run has no checkpoint.
    """
    from safetensors.torch import save_model

    from data_prep.stage import run_stage, write_json
    from data_prep.vocabulary import vocabulary_files
    from pipeline.translator import untrained_model

    checkpoints = checkpoints_to_average(recipe)

    config = {
        "format": 1,
        "model": recipe.model.model_dump(mode="json"),
        "evaluation": recipe.evaluation.model_dump(mode="json"),
        "source_lang": recipe.data.source_lang,
        "target_lang": recipe.data.target_lang,
    }

    def build(partial: Path) -> dict[str, int]:
        model = untrained_model(recipe)
        use_ema = recipe.evaluation.use_ema
        model.load_state_dict(average_weights(checkpoints, use_ema=use_ema))
        save_model(model, str(partial / "model.safetensors"))
        for path in vocabulary_files(recipe.run_dir / "shards"):
            shutil.copyfile(path, partial / path.name)
        write_json(partial / "config.json", config)
        return {"parameters": sum(p.numel() for p in model.parameters())}

    run_stage(folder, {**config, "checkpoints": [c.info for c in checkpoints]}, build)


def main(recipe: Recipe, arguments: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    folder = arguments.output or recipe.run_dir / "export"
    export(recipe, folder)
    log.info("exported to %s; try: ./run.sh translate --model %s", folder, folder)


if __name__ == "__main__":
    run_command("export", "Export the trained model.", main, add_arguments)
