"""Images a second of training batches: ours from memory, against one image after the other through Pillow.

    python benchmarks/data_bench.py [--data PATH] [--size 256x128] [--batch 64] [--workers 2] [--rounds 5]

Both flip, pad and crop, normalise and erase with the same probabilities, shuffle, and end with float32 batches. The
rival is what torchreid does: every epoch each image is opened, decoded, resized, augmented and normalised by itself,
in the processes of a DataLoader. Its augmentation is written here from the published descriptions. One round is an
epoch of each, in turn; ours also without the memory, and decoding once is timed apart. --workers are the rival's
processes, those that decode for ours, and the threads of ours with the images in memory.
"""

import argparse
import math
import random
import re
import time

import torch
from PIL import Image, ImageOps
from timing import interleaved
from torch.utils.data import DataLoader, Dataset

from sabmn_ext.data import ImageDataset, TrainTransform, cache_images, load_data, train_batches

PADDING = 10
MEAN, STD = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


class OneByOne(Dataset[tuple[torch.Tensor, int]]):
    """An image a call: Pillow for resizing, flip and crop; a tensor of its own for the rest."""

    def __init__(self, paths: list[str], labels: list[int], height: int, width: int) -> None:
        self.paths, self.labels, self.height, self.width = paths, labels, height, width
        self.mean, self.std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        import numpy as np

        image = Image.open(self.paths[index]).convert("RGB")
        image = image.resize((self.width, self.height), Image.Resampling.BILINEAR)
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        image = ImageOps.expand(image, PADDING)
        left, top = (random.randint(0, 2 * PADDING) for _ in range(2))
        image = image.crop((left, top, left + self.width, top + self.height))
        tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)
        tensor = tensor.sub_(self.mean).div_(self.std)
        if random.random() < 0.5:
            self.erase(tensor)
        return tensor, self.labels[index]

    def erase(self, tensor: torch.Tensor) -> None:
        for _ in range(100):
            area = random.uniform(0.02, 0.4) * self.height * self.width
            aspect = random.uniform(0.3, 1 / 0.3)
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h < self.height and w < self.width:
                top, left = random.randint(0, self.height - h), random.randint(0, self.width - w)
                tensor[:, top : top + h, left : left + w] = 0
                return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="demo", help="a data set, as sabmn_ext.train takes it (default: demo)")
    parser.add_argument("--size", default="256x128", help="HxW of the batches")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    size = re.fullmatch(r"(\d+)x(\d+)", options.size)
    if not size:
        parser.error(f"--size {options.size}: expected HxW in pixels, such as 256x128")
    height, width = map(int, size.groups())
    torch.set_num_threads(max(1, options.workers))

    data = load_data(options.data)
    labels = data.train_labels()
    decoded, in_memory = (ImageDataset(data.train, labels, height, width) for _ in range(2))
    transform = TrainTransform(height, width, padding=PADDING)
    start = time.perf_counter()
    cache_images(in_memory, "ram", workers=options.workers)
    seconds = time.perf_counter() - start
    rival = OneByOne([record.path for record in data.train], labels, height, width)

    def ours(dataset: ImageDataset) -> None:
        for _ in train_batches(
            dataset, batch_size=options.batch, seed=0, epoch=1, workers=options.workers, transform=transform
        ):
            pass

    def one_by_one() -> None:
        loader = DataLoader(rival, options.batch, shuffle=True, drop_last=True, num_workers=options.workers)
        for _ in loader:
            pass

    candidates = {
        "ours, in memory": lambda: ours(in_memory),
        "ours, decoded in every epoch": lambda: ours(decoded),
        "one by one through Pillow": one_by_one,
    }
    times = interleaved(candidates, options.rounds)
    images = len(data.train) // options.batch * options.batch
    threads = torch.get_num_threads()
    print(f"{data.name}: {len(data.train)} images, {height}×{width}, batches of {options.batch},", end=" ")
    print(f"{options.workers} workers, {threads} threads, torch {torch.__version__}")
    print(f"decoded once in {seconds:.2f} s, {len(data.train) * 3 * height * width / 2**20:.0f} MiB")
    print(f"{'':30s}{'images/s':>10s}{'ms a batch':>12s}{'rival / it':>12s}")
    for name, each in times.items():
        ratio = times["one by one through Pillow"] / each
        print(f"{name:30s}{images / each:10.0f}{1000 * each * options.batch / images:12.2f}{ratio:12.2f}")


if __name__ == "__main__":
    main()
