"""`models.factory.create_model` builds translation models; `models.export_format` stores them."""
