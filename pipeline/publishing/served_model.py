"""The registered model: MLflow runs this file where the model is loaded. Beside it lies
`pipeline/translation/serving.py`; nothing else of ours is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
from mlflow.pyfunc.model import PythonModel

from pipeline.translation.serving import CTranslate2Translator


class TranslationModel(PythonModel):
    """Source sentences in, translations out."""

    def load_context(self, context: Any) -> None:
        self.translator = CTranslate2Translator(Path(context.artifacts["model"]))

    # From the types MLflow infers the signature.
    def predict(self, model_input: list[str]) -> list[str]:  # type: ignore[override]
        return self.translator.translate(model_input)


mlflow.models.set_model(TranslationModel())
