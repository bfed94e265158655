"""Classify photos with an exported file. Needs onnxruntime, numpy and pillow; nothing of edgecompress or PyTorch.

python classify_onnxruntime.py model.int8.onnx photo.jpg [more.jpg ...]
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def load(path, threads=1):
    """The session, the preprocessing that the network was trained with, and its classes, all read from the file itself."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.x64quantprecision", "1")  # exact on x86 CPUs without VNNI, too
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    return session, json.loads(metadata["edgecompress.preprocess"]), json.loads(metadata["edgecompress.labels"])


def prepare(image, how):
    """A photo as the network's input: ``float32 [1, C, H, W]``, ``(pixel / 255 - mean) / std`` per channel."""
    height, width = how["size"]
    wanted = (width, height)
    image = ImageOps.exif_transpose(image).convert(how["channels"])
    if "resize" in how:  # the shorter side first; then the middle is cut out
        long = int(how["resize"] * max(image.size) / min(image.size))
        wanted = (how["resize"], long) if image.width <= image.height else (long, how["resize"])
    if image.size != wanted:
        image = image.resize(wanted, getattr(Image, how.get("interpolation", "bilinear").upper()))
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    image = image.crop((left, top, left + width, top + height))
    pixels = np.asarray(image, np.float32).reshape(height, width, -1) / 255
    pixels = (pixels - np.float32(how["mean"])) / np.float32(how["std"])
    return pixels.transpose(2, 0, 1)[None].astype(np.float32)


def main():
    session, how, labels = load(sys.argv[1])
    name = session.get_inputs()[0].name
    for path in sys.argv[2:]:
        logits = session.run(None, {name: prepare(Image.open(path), how)})[0][0]
        chances = np.exp(logits - logits.max())
        print(f"{path}: {labels[logits.argmax()]} ({chances.max() / chances.sum():.0%})")


if __name__ == "__main__":
    main()
