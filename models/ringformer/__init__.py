from models.ringformer.ring import RingDecoder, RingEncoder

__all__ = ["RingDecoder", "RingEncoder"]
