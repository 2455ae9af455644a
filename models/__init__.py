"""Translation models; `models.factory.create_model` builds them."""
