"""`models.factory` builds translation models and image classifiers; `models.export_format` stores
them."""
