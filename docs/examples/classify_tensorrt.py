"""Classify photos with the engine that build_on_device.py built. Runs on the device; needs its TensorRT, numpy and pillow.

    python3 classify_tensorrt.py photo.jpg [more.jpg ...]

Put this file into the folder with model.engine, engine.json and build_on_device.py.
"""

import json
import sys

import numpy as np
from build_on_device import Cuda, Session, load_engine
from PIL import Image, ImageOps


def load(path="model.engine"):
    """The engine on the GPU, the preprocessing that the network was trained with, and its classes."""
    import tensorrt as trt

    with open("engine.json") as file:
        record = json.load(file)
    with open(path, "rb") as file:
        engine = load_engine(trt, file.read(), record["dla_core"])
    if engine is None:
        sys.exit(
            f"{path} was built by TensorRT {record['tensorrt']} on {record['gpu']} and does not load in {trt.__version__}: "
            "build it again on this device with build_on_device.py."
        )
    said = record["metadata"]
    session = Session(trt, engine, Cuda(), record["batch"])
    return session, json.loads(said["edgecompress.preprocess"]), json.loads(said["edgecompress.labels"])


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
    session, how, labels = load()
    for path in sys.argv[1:]:
        logits = session.run(prepare(Image.open(path), how))[0]
        print(f"{path}: {labels[logits.argmax()]}")


if __name__ == "__main__":
    main()
