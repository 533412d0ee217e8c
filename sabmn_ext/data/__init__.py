"""Data sets, images, augmentation and batches; `python -m sabmn_ext.data PATH` looks into a data set."""

from .cache import cache_images
from .images import ImageDataset, UnreadableImageError, load_image
from .loader import image_batches, steps_per_epoch, train_batches
from .records import ImageRecord, ReidData, load_data
from .transforms import TrainTransform, normalize

__all__ = [
    "ImageDataset",
    "ImageRecord",
    "ReidData",
    "TrainTransform",
    "UnreadableImageError",
    "cache_images",
    "image_batches",
    "load_data",
    "load_image",
    "normalize",
    "steps_per_epoch",
    "train_batches",
]
