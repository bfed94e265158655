"""Classify photos with a LiteRT file. Needs ai-edge-litert, numpy and pillow; nothing of edgecompress or PyTorch.

python classify_litert.py model.tflite photo.jpg [more.jpg ...]
"""

import json
import sys

import numpy as np
from ai_edge_litert.interpreter import Interpreter
from ai_edge_litert.schema_py_generated import Model
from PIL import Image, ImageOps


def load(path, threads=1):
    """The interpreter, the preprocessing that the network was trained with, and its classes, all read from the file itself."""
    with open(path, "rb") as file:
        content = file.read()
    interpreter = Interpreter(model_content=content, num_threads=threads)
    interpreter.allocate_tensors()
    model, said = Model.GetRootAs(content, 0), {}
    for number in range(model.MetadataLength()):
        entry = model.Metadata(number)
        said[entry.Name().decode()] = bytes(model.Buffers(entry.Buffer()).DataAsNumpy()).decode()
    return interpreter, json.loads(said["edgecompress.preprocess"]), json.loads(said["edgecompress.labels"])


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
    interpreter, how, labels = load(sys.argv[1])
    entry, result = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]
    for path in sys.argv[2:]:
        interpreter.set_tensor(entry, prepare(Image.open(path), how))
        interpreter.invoke()
        logits = interpreter.get_tensor(result)[0]
        chances = np.exp(logits - logits.max())
        print(f"{path}: {labels[logits.argmax()]} ({chances.max() / chances.sum():.0%})")


if __name__ == "__main__":
    main()
