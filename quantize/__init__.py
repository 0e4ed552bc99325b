"""Weights in 8 or 4 bits: how they are rounded, the layers that hold them, and checkpoints of them."""

from quantize.api import Quantizer, load_quantized, quantize_, save_quantized
from quantize.schemes import SCHEMES, Scheme

__all__ = ["SCHEMES", "Quantizer", "Scheme", "load_quantized", "quantize_", "save_quantized"]
