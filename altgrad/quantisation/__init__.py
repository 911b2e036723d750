"""Quantisers on an unmodified model, packed files of what they make of its weights, and figures of how well their surrogates do.

altgrad.quantize(model, weights="sign:reste", activations="sign:bireal")
altgrad.quantisation.save_packed(model, "model.safetensors")       # a bit a weight
altgrad.quantisation.load_packed("model.safetensors", plain_model)
"""

from altgrad.quantisation.applying import Quantisation, dequantize, quantize
from altgrad.quantisation.inputs import calibrate
from altgrad.quantisation.packing import Packed, load_packed, pack, save_packed, unpack

__all__ = ["Packed", "Quantisation", "calibrate", "dequantize", "load_packed", "pack", "quantize", "save_packed", "unpack"]
