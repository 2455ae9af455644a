"""This package is RingFormer (arXiv 2502.13181), and rivals that differ in what a level owns."""

from models.ringformer.encoder_decoder import RingDecoder, RingEncoder
from models.ringformer.vision_ring import VisionRing

__all__ = ["RingDecoder", "RingEncoder", "VisionRing"]
