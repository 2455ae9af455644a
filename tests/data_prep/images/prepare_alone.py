"""Prepare images from a process of its own: python -m … RUN_DIR CONFIGURATION (JSON)."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from data_prep.files import DataError
from data_prep.images.config import ImagesConfig
from data_prep.images.prepare import prepare_images

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    try:
        prepare_images(ImagesConfig.model_validate_json(sys.argv[2]), Path(sys.argv[1]))
    except DataError as error:
        sys.exit(str(error))
