"""The registered classifier: MLflow runs this file where the model is loaded.

Of our other code it needs only what `servable.SERVED_CLASSIFIER` names, which is stored with it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
from mlflow.pyfunc.model import PythonModel

from data_prep.images.read import Refused
from pipeline.classification.serving import OnnxClassifier


class ImageClassifier(PythonModel):
    """Says how probable each class of an image is."""

    def load_context(self, context: Any) -> None:
        """Load the exported model that is stored with this file."""
        self.classifier = OnnxClassifier(Path(context.artifacts["model"]))

    # MLflow infers the model's signature from these types.
    def predict(self, model_input: list[bytes]) -> list[dict[str, float]]:  # type: ignore[override]
        """Return, for the content of each JPEG or PNG file, classes with their probabilities.

        :raises ValueError: one is no such image; it says which.
        """
        found = []
        for number, content in enumerate(model_input):
            try:
                found.append(self.classifier.classify(content))
            except Refused as error:
                raise ValueError(f"image {number}: {error.reason}") from error
        return found


mlflow.models.set_model(ImageClassifier())
