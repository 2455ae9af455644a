"""The registered model: MLflow runs this file where the model is loaded.

Of our other code it needs only what `servable.SERVED_TRANSLATION` names, which is stored with it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
from mlflow.pyfunc.model import PythonModel

from pipeline.translation.ctranslate2_translator import CTranslate2Translator


class TranslationModel(PythonModel):
    """Translates source sentences."""

    def load_context(self, context: Any) -> None:
        """Load the exported model that is stored with this file."""
        self.translator = CTranslate2Translator(Path(context.artifacts["model"]))

    # MLflow infers the model's signature from these types.
    def predict(self, model_input: list[str]) -> list[str]:  # type: ignore[override]
        """Return the translation of each sentence."""
        return self.translator.translate(model_input)


mlflow.models.set_model(TranslationModel())
